"""DSSE envelopes: the payload, its type, and signatures over both.

The vendor signs everything twice, with one classical key (Ed25519, or ECDSA P-256 with SHA-256) and one ML-DSA-65 key,
and a device requires both: forging takes a break of both. DSSE: secure-systems-lab/dsse, protocol.md, version 1.0.
ML-DSA: FIPS 204, pure, over the prefix and SHA-512 digest that TUF's TAP 21 prescribes.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Final, Protocol, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from hwlicense.core.documents import PAYLOAD_TYPES
from hwlicense.core.errors import DamagedError, Reason, RefusedError
from hwlicense.core.schema import COPY_AGAIN, DEFAULT_SIZE_LIMIT, SIZE_LIMITS, Document, decode, encode, prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hwlicense.core.documents import VendorPublic

SIGNATURE_LIMIT: Final = 8


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One signature. `keyid` is a hint: only a key that the verifier holds counts."""

    keyid: Annotated[str, msgspec.Meta(max_length=200)]
    sig: Annotated[bytes, msgspec.Meta(max_length=8192)]


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An envelope as DSSE's JSON has it."""

    payload: bytes
    payloadType: Annotated[str, msgspec.Meta(max_length=200)]  # noqa: N815  # the name that DSSE gives
    signatures: Annotated[list[Signature], msgspec.Meta(max_length=SIGNATURE_LIMIT)]


prepare(Envelope)


class Signer(Protocol):
    """One private key, wherever it lives."""

    @property
    def keyid(self) -> str:
        """As `keyid()` gives it for the public key."""

    def sign(self, message: bytes) -> bytes:
        """Over `message` as it is, or over its `ml_dsa_message`."""


D = TypeVar("D", bound=Document)


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """What is signed: type and payload, each with its length in bytes (DSSE, 'PAE')."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def ml_dsa_message(message: bytes) -> bytes:
    """What ML-DSA signs in place of `message`: TAP 21, key version 1."""
    return b"tuf\x01" + hashlib.sha512(message).digest()


def keyid(public: bytes) -> str:
    """SHA-256 of a SubjectPublicKeyInfo (DER), in hex."""
    return hashlib.sha256(public).hexdigest()


def statement(document: Document) -> bytes:
    """The bytes that a signature over `document` covers."""
    return pre_authentication_encoding(PAYLOAD_TYPES[type(document)], encode(document))


def seal(document: Document, signers: Sequence[Signer]) -> bytes:
    """`document` in an envelope with a signature by each of `signers`, as JSON and a final newline."""
    message = statement(document)
    return assemble(document, [Signature(signer.keyid, signer.sign(message)) for signer in signers])


def assemble(document: Document, signatures: list[Signature]) -> bytes:
    """`document` in an envelope with signatures made elsewhere."""
    return encode(Envelope(encode(document), PAYLOAD_TYPES[type(document)], signatures)) + b"\n"


def disassemble(raw: bytes) -> Envelope:
    """Decode an envelope strictly, its payload unread. Raises DamagedError."""
    limit = max(SIZE_LIMITS.values()) * 4 // 3 + DEFAULT_SIZE_LIMIT
    if len(raw) > limit:
        raise DamagedError(
            Reason.DOCUMENT_TOO_LARGE, f"The file is larger than {limit:,} bytes.", "Check the file's name."
        )
    try:
        envelope = msgspec.json.decode(raw, type=Envelope)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        what = f"The file is not a document of hwlicense: {error}."
        raise DamagedError(Reason.DOCUMENT_MALFORMED, what, COPY_AGAIN) from None
    if encode(envelope) + b"\n" != raw:
        what = "The envelope is not in its one encoding (duplicate keys, odd spacing or base64)."
        raise DamagedError(Reason.DOCUMENT_MALFORMED, what, COPY_AGAIN)
    if len({signature.keyid for signature in envelope.signatures}) != len(envelope.signatures):
        raise DamagedError(Reason.DOCUMENT_MALFORMED, "The envelope has two signatures of one key.", COPY_AGAIN)
    return envelope


def unverified(raw: bytes, kind: type[D]) -> tuple[D, Envelope]:
    """The document in an envelope whose signatures nobody has checked: for display, and for requests."""
    envelope = disassemble(raw)
    if envelope.payloadType != PAYLOAD_TYPES[kind]:
        what = f"The file is of type {envelope.payloadType!r}, not {PAYLOAD_TYPES[kind]!r}."
        raise DamagedError(Reason.DOCUMENT_MALFORMED, what, "Give the file that this command works on.")
    return decode(envelope.payload, kind), envelope


def verified(raw: bytes, kind: type[D], vendor: VendorPublic) -> D:
    """The document in an envelope that both keys of `vendor` have signed.

    Raises DamagedError (SIGNATURE_INVALID, SIGNATURE_MISSING, DOCUMENT_MALFORMED ...), and RefusedError WRONG_VENDOR
    where neither signature is of this vendor.
    """
    envelope = disassemble(raw)
    if envelope.payloadType != PAYLOAD_TYPES[kind]:
        what = f"The file is of type {envelope.payloadType!r}, not {PAYLOAD_TYPES[kind]!r}."
        raise DamagedError(Reason.DOCUMENT_MALFORMED, what, "Give the file that this command works on.")
    message = pre_authentication_encoding(envelope.payloadType, envelope.payload)
    by_key = {signature.keyid: signature.sig for signature in envelope.signatures}
    required = {"classical": vendor.classical, "ML-DSA-65": vendor.ml_dsa_65}
    if not any(keyid(public) in by_key for public in required.values()):
        raise RefusedError(
            Reason.WRONG_VENDOR,
            f"The file is not signed by the vendor {vendor.name!r}.",
            "Use the file of the vendor that the application (or `hwlicense device trust`) names.",
        )
    verifiers = {"classical": classical_verifier(vendor.classical), "ML-DSA-65": ml_dsa_verifier(vendor.ml_dsa_65)}
    for which, public in required.items():
        signature = by_key.get(keyid(public))
        if signature is None:
            what = f"The {which} signature of the vendor {vendor.name!r} is missing; both are required."
            raise DamagedError(Reason.SIGNATURE_MISSING, what, COPY_AGAIN)
        try:
            verifiers[which](signature, message)
        except InvalidSignature:
            what = f"The {which} signature of the vendor {vendor.name!r} does not match: the file was changed."
            raise DamagedError(Reason.SIGNATURE_INVALID, what, COPY_AGAIN) from None
    return decode(envelope.payload, kind)


def classical_key(public: bytes) -> ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey | None:
    """An Ed25519 or P-256 key (SubjectPublicKeyInfo, DER); None for what is neither."""
    try:
        key = load_der_public_key(public)
    except (ValueError, UnsupportedAlgorithm):
        return None
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    return key if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1) else None


def classical_verifier(public: bytes) -> Callable[[bytes, bytes], None]:
    """Checks (signature, message) with an Ed25519 or P-256 key; raises InvalidSignature."""
    key = classical_key(public)
    if key is None:
        raise DamagedError(Reason.DOCUMENT_MALFORMED, "The classical key is neither Ed25519 nor P-256.", COPY_AGAIN)
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key.verify
    return lambda signature, message: key.verify(signature, message, ec.ECDSA(hashes.SHA256()))


def ml_dsa_verifier(public: bytes) -> Callable[[bytes, bytes], None]:
    """Checks (signature, message) with an ML-DSA-65 key; raises InvalidSignature."""
    try:
        key = load_der_public_key(public)
    except (ValueError, UnsupportedAlgorithm) as error:
        what = f"A key in the vendor's public file cannot be read: {error}."
        raise DamagedError(Reason.DOCUMENT_MALFORMED, what, COPY_AGAIN) from None
    if not isinstance(key, mldsa.MLDSA65PublicKey):
        raise DamagedError(Reason.DOCUMENT_MALFORMED, "The vendor's second key is not an ML-DSA-65 key.", COPY_AGAIN)
    return lambda signature, message: key.verify(signature, ml_dsa_message(message))
