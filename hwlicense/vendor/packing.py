"""Packing: files in, one encrypted and signed package out.

The inputs are read twice. The first pass encrypts in memory and keeps the digests alone; then the manifest is signed;
the second pass encrypts again, with the same keys, and writes. So the package is written once, needs no disk space but
its own, and only ciphertext reaches the disk. The keys serve one ciphertext as ever: the second pass writes a chunk
only if it has the digest of the first, so an input that changes meanwhile is an error.
"""

from __future__ import annotations

import os
import re
import secrets
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from hwlicense.core import package
from hwlicense.core.code import FOLDER, reserved
from hwlicense.core.documents import Manifest, Member
from hwlicense.core.envelope import seal, verified
from hwlicense.core.errors import DamagedError, Reason, RefusedError, StorageError, UsageError
from hwlicense.core.keys import TAG_SIZE, wrap_for_vendor
from hwlicense.core.schema import SCHEMA
from hwlicense.core.secret import SIZE, Secret
from hwlicense.storage import OpenFile, new_file, reporting, write_at
from hwlicense.threads import one_at_a_time, share_out, threads_for
from hwlicense.vendor.folder import KEYS, PUBLIC

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from hwlicense.core.documents import Code, VendorPublic
    from hwlicense.vendor.compiling import Compiled
    from hwlicense.vendor.signing import Keys

CHUNK_SIZES: Final = range(4096, (1 << 26) + 1)
CHUNKS: Final = 2048  # from which on chunks are larger
LARGEST_CHUNK: Final = 8 << 20
MEMBER_LIMIT: Final = 100_000
NAME_LIMIT: Final = 200
_SURROGATE: Final = re.compile("[\ud800-\udfff]")  # what Python makes of arguments that are not in UTF-8


class Source(NamedTuple):
    """A file to pack. `stamp` tells whether it was changed since it was found: size, time (ns), inode, device.

    With `content`, that is packed in the file's place: what was made from it.
    """

    name: str
    path: Path
    stamp: tuple[int, int, int, int]
    content: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes of plaintext."""
        return self.stamp[0]


def made(name: str, path: Path, content: bytes) -> Source:
    """What was made in memory, from the file at `path`."""
    return Source(name, path, (len(content), 0, 0, 0), content)


def sources(inputs: Sequence[Path], compiled: Compiled | None = None) -> list[Source]:
    """What `inputs` hold, in the order of their names: a folder's files relative to it, a file under its own name.

    And `compiled`, below the folder that is reserved for code.

    Hidden files are packed as others are. Symbolic links to files are followed unless they lead out of the folder;
    links to folders, sockets, devices and other things that are no files are refused, rather than left out in silence.
    Empty folders leave no trace. Raises UsageError MEMBER_NAME, FILE_ABSENT, USAGE, and StorageError.
    """
    found: list[Source] = []
    for given in inputs:
        with reporting(given):
            root = given.resolve() if given.is_dir() else None
        if root:
            found += [source_of(path.relative_to(root).as_posix(), path, root) for path in walk(root)]
        else:
            found.append(source_of(given.name, given, None))
        if len(found) > MEMBER_LIMIT:
            raise UsageError(Reason.USAGE, f"There are more than {MEMBER_LIMIT:,} files.", "Pack fewer, or an archive.")
    for source in found:
        if reserved(source.name):
            what = f"{source.path} would be packed as {source.name!r}, and {FOLDER} is for code alone."
            raise UsageError(Reason.MEMBER_NAME, what, "Rename the folder; code is packed with --code.")
    if compiled:
        found += compiled.sources
    if not found:
        raise UsageError(Reason.USAGE, "There is nothing to pack.", "Give files, or folders with files in them.")
    for source in found:  # `pack .` beside a vendor folder would send the private keys to the customer
        if source.path.parent.name == KEYS and (source.path.parent.parent / PUBLIC).exists():
            what = f"{source.path} is a key of a vendor folder, which must not leave it."
            raise UsageError(Reason.USAGE, what, "Pack a folder that holds the model alone.")
    found.sort(key=lambda source: source.name)
    package.check_names([source.name for source in found])
    return found


def chunk_size_for(size: int) -> int:
    """Bytes of a chunk, for files of `size` bytes together: 1 MiB, and for large packages up to 8.

    Manifest and key table grow by 32 bytes for each chunk, and opening with them. Whoever reads a part of a file
    decrypts whole chunks.
    """
    step = package.DEFAULT_CHUNK_SIZE
    while step < LARGEST_CHUNK and size > CHUNKS * step:
        step *= 2
    return step


def pack(  # noqa: PLR0913  # what a package says, and who says it
    found: Sequence[Source],
    out: Path,
    *,
    name: str,
    version: str,
    vendor: VendorPublic,
    keys: Keys,
    chunk_size: int | None = None,
    algorithm: package.Algorithm = "blake3",
    progress: Callable[[int], None] | None = None,
    force: bool = False,
    code: Code | None = None,
) -> Manifest:
    """Pack what `sources` found into `out`, under a new content key; `code` tells what of it is code.

    `progress` gets the bytes done since its last call, the sources' sizes in all. `out` appears when it is complete and
    on the disk; after any failure, interruption or kill what was there before is still there. Needs memory for two
    chunks a thread, and some 400 bytes for each chunk.

    Raises UsageError (FILE_EXISTS unless `force`, FILE_ABSENT, USAGE), StorageError.
    """
    if chunk_size is not None and chunk_size not in CHUNK_SIZES:
        raise UsageError(Reason.USAGE, "The chunk size must be 4 KiB to 64 MiB.", "Leave it out.")
    if not all(1 <= len(text) <= NAME_LIMIT and not _SURROGATE.search(text) for text in (name, version)):
        what = f"Name and version must have 1 to {NAME_LIMIT} characters, in UTF-8."
        raise UsageError(Reason.USAGE, what, "Shorten them, or check the terminal's encoding.")
    chunk_size = chunk_size or chunk_size_for(sum(source.size for source in found))
    if os.path.realpath(out) in {os.path.realpath(source.path) for source in found}:
        raise UsageError(
            Reason.USAGE, f"{out} is also one of the inputs.", "Write the package outside of what it packs."
        )
    count = sum(package.chunk_count(source.size, chunk_size) for source in found)
    if count * package.DIGEST_SIZE > package.ENVELOPE_LIMIT // 16 * 9:  # in base64 twice; names come on top
        raise _too_many_chunks()
    # The file is begun first, so that a wrong path costs seconds, not the first pass
    with (
        new_file(out, 0o644, force=force) as file,
        Secret.random() as content_key,
        Secret.random(count * SIZE) as chunk_keys,
    ):
        packer = _Packer(chunk_keys, chunk_size, algorithm, progress)
        members = [Member(source.name, source.size, packer.digests(source)) for source in found]
        table = package.seal_table(content_key, chunk_keys.buffer)
        identifier = secrets.token_hex(16)
        manifest = Manifest(
            schema=SCHEMA,
            name=name,
            version=version,
            vendor=vendor.fingerprint,
            content_key=identifier,
            wrapped_content_key=wrap_for_vendor(content_key, identifier, keys.content.public_key()),
            algorithm=algorithm,
            chunk_size=chunk_size,
            table=package.digest(table, algorithm),
            members=members,
            code=code,
        )
        envelope = seal(manifest, keys.signers)
        _check(envelope, vendor)
        file.write(package.header(envelope) + envelope + table)
        file.flush()
        packer.rewind()
        at = file.tell()
        for source, member in zip(found, members, strict=True):
            packer.write(source, member.digests, file.fileno(), at)
            at += source.size + package.chunk_count(source.size, chunk_size) * TAG_SIZE
    return manifest


def read_manifest(path: Path, vendor: VendorPublic) -> Manifest:
    """The verified manifest of a package whose layout is whole; its chunks are not read.

    Raises DamagedError, RefusedError WRONG_VENDOR, UsageError FILE_ABSENT, StorageError.
    """
    with OpenFile(path) as file:
        envelope = package.envelope_of(file)
        manifest = verified(envelope, Manifest, vendor)
        package.Layout(manifest, len(envelope), file.size)
    return manifest


class _Packer:
    """Encrypts sources one after the other, each chunk under the next key of the table."""

    def __init__(
        self, keys: Secret, chunk_size: int, algorithm: package.Algorithm, progress: Callable[[int], None] | None
    ) -> None:
        self._keys = memoryview(keys.buffer)
        self._chunk_size = chunk_size
        self._algorithm = algorithm
        self._progress = one_at_a_time(progress)
        self._next = 0
        self._passes = 0

    def rewind(self) -> None:
        """Begin the second pass."""
        self._next = 0
        self._passes += 1

    def digests(self, source: Source) -> bytes:
        """One for each chunk of ciphertext."""
        step = package.DIGEST_SIZE
        found = bytearray(package.chunk_count(source.size, self._chunk_size) * step)

        def keep(place: int, digest: bytes, _sealed: memoryview) -> None:
            found[place * step : (place + 1) * step] = digest

        self._seal(source, keep)
        return bytes(found)

    def write(self, source: Source, digests: bytes, fd: int, offset: int) -> None:
        """The ciphertext, if it has the digests of the first pass."""

        def write(place: int, digest: bytes, sealed: memoryview) -> None:
            if digest != digests[place * package.DIGEST_SIZE :][: package.DIGEST_SIZE]:
                raise _changed(source)
            write_at(fd, sealed, offset + place * (self._chunk_size + TAG_SIZE))

        self._seal(source, write)

    def _seal(self, source: Source, handle: Callable[[int, bytes, memoryview], None]) -> None:
        """`handle` each chunk's place, digest and ciphertext, in any order and from several threads."""
        step, count, first = self._chunk_size, package.chunk_count(source.size, self._chunk_size), self._next
        self._next += count
        with _opened(source) as file:
            _check_unchanged(source, file)

            def worker() -> Callable[[int], None]:
                room = min(step, source.size)
                plain, sealed = memoryview(bytearray(room)), memoryview(bytearray(room + TAG_SIZE))

                def seal(place: int) -> None:
                    size = min(step, source.size - place * step)
                    if file.read_into(plain[:size], place * step) < size:
                        raise _changed(source)
                    key = self._keys[(first + place) * SIZE :][:SIZE]
                    out = sealed[: size + TAG_SIZE]
                    package.seal_chunk_into(key, plain[:size], out, last=place + 1 == count)
                    handle(place, package.digest(out, self._algorithm), out)
                    self._progress(size // 2 if self._passes else size - size // 2)

                return seal

            share_out(range(count), worker, threads=threads_for(source.size))
            _check_unchanged(source, file)


class _Made:
    """What was made in memory, read as a file is."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def read_into(self, buffer: memoryview, offset: int) -> int:
        piece = self._content[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)


def _opened(source: Source) -> AbstractContextManager[OpenFile | _Made]:
    return OpenFile(source.path) if source.content is None else nullcontext(_Made(source.content))


def walk(root: Path, left_out: Callable[[str], bool] = lambda _name: False) -> Iterator[Path]:
    """Every entry below `root` that is not a folder, without folders whose name is `left_out`.

    Raises UsageError, StorageError.
    """

    def refuse(error: OSError) -> None:
        raise error

    with reporting(root):
        for folder, folders, files in os.walk(root, onerror=refuse):
            folders[:] = [name for name in folders if not left_out(name)]
            for name in folders:
                if Path(folder, name).is_symlink():
                    what = f"{Path(folder, name)} is a symbolic link to a folder."
                    raise UsageError(
                        Reason.USAGE, what, "Put the folder itself there, or pack it as an input of its own."
                    )
            yield from (Path(folder, name) for name in files)


def source_of(name: str, path: Path, root: Path | None) -> Source:
    """A file to pack under `name`.

    Raises UsageError for a link that leads out of `root` and for what is no file, StorageError.
    """
    if root and path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
        what = f"{path} is a symbolic link that leads out of {root}."
        raise UsageError(Reason.USAGE, what, "Put the file itself there, or pack it as an input of its own.")
    with OpenFile(path) as file:
        return Source(name, path, _stamp(file))


def _stamp(file: OpenFile) -> tuple[int, int, int, int]:
    status = os.fstat(file.fd)
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def _check_unchanged(source: Source, file: OpenFile | _Made) -> None:
    if isinstance(file, OpenFile) and _stamp(file) != source.stamp:
        raise _changed(source)


def _changed(source: Source) -> StorageError:
    what = f"{source.path} changed while it was packed."
    return StorageError(Reason.STORAGE, what, "Pack again when nothing writes to the files.")


def _too_many_chunks() -> UsageError:
    return UsageError(Reason.USAGE, "There are too many chunks for one package.", "Choose a larger chunk size.")


def _check(envelope: bytes, vendor: VendorPublic) -> None:
    """A package that no device would accept is not worth its writing."""
    if len(envelope) > package.ENVELOPE_LIMIT:
        raise _too_many_chunks()
    try:
        verified(envelope, Manifest, vendor)
    except (DamagedError, RefusedError) as error:
        what = f"The package would not verify as {vendor.name!r}'s: {error.what}"
        raise UsageError(Reason.USAGE, what, "Check name, version and the vendor folder's keys.") from error
