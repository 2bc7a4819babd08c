"""What an open model keeps secret for its whole life, in memory of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hwlicense.core import package
from hwlicense.core.secret import SIZE
from hwlicense.device.memory import Memory, lend

if TYPE_CHECKING:
    from hwlicense.core.keys import Content


class Keyring:
    """The keys of a package's chunks, and what its license encloses. `content` stays its owner's."""

    def __init__(self, content: Content, table: bytes | memoryview, count: int) -> None:
        """`table` is the encrypted key table of `count` chunks. Raises DamagedError, StorageError."""
        self._end, self._size = count * SIZE, len(content.enclosure)
        self.memory = Memory(max(1, self._end + self._size), secret=True)
        try:
            package.open_table_into(content.key, table, self.memory.view[: self._end])
            self.memory.view[self._end : self._end + self._size] = content.enclosure.buffer
        except BaseException:
            self.memory.wipe()
            raise

    def open_chunk(self, chunk: package.Chunk, sealed: memoryview, out: memoryview) -> None:
        """Decrypt a chunk whose digest was checked. Raises DamagedError, also where the keys were zeroed."""
        key = self.memory.view[chunk.key * SIZE : (chunk.key + 1) * SIZE]
        package.open_chunk_into(key, sealed, chunk, out)

    def enclosure(self) -> memoryview:
        """A copy of what the license encloses, read-only, which is zeroed when nobody holds it. Raises StorageError."""
        copy = Memory(max(1, self._size))
        copy.view[: self._size] = self.memory.view[self._end : self._end + self._size]
        return memoryview(lend(copy)).cast("B")[: self._size].toreadonly()

    def zero(self) -> None:
        """Overwrite all of it; other threads may be using it still."""
        self.memory.view[:] = bytes(len(self.memory.view))

    def wipe(self) -> None:
        """Overwrite it and give the memory back. Nobody uses it any more."""
        self.memory.wipe()
