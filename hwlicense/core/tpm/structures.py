"""TPMT_PUBLIC (Part 2, 12.2.4): strict parsing, names, templates, and what each kind of key must be."""

from __future__ import annotations

import hashlib
from enum import IntFlag
from typing import Final, Self

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from hwlicense.core.errors import DamagedError, Reason
from hwlicense.core.tpm.wire import DIGEST_SIZES, Algorithm, Reader, number, sized


class Attributes(IntFlag):
    """TPMA_OBJECT (Part 2, 8.3). The names are the specification's, in capitals."""

    FIXED_TPM = 1 << 1
    ST_CLEAR = 1 << 2
    FIXED_PARENT = 1 << 4
    SENSITIVE_DATA_ORIGIN = 1 << 5
    USER_WITH_AUTH = 1 << 6
    ADMIN_WITH_POLICY = 1 << 7
    FIRMWARE_LIMITED = 1 << 8
    SVN_LIMITED = 1 << 9
    NO_DA = 1 << 10
    ENCRYPTED_DUPLICATION = 1 << 11
    RESTRICTED = 1 << 16
    DECRYPT = 1 << 17
    SIGN = 1 << 18
    X509_SIGN = 1 << 19


_A = Attributes
_ALL_ATTRIBUTES: Final = sum(Attributes)
_CURVES: Final[dict[int, tuple[int, ec.EllipticCurve]]] = {256: (3, ec.SECP256R1()), 384: (4, ec.SECP384R1())}
_CURVE_BITS: Final = {identifier: bits for bits, (identifier, _) in _CURVES.items()}
_RSA_BITS: Final = (2048, 3072, 4096)
_SIGNING: Final = {Algorithm.RSA: (Algorithm.RSASSA,), Algorithm.ECC: (Algorithm.ECDSA,), Algorithm.KEYEDHASH: ()}


class Public(msgspec.Struct, frozen=True):
    """A public area. Only what the project meets: RSA, ECC on P-256 and P-384, sealed data; AES-CFB; no KDF scheme.

    `unique` is (modulus,), (x, y) or (digest,); `symmetric_bits` is the AES key size of a storage key, else 0;
    `scheme` is (signature scheme, hash) or None; `bits` is the key size; `exponent` 0 stands for 65,537.
    """

    type: Algorithm
    name_algorithm: Algorithm
    attributes: Attributes
    policy: bytes
    unique: tuple[bytes, ...]
    symmetric_bits: int = 0
    scheme: tuple[Algorithm, Algorithm] | None = None
    bits: int = 0
    exponent: int = 0

    @classmethod
    def parse(cls, raw: bytes, reason: Reason = Reason.EVIDENCE_INVALID) -> Self:
        """Raises DamagedError with `reason` for anything that does not marshal back to the same bytes."""
        reader = Reader(raw, "TPM public area", reason)
        kind = reader.algorithm(_SIGNING, "object type")
        name_algorithm = reader.algorithm(DIGEST_SIZES, "name algorithm")
        attributes = reader.number(4)
        if attributes & ~_ALL_ATTRIBUTES:
            raise reader.damaged(f"attributes 0x{attributes:08x} include reserved bits")
        policy = reader.sized(64)
        if len(policy) not in (0, DIGEST_SIZES[name_algorithm]):
            raise reader.damaged("its policy is no digest of its name algorithm")
        symmetric_bits, scheme, bits, exponent = 0, None, 0, 0
        unique: tuple[bytes, ...]
        if kind != Algorithm.KEYEDHASH and reader.algorithm((Algorithm.AES, Algorithm.NULL), "cipher") == Algorithm.AES:
            symmetric_bits = reader.number(2)
            if symmetric_bits not in (128, 256):
                raise reader.damaged(f"AES with {symmetric_bits} bits is not supported")
            reader.algorithm((Algorithm.CFB,), "cipher mode")
        code = reader.algorithm((*_SIGNING[kind], Algorithm.NULL), "scheme")
        if code != Algorithm.NULL:
            scheme = code, reader.algorithm(DIGEST_SIZES, "hash")
        if kind == Algorithm.RSA:
            bits, exponent = reader.number(2), reader.number(4)
            if bits not in _RSA_BITS or exponent not in (0, 65537):
                raise reader.damaged(f"RSA with {bits} bits and exponent {exponent} is not supported")
            unique = (reader.sized(bits // 8),)
        elif kind == Algorithm.ECC:
            curve = reader.number(2)
            if curve not in _CURVE_BITS:
                raise reader.damaged(f"curve 0x{curve:04x} is not supported")
            bits = _CURVE_BITS[curve]
            reader.algorithm((Algorithm.NULL,), "key derivation")
            unique = reader.sized(bits // 8), reader.sized(bits // 8)
        else:
            unique = (reader.sized(64),)
        reader.end()
        return cls(kind, name_algorithm, _A(attributes), policy, unique, symmetric_bits, scheme, bits, exponent)

    @property
    def raw(self) -> bytes:
        """TPMT_PUBLIC, without the size that a TPM2B_PUBLIC puts before it."""
        null = number(Algorithm.NULL, 2)
        out = number(self.type, 2) + number(self.name_algorithm, 2) + number(self.attributes, 4) + sized(self.policy)
        if self.type != Algorithm.KEYEDHASH:
            cipher = number(Algorithm.AES, 2) + number(self.symmetric_bits, 2) + number(Algorithm.CFB, 2)
            out += cipher if self.symmetric_bits else null
        out += number(self.scheme[0], 2) + number(self.scheme[1], 2) if self.scheme else null
        if self.type == Algorithm.RSA:
            out += number(self.bits, 2) + number(self.exponent, 4)
        elif self.type == Algorithm.ECC:
            out += number(_CURVES[self.bits][0], 2) + null
        return out + b"".join(map(sized, self.unique))

    @property
    def name(self) -> bytes:
        """The TPM's Name of the object: name algorithm and digest of the public area (Part 1, 16)."""
        digest = hashlib.new(self.name_algorithm.name.lower(), self.raw).digest()
        return number(self.name_algorithm, 2) + digest

    def key(self) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
        """Raises DamagedError EVIDENCE_INVALID where the numbers are no key of this kind."""
        numbers = [int.from_bytes(part, "big") for part in self.unique]
        try:
            if self.type == Algorithm.RSA and numbers[0].bit_length() == self.bits and numbers[0] & 1:
                return rsa.RSAPublicNumbers(self.exponent or 65537, numbers[0]).public_key()
            if self.type == Algorithm.ECC:
                return ec.EllipticCurvePublicNumbers(numbers[0], numbers[1], _CURVES[self.bits][1]).public_key()
        except ValueError:  # a point off the curve: the seed wrapped to it would be known to others
            pass
        raise DamagedError(Reason.EVIDENCE_INVALID, "The TPM public area does not hold a valid public key.")


# ---- what each kind of key must be -----------------------------------------------------------------------

_BORN_HERE: Final = _A.FIXED_TPM | _A.FIXED_PARENT | _A.SENSITIVE_DATA_ORIGIN | _A.RESTRICTED


def _check(public: Public, what: str, required: Attributes, forbidden: Attributes, *, storage: bool) -> None:
    for attribute in (required | forbidden) & (public.attributes ^ required):
        state = "lacks" if attribute in required else "has"
        raise DamagedError(Reason.EVIDENCE_INVALID, f"The {what} {state} the attribute {attribute.name}.")
    if public.type == Algorithm.KEYEDHASH or public.name_algorithm == Algorithm.SHA512:
        raise DamagedError(Reason.EVIDENCE_INVALID, f"The {what} is no RSA or ECC key named by SHA-256 or SHA-384.")
    if storage != bool(public.symmetric_bits) or storage == bool(public.scheme):
        raise DamagedError(Reason.EVIDENCE_INVALID, f"The {what} has the wrong cipher or scheme for its use.")
    public.key()


def check_storage_root_key(public: Public) -> None:
    """A parent that never leaves its TPM. Raises DamagedError EVIDENCE_INVALID naming the wrong attribute."""
    required = _BORN_HERE | _A.DECRYPT | _A.USER_WITH_AUTH
    _check(public, "storage root key", required, _A.SIGN | _A.ST_CLEAR | _A.ENCRYPTED_DUPLICATION, storage=True)


def check_attestation_key(public: Public) -> None:
    """A key that signs only what its TPM says. Raises DamagedError EVIDENCE_INVALID naming the wrong attribute."""
    _check(public, "attestation key", _BORN_HERE | _A.SIGN, _A.DECRYPT | _A.ENCRYPTED_DUPLICATION, storage=False)


def check_endorsement_key(public: Public) -> None:
    """A key that activates credentials (TCG EK Credential Profile, B.3). Raises as the other two do."""
    required = _BORN_HERE | _A.DECRYPT | _A.ADMIN_WITH_POLICY
    _check(public, "endorsement key", required, _A.SIGN | _A.ST_CLEAR | _A.ENCRYPTED_DUPLICATION, storage=True)


# ---- templates -------------------------------------------------------------------------------------------

_PRIMARY: Final = _BORN_HERE | _A.USER_WITH_AUTH | _A.NO_DA
_NOWHERE: Final = (bytes(32), bytes(32))

STORAGE_ROOT_TEMPLATE: Final = Public(
    Algorithm.ECC, Algorithm.SHA256, _PRIMARY | _A.DECRYPT, b"", _NOWHERE, 128, None, 256
)
"""P-256 storage root key (TCG TPM v2.0 Provisioning Guidance, 7.5.1); made again where none is persistent."""

ATTESTATION_TEMPLATE: Final = Public(
    Algorithm.ECC, Algorithm.SHA256, _PRIMARY | _A.SIGN, b"", _NOWHERE, 0, (Algorithm.ECDSA, Algorithm.SHA256), 256
)
"""P-256 attestation key. In the endorsement hierarchy only: elsewhere quotes hide firmware version and reset count."""


def sealed_public(policy: bytes, protection: bytes, *, pin: bool) -> Public:
    """The public area of a sealed object. `protection` is SHA-256 of its seed value and data (Part 1, 27.5.3.3).

    Without USER_WITH_AUTH nothing but the policy opens it, and with ADMIN_WITH_POLICY nothing takes the PIN off.
    Only where there is no PIN to guess is it free of the dictionary attack lockout.
    """
    attributes = _A.ADMIN_WITH_POLICY if pin else _A.ADMIN_WITH_POLICY | _A.NO_DA
    return Public(Algorithm.KEYEDHASH, Algorithm.SHA256, attributes, policy, (protection,))
