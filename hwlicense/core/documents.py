"""The schemas of every document, and their one strict decoder.

A payload has exactly one encoding: compact JSON with the fields in the order below, bytes in padded base64
(RFC 4648, section 4). Decoding refuses unknown fields, wrong types, absurd sizes and anything that does not encode
back to the same bytes, duplicate keys and odd spacing among them.
"""

from __future__ import annotations

import datetime  # noqa: TC003  # msgspec reads the annotations at run time
import hashlib
from typing import Annotated, Final, Literal, TypeVar

import msgspec

from hwlicense.core.errors import DamagedError, Reason, UsageError

SCHEMA: Final = 1
"""Version of every schema here. A device refuses versions that it does not know."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Blob = Annotated[bytes, msgspec.Meta(max_length=4096)]
Identifier = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
Fingerprint = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Positive = Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
Generation = Annotated[int, msgspec.Meta(ge=1, lt=2**32)]


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every struct: immutable, and closed to fields that the schema does not name."""


# ---- hardware evidence and bindings ----------------------------------------------------------------------


class Pcr(Document, frozen=True):
    """One PCR of one bank. `value` is 32 bytes for sha256, 48 for sha384."""

    bank: Literal["sha256", "sha384"]
    index: Annotated[int, msgspec.Meta(ge=0, le=23)]
    value: Annotated[bytes, msgspec.Meta(min_length=32, max_length=48)]


Pcrs = Annotated[list[Pcr], msgspec.Meta(max_length=48)]


class EndorsementKey(Document, frozen=True):
    """An EK as TPMT_PUBLIC, with its certificate (X.509, DER) where the TPM holds one."""

    public: Blob
    certificate: Blob | None


class TpmEvidence(Document, frozen=True, tag="tpm", tag_field="kind"):
    """What a TPM says of itself. Public areas are TPMT_PUBLIC (TPM 2.0 Part 2, 12.2.4)."""

    manufacturer: Annotated[str, msgspec.Meta(max_length=64)]
    firmware: Annotated[str, msgspec.Meta(max_length=64)]
    endorsement_keys: Annotated[list[EndorsementKey], msgspec.Meta(min_length=1, max_length=8)]
    storage_root_key: Blob
    attestation_key: Blob
    pcrs: Pcrs


class Credential(Document, frozen=True):
    """A share that only one EK can open for one named key (TPM2_MakeCredential): TPM2B contents, without sizes."""

    blob: Blob
    secret: Blob


class Endorsement(Document, frozen=True):
    """Why the vendor believed the EK: `certificate` under a chosen root, or `recorded` by hand."""

    basis: Literal["certificate", "recorded"]
    root: Annotated[str, msgspec.Meta(max_length=500)]
    root_class: Literal["discrete", "firmware", "virtual", "unknown"]


class TpmBinding(Document, frozen=True, tag="tpm", tag_field="kind"):
    """A member secret sealed to one TPM. Keys are given by Name (algorithm identifier and digest).

    `policy_key` is the TPMT_PUBLIC of the vendor's approval key and `platform` the 32-byte policy reference of
    product and generation; both are null where the terms ask for no PCRs.
    """

    storage_root_key: Blob
    attestation_key: Blob
    endorsement_key: Blob
    endorsement: Endorsement
    public: Blob
    duplicate: Blob
    seed: Blob
    storage_credential: Credential
    attestation_credential: Credential
    policy_key: Blob | None
    platform: Digest | None
    pin: bool


Uri = Annotated[str, msgspec.Meta(max_length=1000)]
Check = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Mechanism = Literal["ecdh", "rsa-oaep-sha256", "rsa-oaep-sha1"]
"""How a token holds a member secret: CKM_ECDH1_DERIVE with P-256, or CKM_RSA_PKCS_OAEP (PKCS#11 v2.40 mechanisms)."""


class TokenEvidence(Document, frozen=True, tag="pkcs11", tag_field="kind"):
    """What a PKCS#11 token says of itself. It *is* the public key that it holds, a SubjectPublicKeyInfo (DER).

    `uri` (RFC 7512, path attributes alone) helps to find it, and `pin` says whether the key needs a login. Certificates
    (X.509, DER) are those on the token that may attest the key.
    """

    uri: Uri
    key: Blob
    mechanism: Mechanism
    pin: bool
    certificates: Annotated[list[Blob], msgspec.Meta(max_length=8)]


class TokenBinding(Document, frozen=True, tag="pkcs11", tag_field="kind"):
    """A member secret that takes one token's private key to learn.

    `encapsulated` is an ephemeral P-256 point (65 bytes, uncompressed) or an RSA ciphertext; `check` confirms the
    secret, so that a lying module is told from a damaged license.
    """

    uri: Uri
    key: Blob
    mechanism: Mechanism
    endorsement: Endorsement
    encapsulated: Blob
    check: Check
    pin: bool


Product = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{4}:[0-9a-f]{4}$")]
Serial = Annotated[str, msgspec.Meta(max_length=64)]
ANSWER_LIMIT: Final = 16384
BINDING_LIMIT: Final = 8
VERIFIER_SIZE: Final = 8


class UsbEvidence(Document, frozen=True, tag="usb", tag_field="kind"):
    """A USB dongle that answers challenges by HMAC-SHA1. `dongle` is made from its answer to one fixed challenge.

    `product` is vendor and product id in hex, `touch` whether it answers only when touched.
    """

    dongle: Identifier
    product: Product
    serial: Serial | None
    firmware: Annotated[str, msgspec.Meta(max_length=64)]
    slot: Literal[1, 2]
    touch: bool


class UsbBinding(Document, frozen=True, tag="usb", tag_field="kind"):
    """A member secret made from a dongle's answer to one challenge: number `first` of those that `seed` gives.

    `check` confirms the answer. `answers` holds 8 bytes for each of the challenges that follow, by which the device
    knows the dongle's answers without being able to give them: proofs of presence.
    """

    dongle: Identifier
    product: Product
    serial: Serial | None
    slot: Literal[1, 2]
    touch: bool
    seed: Digest
    first: Count
    check: Check
    answers: Annotated[bytes, msgspec.Meta(max_length=ANSWER_LIMIT * VERIFIER_SIZE)]

    @property
    def pin(self) -> bool:
        """A dongle asks for none."""
        return False


Evidence = TpmEvidence | TokenEvidence | UsbEvidence
Binding = TpmBinding | TokenBinding | UsbBinding


# ---- terms -----------------------------------------------------------------------------------------------


class Presence(Document, frozen=True):
    """How often the hardware must prove that it is here, in seconds.

    `grace`: seconds of absence that are bridged, in all. `regain`: seconds of proven presence that give all of it back;
    null: none comes back. `repeat`: whether a dongle's recorded answers may serve again when all were used once.
    """

    interval: Annotated[int, msgspec.Meta(ge=1, le=86400)]
    grace: Annotated[int, msgspec.Meta(ge=0, le=31 * 86400)]
    regain: Positive | None
    repeat: bool


# ---- the signed documents --------------------------------------------------------------------------------


class Request(Document, frozen=True):
    """What a device tells the vendor. Signed by its hardware: a TPM by TPM2_Quote over the digest of the document."""

    schema: int
    created: datetime.date
    device: Annotated[str, msgspec.Meta(max_length=200)]
    hardware: Annotated[list[Evidence], msgspec.Meta(min_length=1, max_length=8)]


class PackageReference(Document, frozen=True):
    """The package that a license opens: its name and version for people, its content key for the loader."""

    name: Name
    version: Name
    content_key: Identifier


class Grant(Document, frozen=True, omit_defaults=True):
    """Who, what and under which terms. Its digest enters every key that the license wraps.

    Both dates count in UTC and inclusively: `not_after` is the last day on which the license opens. Terms at the end
    are left out of the encoding where they are not asked for: grants from before such terms stay as they are.
    `continuity` is the longest session that is kept from interruption, in seconds.
    """

    license: Identifier
    revision: Positive
    vendor: Fingerprint
    licensee: Name
    product: Name
    generation: Generation
    packages: Annotated[list[PackageReference], msgspec.Meta(min_length=1, max_length=100)]
    issued: datetime.date
    not_before: datetime.date | None
    not_after: datetime.date | None
    pcrs: Annotated[list[Name], msgspec.Meta(max_length=8)]
    presence: Presence | None = None
    continuity: Positive | None = None


class SecretWrap(Document, frozen=True):
    """The license secret for one subset of the bindings, given by their places in the list."""

    members: Annotated[list[Count], msgspec.Meta(min_length=1, max_length=8)]
    wrapped: Annotated[bytes, msgspec.Meta(min_length=48, max_length=48)]


class ContentKeyWrap(Document, frozen=True):
    """A content key under the license secret and the digest of the grant."""

    content_key: Identifier
    wrapped: Annotated[bytes, msgspec.Meta(min_length=48, max_length=48)]


class Approval(Document, frozen=True):
    """A platform state that the vendor approves for a product line, in a form that the TPM itself checks.

    `signature` is the TPMT_SIGNATURE by the policy key over policy digest and policy reference.
    """

    schema: int
    vendor: Fingerprint
    product: Name
    generation: Generation
    pcrs: Annotated[list[Pcr], msgspec.Meta(min_length=1, max_length=48)]
    policy: Digest
    signature: Blob


class License(Document, frozen=True):
    """A grant for one device, the hardware that holds its secret, and what that secret opens."""

    schema: int
    grant: Grant
    bindings: Annotated[list[Binding], msgspec.Meta(min_length=1, max_length=8)]
    need: Positive
    wraps: Annotated[list[SecretWrap], msgspec.Meta(min_length=1, max_length=100)]
    keys: Annotated[list[ContentKeyWrap], msgspec.Meta(min_length=1, max_length=100)]
    approvals: Annotated[list[Approval], msgspec.Meta(max_length=100)]


class Member(Document, frozen=True):
    """A file of the package. `size` counts bytes of plaintext; `digests` is one digest per chunk of ciphertext."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
    size: Count
    digests: bytes


class Manifest(Document, frozen=True):
    """What a package holds, in its order. `table` is the digest of the encrypted table of chunk keys."""

    schema: int
    name: Name
    version: Name
    vendor: Fingerprint
    content_key: Identifier
    wrapped_content_key: Blob
    algorithm: Literal["blake3", "sha256"]
    chunk_size: Annotated[int, msgspec.Meta(ge=4096, le=1 << 26)]
    table: Digest
    members: Annotated[list[Member], msgspec.Meta(min_length=1, max_length=100_000)]


class VendorPublic(Document, frozen=True):
    """`vendor.pub.json`: the keys of one vendor, as SubjectPublicKeyInfo (DER). The application's root of trust."""

    schema: int
    name: Name
    classical: Blob
    ml_dsa_65: Blob
    policy: Blob

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the document, in hex: what other documents name this vendor by."""
        return hashlib.sha256(encode(self)).hexdigest()


# ---- encoding --------------------------------------------------------------------------------------------

D = TypeVar("D", bound=msgspec.Struct)

PAYLOAD_TYPES: Final[dict[type[Document], str]] = {
    kind: f"application/vnd.hwlicense.{kind.__name__.lower()}+json" for kind in (Request, License, Approval, Manifest)
}

SIZE_LIMITS: Final[dict[type[msgspec.Struct], int]] = {Manifest: 64 << 20}
"""Bytes of a payload, where 1 MiB is not enough: 64 MiB of manifest describe about a tebibyte of model."""

DEFAULT_SIZE_LIMIT: Final = 1 << 20

FILE_LIMIT: Final = 4 << 20
"""Bytes of any file of the project but a package: an envelope is a third longer than its payload."""

COPY_AGAIN: Final = "Copy the file again from where it was made; it must not be edited."


def encode(document: msgspec.Struct) -> bytes:
    """The one encoding of a document."""
    return msgspec.json.encode(document)


def check(document: Document) -> None:
    """Refuse to make what `decode` would refuse to read. Raises UsageError."""
    try:
        decode(encode(document), type(document))
    except (DamagedError, UnicodeEncodeError) as error:
        why = error.what if isinstance(error, DamagedError) else "A text is not in UTF-8."
        what = f"The {_title(type(document))} cannot be made. {why}"
        raise UsageError(Reason.USAGE, what, "Names have 1 to 200 characters; lists have the limits shown.") from None


def decode(raw: bytes, kind: type[D], *, spaced: bool = False) -> D:
    """Decode `raw` strictly. `spaced` lets through white space between tokens, for files that people edit.

    Raises DamagedError: DOCUMENT_TOO_LARGE, SCHEMA_UNSUPPORTED, DOCUMENT_MALFORMED.
    """
    what = _title(kind)
    limit = SIZE_LIMITS.get(kind, DEFAULT_SIZE_LIMIT)
    if len(raw) > limit:
        raise DamagedError(
            Reason.DOCUMENT_TOO_LARGE, f"The {what} is larger than {limit:,} bytes.", "Check the file's name."
        )
    try:
        if spaced:
            raw = msgspec.json.format(raw.strip(), indent=-1)
        version = msgspec.json.decode(raw, type=_Schema).schema
        if version != SCHEMA:
            raise DamagedError(
                Reason.SCHEMA_UNSUPPORTED,
                f"The {what} has schema {version}; this release reads schema {SCHEMA}.",
                "Use a release of hwlicense that knows this schema.",
            )
        document = msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedError(
            Reason.DOCUMENT_MALFORMED,
            f"The {what} does not fit its schema: {error}.",
            COPY_AGAIN,
        ) from None
    if encode(document) != raw:  # duplicate keys, other spacing and other spellings of one value
        raise DamagedError(
            Reason.DOCUMENT_MALFORMED,
            f"The {what} is not in its one encoding (duplicate keys, odd spacing or base64).",
            COPY_AGAIN,
        )
    return document


class _Schema(msgspec.Struct):
    schema: int = SCHEMA


def prepare(*kinds: type[msgspec.Struct]) -> None:
    """Have msgspec learn these types now. Modules call it as they are imported, which one thread at a time does.

    Left to the first decoding, two threads that come at once crash the process (msgspec 0.22).
    """
    for kind in kinds:
        msgspec.json.Decoder(kind)


prepare(Request, License, Approval, Manifest, VendorPublic, _Schema)


def _title(kind: type[msgspec.Struct]) -> str:
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in kind.__name__).strip()


def grant_digest(grant: Grant) -> bytes:
    """SHA-256 of the encoded grant, 32 bytes."""
    return hashlib.sha256(encode(grant)).digest()
