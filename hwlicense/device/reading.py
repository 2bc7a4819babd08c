"""A package on the disk: its manifest, and ciphertext that the vendor's digests vouch for. Needs no key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

from hwlicense.core import package
from hwlicense.core.documents import Manifest
from hwlicense.core.envelope import verified
from hwlicense.core.errors import Reason, RefusedError, naming
from hwlicense.storage import OpenFile
from hwlicense.threads import THREADS, one_at_a_time, share_out

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from hwlicense.core.documents import VendorPublic

RUN: Final = 4 << 20
"""Bytes of neighbouring chunks that one thread takes at a time: two that fill one huge page would both clear it."""


class PackageFile:
    """An open package whose manifest is the vendor's. The file may be replaced meanwhile: the old one stays open.

    Every byte is read with pread(2) into own memory, verified there and used from there: it cannot change in between,
    and a file that is cut while it is open gives an error, no signal.
    """

    def __init__(self, path: Path, vendor: VendorPublic) -> None:
        """Raises DamagedError, RefusedError WRONG_VENDOR, UsageError FILE_ABSENT, StorageError."""
        self.vendor = vendor
        self._file = OpenFile(path)
        try:
            with naming(path):
                envelope = package.envelope_of(self._file)
                self.manifest = verified(envelope, Manifest, vendor)
                _check_vendor(self.manifest, vendor)
                self.layout = package.Layout(self.manifest, len(envelope), self._file.size)
        except BaseException:
            self._file.close()
            raise

    @property
    def size(self) -> int:
        """Bytes of the whole package."""
        return self._file.size

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Read all of it and check every digest. `progress` gets the bytes done since its last call, `size` in all.

        Raises DamagedError PACKAGE_DAMAGED, StorageError.
        """
        report = one_at_a_time(progress)
        self.table()
        report(self.layout.table_offset + self.layout.table_size)
        self.scan(self._everything(), lambda chunk, _: report(chunk.sealed_size))

    def table(self) -> memoryview:
        """The encrypted key table, verified. Raises DamagedError PACKAGE_DAMAGED, StorageError."""
        sealed = bytearray(self.layout.table_size)
        self._take(sealed, self.layout.table_offset, self.manifest.table, "The key table")
        return memoryview(sealed)

    def sealed(self, chunk: package.Chunk, buffer: bytearray) -> memoryview:
        """The ciphertext of one chunk, verified, in `buffer`, which has room for it. Raises as `table`."""
        view = memoryview(buffer)[: chunk.sealed_size]
        self._take(view, chunk.offset, chunk.digest, f"Chunk {chunk.key} of the package")
        return view

    def scan(
        self,
        chunks: Iterable[package.Chunk],
        handle: Callable[[package.Chunk, memoryview], None],
        threads: int = THREADS,
    ) -> None:
        """Call `handle` with the verified ciphertext of each chunk, in any order and from several threads.

        Takes memory for two chunks a thread at the most. Raises as `table`, and what `handle` raises.
        """

        def worker() -> Callable[[package.Chunk], None]:
            buffer = bytearray()

            def work(chunk: package.Chunk) -> None:
                nonlocal buffer
                if len(buffer) < chunk.sealed_size:
                    buffer = bytearray(chunk.sealed_size)  # a new one: to make one longer takes twice the memory
                handle(chunk, self.sealed(chunk, buffer))

            return work

        share_out(chunks, worker, run=max(1, RUN // self.manifest.chunk_size), threads=threads)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _everything(self) -> Iterator[package.Chunk]:
        for member in self.manifest.members:
            for index in range(self.layout.count(member)):
                yield self.layout.chunk(member, index)

    def _take(self, buffer: bytearray | memoryview, offset: int, digest: bytes, what: str) -> None:
        with naming(self._file.path):
            if self._file.read_into(buffer, offset) < len(buffer):
                raise package.damaged("The package was cut since it was opened.")
            package.check_digest(buffer, digest, self.manifest.algorithm, what)


def read_envelope(path: Path) -> bytes:
    """The signed envelope of a package, nothing of it checked but its length. Raises DamagedError, StorageError."""
    with OpenFile(path) as file:
        return package.envelope_of(file)


def _check_vendor(manifest: Manifest, vendor: VendorPublic) -> None:
    if manifest.vendor != vendor.fingerprint:
        what = f"The package names another vendor than {vendor.name!r}, who signed it."
        raise RefusedError(Reason.WRONG_VENDOR, what, "Ask the vendor for a package packed under its own name.")
