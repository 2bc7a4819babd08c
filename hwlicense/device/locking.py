"""Files that processes and threads of a device lock. Locks are the kernel's: they end with a process."""

from __future__ import annotations

import fcntl
import os
import re
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from hwlicense import storage
from hwlicense.core.errors import Reason, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AbstractContextManager

PATIENCE: Final = 5.0
"""Seconds to wait for another process or thread."""


LOCKS: Final = Path("/proc/locks")
"""The kernel's list of locks; see proc(5)."""

_LOCK: Final = re.compile(
    r"\d+: FLOCK +ADVISORY +(?:READ|WRITE) +(?P<pid>[1-9]\d*) "
    r"(?P<major>[0-9a-f]+):(?P<minor>[0-9a-f]+):(?P<inode>\d+) ",
    re.ASCII,
)


class Turn:
    """A lock among threads. Raises StorageError where it is not to be had in `PATIENCE`.

    At once in a signal handler that interrupted its holder, who cannot go on before the handler ends.
    """

    def __init__(self) -> None:
        self._lock, self._holder = threading.RLock(), 0

    def __enter__(self) -> None:
        if not self.tried(PATIENCE):
            what = "The account of the license's use is not to be had."
            raise StorageError(Reason.STORAGE, what, "Try again; not in a signal handler that interrupts its use.")

    def __exit__(self, *_error: object) -> None:
        self.over()

    def tried(self, patience: float = 0) -> bool:
        """Whether it is this thread's turn now, until `over`."""
        me = threading.get_ident()
        if self._holder == me:
            return False
        try:
            if not self._lock.acquire(timeout=patience):
                return False
            self._holder = me
        except BaseException:  # of a signal handler: maybe right after the lock was had
            self._release()
            raise
        return True

    def over(self) -> None:
        """Let others have their turn."""
        self._holder = 0
        self._release()

    def _release(self) -> None:
        with suppress(RuntimeError):  # it was not had yet
            self._lock.release()


class LockedFile:
    """A file, or memory under a descriptor; `path` is what errors call it."""

    def __init__(self, path: Path, fd: int) -> None:
        """`fd` is taken over."""
        self.path, self.fd, self._turn = path, fd, Turn()
        self._left: list[int] = []  # closed while a thread had it locked, who does it then

    @classmethod
    def opened(cls, path: Path, size: int) -> Self:
        """A file of fixed size, made whole beforehand: writing in it later takes no space. Raises StorageError."""
        with storage.reporting(path):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            file = cls(path, storage.above_standard(os.open(path, flags, 0o600)))
            try:
                if os.fstat(file.fd).st_size < size:
                    os.posix_fallocate(file.fd, 0, size)
                    os.fsync(file.fd)
                    storage.sync_folder(path.parent)
            except BaseException:
                file.close()
                raise
        return file

    def after_fork(self) -> None:
        """Open it once more: under a descriptor that was shared, locks would be shared, too."""
        before, self._turn = self.fd, Turn()
        with storage.reporting(self.path):
            self.fd = storage.above_standard(os.open(f"/proc/self/fd/{before}", os.O_RDWR | os.O_CLOEXEC))
        os.close(before)

    def read(self, size: int, offset: int) -> bytes:
        """Fewer bytes only where the file ends before. Raises StorageError."""
        with storage.reporting(self.path):
            return os.pread(self.fd, size, offset)

    def write(self, data: bytes, offset: int) -> None:
        """Write all of it. Raises StorageError."""
        with storage.reporting(self.path):
            while data:
                done = os.pwrite(self.fd, data, offset)
                data, offset = data[done:], offset + done

    @contextmanager
    def locked(self, patience: float = PATIENCE) -> Iterator[None]:
        """Let no other process or thread in. Raises StorageError where that took longer than `patience` seconds."""
        with self._alone(patience) as had:
            if not had:
                raise storage.busy(self.path, patience)
            yield

    def locked_now(self) -> AbstractContextManager[bool]:
        """Let no other process or thread in, if none is there now; gives whether that is so."""
        return self._alone(0)

    @contextmanager
    def _alone(self, patience: float) -> Iterator[bool]:
        """Whether the lock was had within so many seconds."""
        turn, fd, process = self._turn, self.fd, os.getpid()
        if not turn.tried(patience):
            yield False
            return
        try:
            yield storage.patiently(self.taken_now, patience)
        finally:
            try:
                if fd >= 0 and os.getpid() == process:  # in a child that was forked meanwhile, it is the parent's
                    fcntl.flock(fd, fcntl.LOCK_UN)
            finally:
                turn.over()
                self._close_left()

    def share(self, patience: float = PATIENCE) -> None:
        """Lock it together with others, until `close`. Raises StorageError where one has it alone for too long."""
        if not storage.patiently(lambda: storage.taken(self.fd, self.path, fcntl.LOCK_SH), patience):
            raise storage.busy(self.path, patience)

    def unshare(self) -> None:
        """Give up what `share` took."""
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def taken_now(self) -> bool:
        """Whether the file is locked for this process now. Raises StorageError where it cannot be locked at all."""
        return storage.taken(self.fd, self.path)

    def free(self) -> bool:
        """Whether nobody has it locked. Raises StorageError as `taken_now`."""
        if not self.taken_now():
            return False
        fcntl.flock(self.fd, fcntl.LOCK_UN)  # closing would not do, if a child was forked just now
        return True

    def close(self) -> None:
        """Close the descriptor, and with it its locks; while a thread has it locked, when that ends."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self._left.append(fd)  # another thread's `flock` must not meet a descriptor that is something else by then
            self._close_left()

    def _close_left(self) -> None:
        if self._left and self._turn.tried():
            try:
                while self._left:
                    os.close(self._left.pop())
            finally:
                self._turn.over()


def holders(files: Iterable[os.stat_result]) -> list[int]:
    """Processes that locked these files, as far as the kernel lists them here. For people, and nothing to act on."""
    wanted = {(os.major(each.st_dev), os.minor(each.st_dev), each.st_ino) for each in files}
    found = set[int]()
    with suppress(OSError):
        for line in LOCKS.read_text(errors="replace").splitlines():
            if match := _LOCK.match(line):
                place = int(match["major"], 16), int(match["minor"], 16), int(match["inode"])
                if place in wanted:
                    found.add(int(match["pid"]))
    return sorted(found)
