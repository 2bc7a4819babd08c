"""The package: format, layout and cipher, version 1. No I/O here.

A package (`.hwpkg`) is, without gaps, and ends with its last chunk:

    offset  bytes
    0       8      magic: `hwpkg`, 0, the format version (1), a newline
    8       8      E, the length of the envelope: unsigned, little-endian, at most 96 MiB
    16      E      the envelope: DSSE (JSON), signed by the vendor, its payload the manifest
    16+E    32*C+16  the key table: C chunk keys in order, encrypted
    ...            the chunks' ciphertext: member by member in the manifest's order, each chunk with its tag (16 bytes)

A member of S bytes has ceil(S / chunk_size) chunks, all of chunk_size bytes but the last; an empty member has none.
C counts the chunks of all members.

Each chunk has a random key of 32 bytes that serves for this chunk alone, so AES-256-GCM (NIST SP 800-38D) runs with a
nonce of 12 zeros: a nonce needs to differ only between uses of one key. The associated data of a chunk is
`hwlicense chunk 1`, its plaintext length (u32, little-endian), and 1 if it is its member's last, else 0 (u8).

The key table is encrypted in the same way, under HKDF-SHA256 (RFC 5869) of the content key without salt, with the info
`hwlicense 1 `, 9 (u32, big-endian), `key table`. A content key is drawn afresh for each package, so this key too serves
once. The associated data is `hwlicense key table 1` and C (u64, little-endian). None of it depends on the manifest,
which depends on the ciphertext.

The manifest holds the digest (BLAKE3 with 32 bytes, or SHA-256, as `algorithm` says) of the table's ciphertext and, in
`digests` of each member, of every chunk's ciphertext, tags included. Hence anyone can verify a package without a key,
who holds the content key still cannot change a byte, and an unchanged chunk can move into another package with its key.
"""

from __future__ import annotations

import hashlib
import hmac
import unicodedata
from typing import TYPE_CHECKING, Final, Literal, Protocol

import msgspec
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hwlicense.core import code
from hwlicense.core.errors import DamagedError, Reason, UsageError
from hwlicense.core.keys import NONCE, TAG_SIZE
from hwlicense.core.secret import SIZE, Secret, derive

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hwlicense.core.documents import Manifest, Member

    Algorithm = Literal["blake3", "sha256"]
    Bytes = bytes | bytearray | memoryview

VERSION: Final = 1
MAGIC: Final = b"hwpkg\x00" + bytes([VERSION]) + b"\n"
HEADER_SIZE: Final = 16
ENVELOPE_LIMIT: Final = 96 << 20
DIGEST_SIZE: Final = 32
DEFAULT_CHUNK_SIZE: Final = 1 << 20
COPY_AGAIN: Final = "Copy the package again from where it was made, and compare its size and checksum."


class Readable(Protocol):
    """Bytes at any place; `read` gives fewer than it was asked for only at the end."""

    @property
    def size(self) -> int: ...  # noqa: D102
    def read(self, size: int, offset: int) -> bytes: ...  # noqa: D102


class Chunk(msgspec.Struct, frozen=True):
    """Where one chunk lies in the package: `key` is its place in the key table, `size` its plaintext's."""

    key: int
    offset: int
    size: int
    last: bool
    digest: bytes

    @property
    def sealed_size(self) -> int:
        """Bytes of ciphertext and tag."""
        return self.size + TAG_SIZE


class Layout:
    """Where everything lies in a package whose manifest was verified. Raises DamagedError PACKAGE_DAMAGED."""

    def __init__(self, manifest: Manifest, envelope_size: int, file_size: int) -> None:
        check_manifest(manifest)
        self.manifest = manifest
        self.members = {member.name: member for member in manifest.members}
        self.names = tuple(name for name in self.members if not code.reserved(name))
        self.chunk_count = sum(len(member.digests) for member in manifest.members) // DIGEST_SIZE
        self.table_offset = HEADER_SIZE + envelope_size
        self.table_size = self.chunk_count * SIZE + TAG_SIZE
        self._starts: dict[str, tuple[int, int]] = {}
        key, offset = 0, self.table_offset + self.table_size
        for member in manifest.members:
            self._starts[member.name] = key, offset
            count = self.count(member)
            key, offset = key + count, offset + member.size + count * TAG_SIZE
        self.size = offset
        if file_size != self.size:
            raise damaged(f"The package has {file_size:,} bytes; its manifest describes {self.size:,}.")

    def count(self, member: Member) -> int:
        """Chunks of a member."""
        return chunk_count(member.size, self.manifest.chunk_size)

    def chunk(self, member: Member, index: int) -> Chunk:
        """The member's chunk `index`, from 0."""
        step, (key, offset) = self.manifest.chunk_size, self._starts[member.name]
        size = min(step, member.size - index * step)
        digest = member.digests[index * DIGEST_SIZE : (index + 1) * DIGEST_SIZE]
        last = index + 1 == self.count(member)
        return Chunk(key + index, offset + index * (step + TAG_SIZE), size, last, digest)


# ---- header and manifest ---------------------------------------------------------------------------------


def header(envelope: bytes) -> bytes:
    """The 16 bytes before an envelope."""
    return MAGIC + len(envelope).to_bytes(8, "little")


def envelope_of(file: Readable) -> bytes:
    """The envelope in a package, its signatures unread. Nothing is allocated before its length is found credible.

    Raises DamagedError PACKAGE_DAMAGED, SCHEMA_UNSUPPORTED.
    """
    start = file.read(HEADER_SIZE, 0)
    if len(start) < HEADER_SIZE or start[:6] != MAGIC[:6] or start[7:8] != MAGIC[7:]:
        raise DamagedError(Reason.PACKAGE_DAMAGED, "The file is not a package of hwlicense.", "Check the file's name.")
    if start[6] != VERSION:
        what = f"The package has format version {start[6]}; this release reads version {VERSION}."
        raise DamagedError(Reason.SCHEMA_UNSUPPORTED, what, "Use a release of hwlicense that knows this version.")
    size = int.from_bytes(start[8:], "little")
    if size > min(ENVELOPE_LIMIT, file.size - HEADER_SIZE):
        raise damaged("The package's header gives a length that the file does not have.")
    envelope = file.read(size, HEADER_SIZE)
    if len(envelope) != size:
        raise damaged("The package was cut while it was read.")
    return envelope


def check_manifest(manifest: Manifest) -> None:
    """Refuse a manifest that contradicts itself. Raises DamagedError PACKAGE_DAMAGED."""
    if fault := _fault([member.name for member in manifest.members]) or code.fault(manifest):
        raise damaged(f"The manifest is wrong: {fault}.")
    for member in manifest.members:
        if len(member.digests) != chunk_count(member.size, manifest.chunk_size) * DIGEST_SIZE:
            raise damaged(f"The manifest is wrong: size and digests of {member.name!r} disagree.")


def check_names(names: Sequence[str]) -> None:
    """Refuse names that a package cannot hold. Raises UsageError MEMBER_NAME."""
    if fault := _fault(names):
        raise UsageError(
            Reason.MEMBER_NAME, f"The package cannot hold this: {fault}.", "Rename the file, or leave it out."
        )


def chunk_count(size: int, chunk_size: int) -> int:
    """Chunks of a member of `size` bytes."""
    return -(-size // chunk_size)


def _fault(names: Sequence[str]) -> str:
    """What is wrong with these names, or nothing.

    Names that differ only in case or in how letters are composed would be one file elsewhere, so they are refused.
    """
    taken: dict[str, str] = {}
    for name in names:
        if fault := _name_fault(name):
            return f"{name!r} {fault}"
        folded = unicodedata.normalize("NFC", name.casefold())
        if folded in taken:
            other = "is there twice" if taken[folded] == name else f"and {taken[folded]!r} are one name but for case"
            return f"{name!r} {other}"
        taken[folded] = name
    for folded, name in taken.items():
        for folder in _folders(folded):
            if folder in taken:
                return f"{taken[folder]!r} is a file and also the folder of {name!r}"
    return ""


def _name_fault(name: str) -> str:
    if not name or len(name) > 1000:  # noqa: PLR2004  # the schema's limit, in characters
        return "is empty or longer than 1,000 characters"
    if any(unicodedata.category(letter) in {"Cc", "Cs", "Zl", "Zp"} for letter in name):
        return "has control characters, line separators or bytes that are no text"
    if "\\" in name:
        return "has a backslash"
    if any(part in {"", ".", ".."} for part in name.split("/")):
        return "is not a relative path without empty, '.' or '..' parts"
    if not unicodedata.is_normalized("NFC", name):
        return "is not in Unicode's normal form C"
    return ""


def _folders(name: str) -> Iterable[str]:
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name


# ---- chunks and their keys -------------------------------------------------------------------------------


def digest(data: Bytes, algorithm: Algorithm) -> bytes:
    """32 bytes."""
    return blake3(data).digest() if algorithm == "blake3" else hashlib.sha256(data).digest()


def check_digest(data: Bytes, expected: bytes, algorithm: Algorithm, what: str) -> None:
    """Raises DamagedError PACKAGE_DAMAGED, naming `what`."""
    if not hmac.compare_digest(digest(data, algorithm), expected):
        raise damaged(f"{what} was changed: it does not have the digest that the vendor signed.")


def seal_chunk_into(key: Bytes, plain: Bytes, out: bytearray | memoryview, *, last: bool) -> None:
    """Encrypt one chunk under a key that serves for nothing else; `out` is 16 bytes longer than `plain`."""
    AESGCM(key).encrypt_into(NONCE, plain, _chunk_data(len(plain), last=last), out)


def open_chunk_into(key: Bytes, sealed: Bytes, chunk: Chunk, out: bytearray | memoryview) -> None:
    """Decrypt one chunk whose digest was checked. Raises DamagedError PACKAGE_DAMAGED."""
    try:
        AESGCM(key).decrypt_into(NONCE, sealed, _chunk_data(chunk.size, last=chunk.last), out)
    except InvalidTag:
        raise damaged("A chunk that the vendor signed does not open with its key.") from None


def seal_table(content_key: Secret, keys: Bytes) -> bytes:
    """The key table under a content key that serves for no other package."""
    with derive([content_key], b"key table") as key:
        return AESGCM(key.buffer).encrypt(NONCE, keys, _table_data(len(keys)))


def open_table_into(content_key: Secret, sealed: Bytes, out: bytearray | memoryview) -> None:
    """Decrypt the key table, whose digest was checked. Raises DamagedError PACKAGE_DAMAGED."""
    try:
        with derive([content_key], b"key table") as key:
            AESGCM(key.buffer).decrypt_into(NONCE, sealed, _table_data(len(out)), out)
    except InvalidTag:
        what = "The content key does not open this package."
        raise DamagedError(Reason.PACKAGE_DAMAGED, what, "Use the package that the license was issued for.") from None


def damaged(what: str) -> DamagedError:
    """The package is not what the vendor made."""
    return DamagedError(Reason.PACKAGE_DAMAGED, what, COPY_AGAIN)


def _chunk_data(size: int, *, last: bool) -> bytes:
    return b"hwlicense chunk 1" + size.to_bytes(4, "little") + bytes([last])


def _table_data(size: int) -> bytes:
    return b"hwlicense key table 1" + (size // SIZE).to_bytes(8, "little")
