"""Where a license's account is kept, in the state folder: on the disk, and in what all processes share.

    ledger   two places for a record, written in turn and synced: a power cut leaves the one before
    shared   the account as it is now, in the page cache: a process that is killed leaves it whole
    renewal  locked by the process that renews the lease
    alive    locked by every process that has the license open, and by the processes that it forked

Both are authenticated by a key that comes from the license secret. Locks are the kernel's: they end with a process.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import struct
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from hwlicense import storage
from hwlicense.core.errors import DamagedError, HwlicenseError, Reason, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hwlicense.core.secret import Secret

PATIENCE: Final = 5.0
"""Seconds to wait for another process that works in the account."""

_MAGIC: Final = b"hwledger"
_HEAD: Final = struct.Struct("<8sq")
_MAC_SIZE: Final = 32
_PAGE: Final = 4096
_MEND: Final = "Close every process that uses the license, and open it again."


def _padded(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


class _File:
    """A file of fixed size, made whole beforehand: writing in it later takes no space."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self._turn = path, threading.Lock()
        with storage.reporting(path):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            self.fd = storage.above_standard(os.open(path, flags, 0o600))
            try:
                if os.fstat(self.fd).st_size < size:
                    os.posix_fallocate(self.fd, 0, size)
                    os.fsync(self.fd)
                    storage.sync_folder(path.parent)
            except BaseException:
                self.close()
                raise

    def again(self) -> None:
        """Open it once more: in a forked child, whose locks would be the parent's."""
        before, self._turn = self.fd, threading.Lock()
        with storage.reporting(self.path):
            self.fd = storage.above_standard(os.open(f"/proc/self/fd/{before}", os.O_RDWR | os.O_CLOEXEC))
        os.close(before)

    def read(self, size: int, offset: int) -> bytes:
        with storage.reporting(self.path):
            return os.pread(self.fd, size, offset)

    def write(self, data: bytes, offset: int) -> None:
        with storage.reporting(self.path):
            while data:
                done = os.pwrite(self.fd, data, offset)
                data, offset = data[done:], offset + done

    @contextmanager
    def locked(self, patience: float = PATIENCE) -> Iterator[None]:
        """Let no other process or thread in. Raises StorageError where that took longer than `patience` seconds."""
        turn, fd = self._turn, self.fd
        if not turn.acquire(timeout=patience):  # not for ever: a signal handler may wait for the thread that it stopped
            raise self._taken(patience)
        try:
            self._lock(fd, patience)
            try:
                yield
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            turn.release()

    @contextmanager
    def locked_now(self) -> Iterator[bool]:
        """Let no other process or thread in, if none is there now; gives whether that is so."""
        turn, fd = self._turn, self.fd
        if not turn.acquire(blocking=False):
            yield False
            return
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            try:
                yield True
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            turn.release()

    def _lock(self, fd: int, patience: float) -> None:
        give_up, pause = 0.0, 0.00005
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                now = time.monotonic()
                give_up = give_up or now + patience
                if now > give_up:
                    raise self._taken(patience) from None
                time.sleep(pause)
                pause = min(2 * pause, 0.005)
            except OSError as error:
                what = f"{self.path} cannot be locked: {error.strerror}."
                raise StorageError(Reason.STORAGE, what, "Keep the state folder on a local disk.") from error
            else:
                return

    def _taken(self, patience: float) -> StorageError:
        what = f"{self.path} has been locked for {patience:g} s."
        return StorageError(Reason.STORAGE, what, "See which process works there (`lsof`).")

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Ledger:
    """The files of one license's account, `size` bytes each. Raises StorageError, UsageError, from every method."""

    def __init__(self, folder: Path, key: Secret, size: int) -> None:
        """`key` is taken over, and wiped by `close`."""
        storage.make_folders(folder, 0o700)
        self._key, self._size = key, size
        self._place = _padded(_HEAD.size + size + _MAC_SIZE)
        self._files: list[_File] = []
        try:
            self._ledger = self._opened(folder / "ledger", 2 * self._place)
            self._shared = self._opened(folder / "shared", _PAGE + 2 * self._place)
            self._alive = self._opened(folder / "alive", 0)
            self._renewal = self._opened(folder / "renewal", 0)
        except BaseException:
            self.close()
            raise
        self._sequence = 0

    def _opened(self, path: Path, size: int) -> _File:
        file = _File(path, size)
        self._files.append(file)
        return file

    def renew(self) -> None:
        """In a forked child. The lock on `alive` stays that of parent and children together."""
        for file in (self._ledger, self._shared, self._renewal):
            file.again()

    def close(self) -> None:
        """Let go of everything."""
        for file in self._files:
            file.close()
        self._key.wipe()

    # ---- who is there

    def enter(self) -> None:
        """Be among those that have the license open."""
        with storage.reporting(self._alive.path):
            fcntl.flock(self._alive.fd, fcntl.LOCK_SH)

    def alone(self) -> bool:
        """Whether no process has the license open, this one neither: call it before `enter`, or after `leave`."""
        probe = _File(self._alive.path, 0)
        try:
            fcntl.flock(probe.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            return True
        finally:
            probe.close()

    def leave(self) -> None:
        """Be no longer among them; processes that were forked are, as long as they live."""
        self._alive.close()

    # ---- what is on the disk

    @contextmanager
    def writing(self, patience: float = PATIENCE) -> Iterator[Callable[[bytes], None]]:
        """Let one process at a time write records; gives what writes one, on the disk when it returns."""
        with self._ledger.locked(patience):
            yield self._write

    @contextmanager
    def renewing(self) -> Iterator[bool]:
        """Let one process at a time renew the lease. Gives False at once where another does."""
        with self._renewal.locked_now() as mine:
            yield mine

    def recorded(self) -> bytes | None:
        """The latest record; None where nothing was ever recorded. Raises DamagedError HOME_DAMAGED."""
        found = max(self._records(), default=None)
        if found is not None:
            return found[1]
        if any(self._ledger.read(2 * self._place, 0)):
            raise DamagedError(Reason.HOME_DAMAGED, f"{self._ledger.path} is damaged.", _MEND)
        return None

    def _records(self) -> list[tuple[int, bytes, int]]:
        found = []
        for place in range(2):
            raw = self._ledger.read(_HEAD.size + self._size + _MAC_SIZE, place * self._place)
            if self._genuine(b"ledger", raw):
                found.append((_HEAD.unpack_from(raw)[1], raw[_HEAD.size : -_MAC_SIZE], place))
        return found

    def _write(self, record: bytes) -> None:
        sequence, _, place = max(self._records(), default=(0, b"", 1))
        self._ledger.write(self._sealed(b"ledger", sequence + 1, record), (1 - place) * self._place)
        with storage.reporting(self._ledger.path):
            os.fdatasync(self._ledger.fd)

    # ---- what processes share

    @contextmanager
    def sharing(self) -> Iterator[Ledger]:
        """Let one process at a time change what is shared."""
        with self._shared.locked():
            yield self

    def look(self) -> bytes | None:
        """What is shared; None where that is of no use. Raises DamagedError HOME_DAMAGED where it went back in time."""
        chosen = self._shared.read(1, 0) == b"\1"
        raw = self._shared.read(_HEAD.size + self._size + _MAC_SIZE, _PAGE + chosen * self._place)
        if not self._genuine(b"shared", raw):
            if self._sequence:
                what = f"{self._shared.path} was changed by something else while the license was open."
                raise DamagedError(Reason.HOME_DAMAGED, what, _MEND)
            return None
        sequence = _HEAD.unpack_from(raw)[1]
        if sequence < self._sequence:
            what = f"{self._shared.path} was put back to an earlier state while the license was open."
            raise DamagedError(Reason.HOME_DAMAGED, what, _MEND)
        self._sequence = sequence
        return raw[_HEAD.size : -_MAC_SIZE]

    def share(self, account: bytes) -> None:
        """Replace what is shared: wholly, or not at all if the process is killed."""
        other = self._shared.read(1, 0) != b"\1"
        sealed = self._sealed(b"shared", self._sequence + 1, account)
        self._shared.write(sealed, _PAGE + other * self._place)
        self._shared.write(bytes([other]), 0)
        self._sequence += 1

    def _sealed(self, what: bytes, sequence: int, payload: bytes) -> bytes:
        content = _HEAD.pack(_MAGIC, sequence) + payload
        return content + hmac.digest(self._key.buffer, what + content, "sha256")

    def _genuine(self, what: bytes, raw: bytes) -> bool:
        if len(raw) != _HEAD.size + self._size + _MAC_SIZE or not raw.startswith(_MAGIC):
            return False
        mac = hmac.digest(self._key.buffer, what + raw[:-_MAC_SIZE], "sha256")
        return hmac.compare_digest(mac, raw[-_MAC_SIZE:])


def unverified(folder: Path) -> list[bytes]:
    """What is shared and what is on the disk, the latest first; unchecked, as only an open license can check it."""
    shared, ledger = (_read(folder / name) for name in ("shared", "ledger"))
    place = len(ledger) // 2
    half = (len(shared) - _PAGE) // 2
    found = [shared[_PAGE + half * (shared[:1] == b"\1") :][:half]] if half > 0 else []
    found += sorted((ledger[at : at + place] for at in (0, place)), key=_number, reverse=True)
    return [raw[_HEAD.size :] for raw in found if raw.startswith(_MAGIC)]


def _number(record: bytes) -> int:
    return int(_HEAD.unpack_from(record)[1]) if record.startswith(_MAGIC) else -1


def _read(path: Path) -> bytes:
    try:
        return storage.read_limited(path, 1 << 20)
    except HwlicenseError:
        return b""
