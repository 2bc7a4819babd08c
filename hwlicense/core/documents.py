"""The schemas of the documents that vendor and device exchange."""

# Annotations are no texts here (`from __future__`): msgspec would compile each of them as this module is imported.

import datetime
import hashlib
from typing import Annotated, Final, Literal

import msgspec

from hwlicense.core.code import ENTRY, VERSION
from hwlicense.core.limits import Use
from hwlicense.core.process import Application, Guard
from hwlicense.core.schema import (
    SIZE_LIMITS,
    Blob,
    Count,
    Digest,
    Document,
    Fingerprint,
    Generation,
    Identifier,
    Name,
    Positive,
    encode,
    prepare,
)

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


NvHandle = Annotated[int, msgspec.Meta(ge=0x01800000, le=0x01BFFFFF)]
"""An NV index of the owner (TCG Registry of Reserved TPM 2.0 Handles, 2.2.2)."""


class TpmCounter(Document, frozen=True):
    """The NV counter of a license, and a value of it: in a request the present one, which is odd; in a license the even
    one at which it opens.
    """

    handle: NvHandle
    value: Positive


class TpmIndex(Document, frozen=True):
    """An NV index of type PIN_PASS: counts opens, or steps of the ledger's anchor, up to `limit`.

    `write` is the TPMT_SIGNATURE of the policy key that lets count 0 and limit be written once in this revision, under
    the policy reference `reference`: purpose, vendor, license and value of the counter.
    """

    purpose: Literal["opens", "anchor"]
    handle: NvHandle
    limit: Annotated[int, msgspec.Meta(ge=1, lt=2**32)]
    reference: Digest
    write: Blob


class TpmEvidence(Document, frozen=True, tag="tpm", tag_field="kind", omit_defaults=True):
    """What a TPM says of itself. Public areas are TPMT_PUBLIC (TPM 2.0 Part 2, 12.2.4).

    `counter` was made for a license that is counted; the handles that follow its own are free for the indexes.
    """

    manufacturer: Annotated[str, msgspec.Meta(max_length=64)]
    firmware: Annotated[str, msgspec.Meta(max_length=64)]
    endorsement_keys: Annotated[list[EndorsementKey], msgspec.Meta(min_length=1, max_length=8)]
    storage_root_key: Blob
    attestation_key: Blob
    pcrs: Pcrs
    counter: TpmCounter | None = None


class Credential(Document, frozen=True):
    """A share that only one EK can open for one named key (TPM2_MakeCredential): TPM2B contents, without sizes."""

    blob: Blob
    secret: Blob


class Endorsement(Document, frozen=True):
    """Why the vendor believed the EK: `certificate` under a chosen root, or `recorded` by hand."""

    basis: Literal["certificate", "recorded"]
    root: Annotated[str, msgspec.Meta(max_length=500)]
    root_class: Literal["discrete", "firmware", "virtual", "unknown"]


class TpmBinding(Document, frozen=True, tag="tpm", tag_field="kind", omit_defaults=True):
    """A member secret sealed to one TPM. Keys are given by Name (algorithm identifier and digest).

    `policy_key` is the TPMT_PUBLIC of the vendor's approval key, null where nothing is asked of it; `platform` is the
    32-byte policy reference of product and generation, null where the terms ask for no PCRs. `deadline` is the TPM's
    clock, in milliseconds, from which on it opens nothing; `cap` the PCR (sha256) that ends a boot's write window.
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
    counter: TpmCounter | None = None
    indexes: Annotated[list[TpmIndex], msgspec.Meta(max_length=2)] = msgspec.field(default_factory=list)
    deadline: Positive | None = None
    cap: Annotated[int, msgspec.Meta(ge=0, le=23)] | None = None


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
    use: Use | None = None
    guard: Guard | None = None
    application: Application | None = None

    @property
    def terms_of_use(self) -> Use:
        """`use`, or none of its limits."""
        return self.use or Use()


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


class ClockReset(Document, frozen=True):
    """The vendor's word for what time it is, for one license whose device has remembered a time that was wrong.

    `time` is in seconds since 1970, UTC. A device takes in one that is later than those that it has taken in.
    """

    schema: int
    vendor: Fingerprint
    license: Identifier
    time: Positive


ENCLOSURE_LIMIT: Final = 64 << 10


class License(Document, frozen=True, omit_defaults=True):
    """A grant for one device, the hardware that holds its secret, and what that secret opens.

    `enclosure` is ciphertext: up to 64 KiB for the application, of this license alone, and a tag of 16 bytes.
    """

    schema: int
    grant: Grant
    bindings: Annotated[list[Binding], msgspec.Meta(min_length=1, max_length=8)]
    need: Positive
    wraps: Annotated[list[SecretWrap], msgspec.Meta(min_length=1, max_length=100)]
    keys: Annotated[list[ContentKeyWrap], msgspec.Meta(min_length=1, max_length=100)]
    approvals: Annotated[list[Approval], msgspec.Meta(max_length=100)]
    enclosure: Annotated[bytes, msgspec.Meta(max_length=ENCLOSURE_LIMIT + 16)] = b""


class Member(Document, frozen=True):
    """A file of the package. `size` counts bytes of plaintext; `digests` is one digest per chunk of ciphertext."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
    size: Count
    digests: bytes


class Code(Document, frozen=True):
    """The Python code of a package: where its program begins, if it is one, and the versions of Python it is for."""

    entry: Annotated[str, msgspec.Meta(max_length=400, pattern=ENTRY)] | None
    versions: Annotated[list[Annotated[str, msgspec.Meta(pattern=VERSION)]], msgspec.Meta(min_length=1, max_length=20)]


class Manifest(Document, frozen=True, omit_defaults=True):
    """What a package holds, in its order. `table` is the digest of the encrypted table of chunk keys.

    `code` is left out of the encoding where there is none: manifests from before it stay as they are.
    """

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
    code: Code | None = None


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


PAYLOAD_TYPES: Final[dict[type[Document], str]] = {
    kind: f"application/vnd.hwlicense.{kind.__name__.lower()}+json"
    for kind in (Request, License, Approval, Manifest, ClockReset)
}
SIZE_LIMITS[Manifest] = 64 << 20  # 64 MiB of manifest describe about a tebibyte of model

prepare(Request, License, Approval, Manifest, ClockReset, VendorPublic)


def grant_digest(grant: Grant) -> bytes:
    """SHA-256 of the encoded grant, 32 bytes."""
    return hashlib.sha256(encode(grant)).digest()
