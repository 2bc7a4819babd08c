"""TPMT_SIGNATURE (Part 2, 11.3.4): the vendor's over approved platform states, and the TPM's over quotes."""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from hwlicense.core.errors import DamagedError, Reason, UsageError
from hwlicense.core.tpm.structures import Attributes, Public
from hwlicense.core.tpm.wire import Algorithm, Reader, number, sized

HASHES: Final[dict[Algorithm, hashes.HashAlgorithm]] = {
    Algorithm.SHA256: hashes.SHA256(),
    Algorithm.SHA384: hashes.SHA384(),
    Algorithm.SHA512: hashes.SHA512(),
}

AGAIN: Final = "Get the file again from where it was made; it must not be edited."


def policy_key_public(key: ec.EllipticCurvePublicKey) -> Public:
    """The vendor's P-256 policy key as the TPM loads it: the Name of this area is what policies hold."""
    if not isinstance(key.curve, ec.SECP256R1):
        raise UsageError(Reason.USAGE, "A policy key must be on P-256: older TPMs know no other curve.")
    point = key.public_numbers()
    return Public(
        Algorithm.ECC,
        Algorithm.SHA256,
        Attributes.SIGN | Attributes.USER_WITH_AUTH,
        b"",
        (number(point.x, 32), number(point.y, 32)),
        scheme=(Algorithm.ECDSA, Algorithm.SHA256),
        bits=256,
    )


def sign_approval(key: ec.EllipticCurvePrivateKey, policy: bytes, reference: bytes) -> bytes:
    """TPMT_SIGNATURE, 72 bytes, over policy digest and reference (32 bytes each), as PolicyAuthorize wants it."""
    policy_key_public(key.public_key())
    r, s = decode_dss_signature(key.sign(policy + reference, ec.ECDSA(hashes.SHA256())))
    return number(Algorithm.ECDSA, 2) + number(Algorithm.SHA256, 2) + sized(number(r, 32)) + sized(number(s, 32))


def check_approval(key: Public, policy: bytes, reference: bytes, signature: bytes) -> None:
    """Raises DamagedError SIGNATURE_INVALID where the policy key did not sign this state for this reference."""
    verify(key, policy + reference, signature, Reason.SIGNATURE_INVALID, "approval")


def verify(key: Public, message: bytes, signature: bytes, reason: Reason, what: str) -> Algorithm:
    """Check a TPMT_SIGNATURE by the scheme that `key` fixes; returns its hash. Raises DamagedError with `reason`."""
    reader = Reader(signature, f"signature of the {what}", reason)
    if key.scheme is None or (reader.number(2), reader.number(2)) != key.scheme:
        raise reader.damaged("its scheme is not the key's")
    public, algorithm = key.key(), key.scheme[1]
    first = reader.sized(key.bits // 8)
    second = reader.sized(key.bits // 8) if isinstance(public, ec.EllipticCurvePublicKey) else b""
    reader.end()
    try:
        if isinstance(public, rsa.RSAPublicKey):
            public.verify(first, message, padding.PKCS1v15(), HASHES[algorithm])
        else:
            pair = encode_dss_signature(int.from_bytes(first, "big"), int.from_bytes(second, "big"))
            public.verify(pair, message, ec.ECDSA(HASHES[algorithm]))
    except InvalidSignature:
        raise DamagedError(reason, f"The signature of the {what} is not by the key that it names.", AGAIN) from None
    return algorithm
