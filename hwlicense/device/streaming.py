"""A member of an open model as a file: any part of it at a time, in little memory."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from hwlicense.core.errors import memory_needed
from hwlicense.device.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from _typeshed import WriteableBuffer

CACHE_SIZE: Final = 4 << 20
"""Bytes of decrypted chunks that each reader keeps, or one chunk where chunks are larger."""


class MemberReader(io.BufferedIOBase):
    """A readable, seekable binary file. Threads may share it, but they share its position too."""

    def __init__(
        self,
        size: int,
        chunk_size: int,
        open_chunks: Callable[[int, int, memoryview], None],
        using: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`open_chunks` decrypts so many, from one on, into a buffer; `using` keeps the model open, or raises."""
        self.size = size
        self._step = chunk_size
        self._open_chunks = open_chunks
        self._using = using
        self._position = 0
        self._places = max(1, min(CACHE_SIZE // chunk_size, -(-size // chunk_size)))
        self._memory: Memory | None = None
        self._cached: OrderedDict[int, int] = OrderedDict()  # chunk -> place in memory, the least recent first
        self._stale = False
        self.after_fork()

    def after_fork(self) -> None:
        """A new lock, in a forked child: a thread that is not there may have held the old one."""
        self._lock = threading.RLock()

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position, in bytes."""
        self._check()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to a position, which may lie beyond the end, where nothing is read.

        Raises ValueError below 0, and for a `whence` other than 0, 1 and 2.
        """
        with self._turn():
            base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}.get(whence)
            if base is None:
                raise ValueError(f"invalid whence ({whence}, should be 0, 1 or 2)")
            if base + offset < 0:
                raise ValueError(f"negative seek position {base + offset}")
            self._position = base + offset
            return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill `buffer`; fewer bytes only at the end. Raises ClosedError, DamagedError, StorageError."""
        self._check()
        done = 0
        with memoryview(buffer).cast("B") as out, self._using(), self._turn():
            while done < len(out) and self._position < self.size:
                if direct := self._whole(len(out) - done):  # what nobody asks for again needs no copy
                    self._open_chunks(self._position // self._step, -(-direct // self._step), out[done : done + direct])
                    done += direct
                    self._position += direct
                    continue
                with self._chunk_at(self._position) as piece:
                    part = piece[: len(out) - done]
                    out[done : done + len(part)] = part
                    done += len(part)
                    self._position += len(part)
        return done

    def readinto_at(self, buffer: WriteableBuffer, offset: int) -> int:
        """As `readinto`, from `offset` on, which no other thread that shares the file moves meanwhile."""
        with self._lock:
            self.seek(offset)
            return self.readinto(buffer)

    def readinto1(self, buffer: WriteableBuffer, /) -> int:
        """As `readinto`."""
        return self.readinto(buffer)

    def read(self, size: int | None = -1, /) -> bytes:
        """`size` bytes, or all that are left; fewer only at the end. Raises as `readinto`."""
        with self._turn(), memory_needed():
            left = max(0, self.size - self._position)
            found = bytearray(left if size is None or size < 0 else min(size, left))
            self.readinto(found)
            return bytes(found)

    def read1(self, size: int = -1, /) -> bytes:
        """At most `size` bytes, and no more than io.DEFAULT_BUFFER_SIZE. Raises as `readinto`."""
        with self._turn():
            found = self.peek()[: size if size >= 0 else None]
            self._position += len(found)
            return found

    def peek(self, size: int = 0, /) -> bytes:  # noqa: ARG002  # like io.BufferedReader, as much as is at hand
        """As many as `read1` gives, from the position on, which stays. This makes `readline` quick. Raises as it."""
        self._check()
        with self._using(), self._turn():
            if self._position >= self.size:
                return b""
            with self._chunk_at(self._position) as piece:
                return bytes(piece[: io.DEFAULT_BUFFER_SIZE])

    def close(self) -> None:
        """Zero what was decrypted."""
        super().close()
        with self._lock:
            self.forget()

    def forget(self) -> None:
        """Zero the cache. The caller knows that nothing is being read."""
        self._cached.clear()
        memory, self._memory = self._memory, None
        if memory:
            memory.wipe()

    def forget_soon(self) -> None:
        """Zero the cache: at once, or where a thread is reading, before the next chunk. Waits for nothing."""
        self._stale = True
        if self._lock.acquire(blocking=False):
            try:
                self.forget()
            finally:
                self._lock.release()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One thread at a time, and none after `close`, which may come while one waits here."""
        with self._lock:
            self._check()
            yield

    def _check(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")

    def _whole(self, room: int) -> int:
        """Bytes of the whole chunks from the position on that fit into so many bytes; 0 where the first is cached."""
        index, within = divmod(self._position, self._step)
        if within or index in self._cached:
            return 0
        left = self.size - self._position
        return left if room >= left else room - room % self._step

    def _chunk_at(self, position: int) -> memoryview:
        """The plaintext from `position` to the end of its chunk."""
        index = position // self._step
        size = min(self._step, self.size - index * self._step)
        if self._stale:
            self._stale = False
            self.forget()
        if self._memory is None:
            self._memory = Memory(self._places * min(self._step, self.size))
        if index not in self._cached:
            if len(self._cached) == self._places:
                self._cached.popitem(last=False)
            place = min(set(range(self._places)) - set(self._cached.values()))
            self._open_chunks(index, 1, self._memory.view[place * self._step :][:size])
            self._cached[index] = place
        self._cached.move_to_end(index)
        return self._memory.view[self._cached[index] * self._step :][position - index * self._step : size]
