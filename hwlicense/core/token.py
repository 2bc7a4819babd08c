"""Wrapping for a PKCS#11 token by its public key alone, and fresh proofs that it holds the private one.

P-256: ephemeral ECDH (NIST SP 800-56A, 6.2.2.2), then HKDF over the shared secret with both points as context. RSA:
OAEP (RFC 8017, 7.1) of a random secret, never PKCS#1 v1.5. Either way the token computes, and only on what it is given.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Final, NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from hwlicense.core.errors import DamagedError, HardwareError, Reason
from hwlicense.core.secret import SIZE, Secret, derive

if TYPE_CHECKING:
    from hwlicense.core.documents import Mechanism, TokenBinding

POINT_SIZE: Final = 65
"""Bytes of an uncompressed P-256 point (SEC 1, 2.3.3)."""

RSA_SIZES: Final = (2048, 3072, 4096)
CHECK_SIZE: Final = 16
MECHANISMS: Final[tuple[Mechanism, ...]] = ("ecdh", "rsa-oaep-sha256", "rsa-oaep-sha1")
"""In order of preference. SHA-1 within OAEP is not broken by collisions; it is the last choice all the same."""


class Wrapped(NamedTuple):
    """What the token is given, what confirms its answer, and the secret that comes of it."""

    encapsulated: bytes
    check: bytes
    secret: Secret


def public_key(der: bytes, reason: Reason = Reason.EVIDENCE_INVALID) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
    """A token's key from its SubjectPublicKeyInfo. Raises DamagedError for any but P-256 and RSA of a usual size."""
    try:
        key = load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    usable = (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)) or (
        isinstance(key, rsa.RSAPublicKey) and key.key_size in RSA_SIZES
    )
    if not usable or not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey) or spki(key) != der:
        what = "The token's key is neither a P-256 key nor an RSA key of 2048, 3072 or 4096 bits."
        raise DamagedError(reason, what, "Make a P-256 key on the token, and enroll with it.")
    return key


def spki(key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> bytes:
    """The one encoding of a token's key: SubjectPublicKeyInfo, DER."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def wrap(der: bytes, mechanism: Mechanism, purpose: bytes = b"token member") -> Wrapped:
    """A fresh secret for the token with this key. Raises DamagedError where mechanism and key differ, or it is none."""
    key = public_key(der)
    if isinstance(key, ec.EllipticCurvePublicKey) != (mechanism == "ecdh"):
        what = f"The token's key does not go with the mechanism {mechanism}."
        raise DamagedError(Reason.EVIDENCE_INVALID, what, "Enroll the token again.")
    if isinstance(key, ec.EllipticCurvePublicKey):
        ephemeral = ec.generate_private_key(key.curve)
        encapsulated = ephemeral.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        shared = Secret(bytearray(ephemeral.exchange(ec.ECDH(), key)))
    else:
        shared = Secret.random()
        algorithm = _HASHES[mechanism]
        oaep = padding.OAEP(padding.MGF1(algorithm), algorithm, None)  # SoftHSM and others take no label
        try:
            encapsulated = key.encrypt(bytes(shared.buffer), oaep)
        except ValueError:  # an even modulus, an exponent beyond all bounds: only a forger's numbers are like that
            what = "The token's RSA key has numbers that no RSA key has."
            raise DamagedError(
                Reason.EVIDENCE_INVALID, what, "Make a P-256 key on the token, and enroll with it."
            ) from None
    with shared:
        secret, check = _derived(shared, der, encapsulated, purpose)
    return Wrapped(encapsulated, check, secret)


def unwrap(shared: Secret, der: bytes, encapsulated: bytes, check: bytes, purpose: bytes = b"token member") -> Secret:
    """The secret, from what the token made of `encapsulated`. Wipes `shared`.

    Raises HardwareError TOKEN_FORGED where token or module gave anything else.
    """
    with shared:
        secret, found = _derived(shared, der, encapsulated, purpose)
        if len(shared) == SIZE and hmac.compare_digest(found, check):
            return secret
    secret.wipe()
    raise _forged()


def checked_signature(content: Secret, der: bytes, digest: bytes) -> Secret:
    """The token's signature (r and s) over a SHA-256, as DER, if it is one. Wipes `content`.

    Raises HardwareError TOKEN_FORGED.
    """
    with content:
        key, raw = public_key(der), bytes(content.buffer)
    half = len(raw) // 2
    made = encode_dss_signature(int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(made, digest, ec.ECDSA(Prehashed(hashes.SHA256())))
            return Secret(bytearray(made))
    except InvalidSignature:
        pass
    raise _forged()


def check_binding(binding: TokenBinding) -> None:
    """That the parts of a binding fit each other. Raises DamagedError LICENSE_DAMAGED."""
    key = public_key(binding.key, Reason.LICENSE_DAMAGED)
    size = POINT_SIZE if isinstance(key, ec.EllipticCurvePublicKey) else key.key_size // 8
    if isinstance(key, ec.EllipticCurvePublicKey) != (binding.mechanism == "ecdh") or len(binding.encapsulated) != size:
        what = "The license's token part contradicts itself."
        raise DamagedError(Reason.LICENSE_DAMAGED, what, "Ask the vendor for the license again.")


def _forged() -> HardwareError:
    what = "The token, or its module, answered with a wrong secret."
    return HardwareError(Reason.TOKEN_FORGED, what, "Use the token maker's own module; try the token elsewhere.")


_HASHES: Final[dict[Mechanism, hashes.HashAlgorithm]] = {
    "rsa-oaep-sha256": hashes.SHA256(),
    "rsa-oaep-sha1": hashes.SHA1(),  # noqa: S303  # what OAEP needs of it (RFC 8017, B.1) is not what was broken
}


def _derived(shared: Secret, der: bytes, encapsulated: bytes, purpose: bytes) -> tuple[Secret, bytes]:
    with derive([shared], purpose + b" check", der, encapsulated) as check:
        return derive([shared], purpose, der, encapsulated), bytes(check.buffer[:CHECK_SIZE])
