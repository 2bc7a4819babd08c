"""Signed logs: recordings of records in a hash chain, under keys that hardware certified and that do not outlive it.

A recording is a sequence of lines, each one record in its one JSON encoding. A record holds the SHA-256 of the line
before. Start, checkpoints, heartbeats and the end are signed (Ed25519); each but the end names the key of the next
signature, and the key that made it is gone by then. So who takes the process over can write what it likes from then
on, and cannot change what a checkpoint closed before. Times are in microseconds, of the wall clock and since the boot.
"""

from __future__ import annotations

import hashlib
from collections import deque
from typing import Annotated, Final, NamedTuple

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from hwlicense.core.documents import Pcrs  # noqa: TC001  # msgspec reads the annotations at run time
from hwlicense.core.envelope import classical_key, classical_verifier, pre_authentication_encoding
from hwlicense.core.errors import ClosedError, DamagedError, Reason, UsageError
from hwlicense.core.schema import (
    SCHEMA,
    Blob,
    Count,
    Digest,
    Document,
    Fingerprint,
    Identifier,
    Name,
    Positive,
    encode,
    prepare,
)

PAYLOAD_LIMIT: Final = 64 << 10
"""Bytes of one payload."""

LINE_LIMIT: Final = 128 << 10
"""Bytes of one line: a payload in base64 and the rest, or the largest start."""

NOTHING: Final = bytes(32)
"""What the first record of the first recording follows."""

Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
"""A raw Ed25519 public key (RFC 8032)."""

Signed = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]

# ---- what hardware certifies -----------------------------------------------------------------------------


class Statement(Document, frozen=True):
    """What a recording begins with: whose it is, which, and its first key.

    `recording` counts those of a log, from 1. `previous` is the digest of the last record that was there of the one
    before. `boot` is the kernel's identifier of this boot, `heartbeat` the seconds after which silence is broken.
    `steps` is the count of the license's anchor, null where it has none. `sensors` are keys of sensors that sign what
    they give (SubjectPublicKeyInfo, DER), by their names.
    """

    schema: int
    vendor: Fingerprint
    license: Identifier
    revision: Positive
    package: Identifier
    log: Name
    recording: Positive
    previous: Digest
    key: Key
    boot: Identifier
    heartbeat: Annotated[int, msgspec.Meta(ge=1, le=86400)]
    steps: Count | None
    sensors: Annotated[dict[Name, Blob], msgspec.Meta(max_length=16)]


class Closing(Document, frozen=True):
    """What a recording ends with: its start, the last record before the end, and how many there are before the end."""

    schema: int
    start: Digest
    head: Digest
    count: Positive


class TpmCertificate(Document, frozen=True, tag="tpm", tag_field="by"):
    """A quote (TPM2B_ATTEST, TPMT_SIGNATURE) over a statement, with the PCRs that the license names."""

    attestation_key: Blob
    pcrs: Pcrs
    quote: Blob


class TokenCertificate(Document, frozen=True, tag="pkcs11", tag_field="by"):
    """A signature (ECDSA, SHA-256, DER) over a statement by the token's key, which the license names."""

    key: Blob
    signature: Annotated[bytes, msgspec.Meta(max_length=80)]


Certificate = TpmCertificate | TokenCertificate


def certified_bytes(statement: Statement | Closing) -> bytes:
    """The bytes that hardware certifies: no other document of the project is encoded like them."""
    kind = f"application/vnd.hwlicense.{type(statement).__name__.lower()}+json"
    return pre_authentication_encoding(kind, encode(statement))


# ---- records ---------------------------------------------------------------------------------------------


class Record(Document, frozen=True, omit_defaults=True, tag_field="kind"):
    """What every record has."""

    number: Count
    previous: Digest
    wall: Count
    boot: Count


class Start(Record, frozen=True, tag="start"):
    """Number 0. Signed by the statement's key."""

    statement: Statement
    certificate: Certificate
    signature: Signed


class SensorSignature(Document, frozen=True):
    """A sensor's signature over an input, which was verified when the record was made."""

    sensor: Name
    signature: Annotated[bytes, msgspec.Meta(max_length=80)]


class _Content(Record, frozen=True, omit_defaults=True):
    json: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    data: Annotated[bytes, msgspec.Meta(max_length=PAYLOAD_LIMIT)] | None = None
    input: Digest | None = None
    sensor: SensorSignature | None = None


class Output(_Content, frozen=True, omit_defaults=True, tag="record"):
    """What the application gave: JSON or bytes, with the SHA-256 of the input that it came from."""


class Input(_Content, frozen=True, omit_defaults=True, tag="input"):
    """What the application took in, by its SHA-256, with what there is to say of it."""


class Checkpoint(Record, frozen=True, tag="checkpoint"):
    """Closes what is before it. `key` is that of the next signature."""

    key: Key
    signature: Signed


class Heartbeat(Record, frozen=True, tag="heartbeat"):
    """A checkpoint in silence."""

    key: Key
    signature: Signed


class Gap(Record, frozen=True, tag="gap"):
    """So many records were given and not taken, for lack of room."""

    dropped: Positive


class Part(Record, frozen=True, tag="part"):
    """The first line of each further file of a recording: which it is, and the digest of the recording's start."""

    part: Positive
    start: Digest


class End(Record, frozen=True, tag="end"):
    """The last record. Where the hardware was not there to certify it, `refusal` is the reason."""

    certificate: Certificate | None
    refusal: Annotated[str, msgspec.Meta(max_length=64)] | None
    signature: Signed


AnyRecord = Start | Output | Input | Checkpoint | Heartbeat | Gap | Part | End
_DECODER: Final[msgspec.json.Decoder[AnyRecord]] = msgspec.json.Decoder(AnyRecord)
prepare(Statement, Closing)


def digest(line: bytes) -> bytes:
    """SHA-256 of a line without its newline, 32 bytes."""
    return hashlib.sha256(line).digest()


def parse(line: bytes) -> AnyRecord:
    """A line without its newline. Raises DamagedError OUTPUTS_DAMAGED for anything but the one encoding of a record."""
    problem = "it is too long"
    if not line:
        problem = "it is empty; an editor may have added it"
    elif line.endswith(b"\r"):
        problem = "it ends in CRLF; an editor, or a transfer in text mode, changed the file"
    elif len(line) <= LINE_LIMIT:
        try:
            record = _DECODER.decode(line)
            problem = _oddity(record, line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            problem = str(error)
        else:
            if not problem:
                return record
    raise DamagedError(Reason.OUTPUTS_DAMAGED, f"The line is no record: {problem}.", "Get the file again.")


def _oddity(record: AnyRecord, line: bytes) -> str:
    if encode(record) != line:
        return "it is not in its one encoding"
    if isinstance(record, Start) and record.statement.schema != SCHEMA:
        return f"it has schema {record.statement.schema}, and this release reads schema {SCHEMA}"
    if isinstance(record, _Content):
        if isinstance(record.json, msgspec.Raw) and not plain_json(bytes(record.json)):
            return "its payload is not in its one encoding"
        if isinstance(record.json, msgspec.Raw) and record.data is not None:
            return "it has two payloads"
        if record.sensor is not None and record.input is None:
            return "it has a sensor's signature and no input"
    return ""


def plain_json(raw: bytes) -> bool:
    """Whether this is JSON in the encoding that records have."""
    try:
        return len(raw) <= PAYLOAD_LIMIT and msgspec.json.encode(msgspec.json.decode(raw)) == raw
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def signed_bytes(record: Start | Checkpoint | Heartbeat | End) -> bytes:
    """What is signed: the record with an empty signature. With `previous` it covers all that is before it."""
    return b"hwlicense 1 record " + encode(msgspec.structs.replace(record, signature=b""))


def check_signature(key: bytes, record: Start | Checkpoint | Heartbeat | End) -> None:
    """Raises cryptography's InvalidSignature."""
    ed25519.Ed25519PublicKey.from_public_bytes(key).verify(record.signature, signed_bytes(record))


# ---- making a recording ----------------------------------------------------------------------------------


class Link(NamedTuple):
    """A record that was made, and all that the next one takes: so a chain grows in one step, or not at all.

    `number` and `head` are of the next record; `total` counts bytes of all lines, `closed` records under signatures.
    """

    line: bytes
    part: int
    number: int
    head: bytes
    total: int
    closed: int
    key: ed25519.Ed25519PrivateKey | None


class Chain:
    """One recording as it is made. Not safe for threads but `take`; a signal that interrupts it leaves it whole."""

    def __init__(self, previous: bytes) -> None:
        self._links = deque([Link(b"", 0, 0, previous, 0, 0, ed25519.Ed25519PrivateKey.generate())])
        self.start = NOTHING

    @property
    def last(self) -> Link:
        """Where the chain is."""
        return self._links[-1]

    @property
    def key(self) -> bytes:
        """The public half of the key that signs next. Raises ClosedError after the end."""
        return self._key(self.last).public_key().public_bytes_raw()

    def take(self) -> list[Link]:
        """The links that were not taken yet, without their keys. The chain forgets them but for its last.

        For one thread, while another makes records: that only adds at the other end.
        """
        taken = list[Link]()
        while len(self._links) > 1:
            self._links.popleft()
            taken.append(Link(*self._links[0][:-1], None))
        return taken

    def begin(self, statement: Statement, certificate: Certificate, wall: int, boot: int) -> None:
        """The start, which the statement about `key` begins."""
        self._sign(Start(0, statement.previous, wall, boot, statement, certificate, b""), self._key(self.last), 1)
        self.start = self.last.head

    def add(
        self,
        kind: type[Output | Input],
        wall: int,
        boot: int,
        *,
        json: bytes | None = None,
        data: bytes | None = None,
        input: bytes | None = None,  # noqa: A002  # as the record's field
        sensor: SensorSignature | None = None,
    ) -> None:
        """What the application gave. Its sizes and sensor were checked."""
        last, raw = self._links[-1], msgspec.UNSET if json is None else msgspec.Raw(json)
        self._add(encode(kind(last.number, last.head, wall, boot, raw, data, input, sensor)))

    def gap(self, dropped: int, wall: int, boot: int) -> None:
        """So many were dropped."""
        self._add(encode(Gap(self.last.number, self.last.head, wall, boot, dropped)))

    def begin_part(self, part: int, wall: int, boot: int) -> None:
        """Go on in another file."""
        self._add(encode(Part(self.last.number, self.last.head, wall, boot, part, self.start)), part)

    def close_until_now(self, kind: type[Checkpoint | Heartbeat], wall: int, boot: int) -> None:
        """Sign all that is there. From here on another key signs, and this one goes with the links that are taken."""
        last, following = self.last, ed25519.Ed25519PrivateKey.generate()
        public = following.public_key().public_bytes_raw()
        self._sign(kind(last.number, last.head, wall, boot, public, b""), following)

    def closing(self) -> Closing:
        """What the hardware certifies at the end."""
        return Closing(SCHEMA, self.start, self.last.head, self.last.number)

    def end(self, certificate: Certificate | None, refusal: str | None, wall: int, boot: int) -> None:
        """The last record. No key is left."""
        self._sign(End(self.last.number, self.last.head, wall, boot, certificate, refusal, b""), None)

    def _sign(
        self,
        record: Start | Checkpoint | Heartbeat | End,
        following: ed25519.Ed25519PrivateKey | None,
        part: int = 0,
    ) -> None:
        last, signature = self.last, self._key(self.last).sign(signed_bytes(record))
        line = encode(msgspec.structs.replace(record, signature=signature))
        number = last.number + 1
        self._links.append(Link(line, part, number, digest(line), last.total + len(line) + 1, number, following))

    def _add(self, line: bytes, part: int = 0) -> None:
        _, _, number, _, total, closed, key = self._links[-1]
        self._links.append(Link(line, part, number + 1, digest(line), total + len(line) + 1, closed, key))

    @staticmethod
    def _key(last: Link) -> ed25519.Ed25519PrivateKey:
        if last.key is None:
            raise ClosedError(Reason.MODEL_CLOSED, "The recording has ended.", "Begin another one: model.outputs().")
        return last.key


# ---- sensors ---------------------------------------------------------------------------------------------


class Sensor:
    """A sensor that signs what it gives, by its public key: Ed25519 over the input, or ECDSA P-256 with SHA-256."""

    def __init__(self, name: str, public: bytes) -> None:
        """Raises UsageError for another kind of key (SubjectPublicKeyInfo, DER)."""
        self.name, self._key = name, classical_key(public)
        if self._key is None:
            what = f"The key of the sensor {name!r} is neither Ed25519 nor P-256."
            raise UsageError(Reason.USAGE, what, "Give its public key as SubjectPublicKeyInfo (DER).")
        self._verify = classical_verifier(public)

    def check(self, content: bytes, signature: bytes) -> SensorSignature:
        """Raises DamagedError SIGNATURE_INVALID."""
        try:
            self._verify(signature, content)
        except InvalidSignature:
            what = f"The input was not signed by the sensor {self.name!r}."
            raise DamagedError(Reason.SIGNATURE_INVALID, what, "Discard it, and look at the sensor.") from None
        return SensorSignature(self.name, signature)

    def checked_again(self, input_digest: bytes, signature: bytes) -> bool | None:
        """Whether the signature fits the input's SHA-256. None for Ed25519, which takes the input itself."""
        if not isinstance(self._key, ec.EllipticCurvePublicKey):
            return None
        try:
            self._key.verify(signature, input_digest, ec.ECDSA(Prehashed(hashes.SHA256())))
        except InvalidSignature:
            return False
        return True
