"""Where a license's account is kept, in the state folder.

    ledger   two places for a record, written in turn and synced: a power cut leaves the one before
    renewal  locked by the process that renews the lease
    alive    locked by every process that has the license open, and by the processes that it forked
    join     the socket at which further processes are given the account as it is now

Records are authenticated by a key that comes from the license secret.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hwlicense import storage
from hwlicense.core.errors import DamagedError, HwlicenseError, Reason
from hwlicense.device import sharing
from hwlicense.device.locking import PATIENCE, LockedFile
from hwlicense.device.records import Records, place, unchecked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hwlicense.core.secret import Secret
    from hwlicense.device.sharing import Door, Shared


class Ledger:
    """The account of one license, `size` bytes. Raises StorageError, UsageError, from every method."""

    def __init__(self, folder: Path, key: Secret, size: int) -> None:
        """`key` is taken over, and wiped by `close`, or where this fails."""
        self._folder, self._records = folder, Records(key, size)
        self._files: list[LockedFile] = []
        self._shared: Shared | None = None
        self._door: Door | None = None
        try:
            storage.make_folders(folder, 0o700)
            self._ledger = self._opened("ledger", 2 * self._records.place)
            self._alive = self._opened("alive", 0)
            self._renewal = self._opened("renewal", 0)
        except BaseException:
            self.close()
            raise

    def _opened(self, name: str, size: int) -> LockedFile:
        file = LockedFile.opened(self._folder / name, size)
        self._files.append(file)
        return file

    def after_fork(self) -> None:
        """In a forked child. The lock on `alive` stays that of parent and children together."""
        for file in (self._ledger, self._renewal, *([self._shared.file] if self._shared else ())):
            file.after_fork()
        if self._door:
            self._door.after_fork()

    def close(self) -> None:
        """Let go of everything."""
        if self._door:
            self._door.close()
        if self._shared:
            self._shared.close()
        for file in self._files:
            file.close()
        self._records.close()

    # ---- who is there

    def begin(self, account: bytes) -> None:
        """Be the first that has the license open, with this account."""
        self._alive.share()
        self._shared = sharing.Shared.made(self._folder, self._records)
        self._shared.share(account)
        self._door = sharing.opened(self._folder, self._shared, self._records)

    def join(self) -> None:
        """Be a further one."""
        self._alive.share()
        self._shared, self._door = sharing.joined(self._folder, self._records)

    def serve(self) -> None:
        """Have a thread let others join. Raises StorageError where the system gives none."""
        if self._door:
            self._door.serve()

    def alone(self) -> bool:
        """Whether no process has the license open, this one neither: before `begin` and `join`, or after `leave`."""
        probe = LockedFile.opened(self._alive.path, 0)
        try:
            return probe.free()
        finally:
            probe.close()

    def left(self) -> bool:
        """Whether those that this process tried to join have ended: it is among nobody, and may `begin`."""
        if self._shared:  # it did join
            return False
        self._alive.unshare()
        return self.alone()

    def forget(self) -> None:
        """As the last process: take the socket away."""
        sharing.forget(self._folder)

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
        found = max(self._found(), default=None)
        if found is not None:
            return found[1]
        if any(self._ledger.read(2 * self._records.place, 0)):
            raise DamagedError(Reason.HOME_DAMAGED, f"{self._ledger.path} is damaged.", sharing.MEND)
        return None

    def _found(self) -> list[tuple[int, bytes, int]]:
        found = []
        for half in range(2):
            raw = self._ledger.read(self._records.length, half * self._records.place)
            if record := self._records.opened(b"ledger", raw):
                found.append((*record, half))
        return found

    def _write(self, record: bytes) -> None:
        number, _, half = max(self._found(), default=(0, b"", 1))
        self._ledger.write(self._records.made(b"ledger", number + 1, record), (1 - half) * self._records.place)
        with storage.reporting(self._ledger.path):
            os.fdatasync(self._ledger.fd)

    # ---- what processes share

    @contextmanager
    def sharing(self) -> Iterator[Shared]:
        """Let one process at a time change what is shared."""
        if self._shared is None:
            raise DamagedError(Reason.HOME_DAMAGED, "The license's account is not open.", sharing.MEND)
        with self._shared.locked():
            yield self._shared


def prepare(folder: Path, size: int) -> None:
    """Make the files for an account of `size` bytes where they are not. Raises StorageError."""
    storage.make_folders(folder, 0o700)
    for name, room in (("ledger", 2 * place(size)), ("alive", 0), ("renewal", 0)):
        LockedFile.opened(folder / name, room).close()


def unverified(folder: Path) -> list[bytes]:
    """What is shared and what is on the disk, the latest first; unchecked, as only an open license can check it."""
    ledger = _read(folder / "ledger")
    half = len(ledger) // 2
    records = [record for at in (0, half) if (record := unchecked(ledger[at : at + half]))]
    now = sharing.seen(folder)
    return [*([now] if now else []), *(payload for _, payload in sorted(records, reverse=True))]


def begun(folder: Path) -> bool:
    """Whether anything was ever recorded there, as far as this user may know."""
    path = folder / "ledger"
    try:
        return any(storage.read_limited(path, 1 << 20))
    except HwlicenseError as error:
        return error.reason != Reason.FILE_ABSENT


def is_open(folder: Path) -> bool:
    """Whether a process has the license open, or works in its ledger; so, too, where that cannot be seen.

    Keeps nobody from opening it: whoever looks whether others have it open has locked the ledger before.
    """
    try:
        with storage.OpenFile(folder / "ledger") as ledger, storage.OpenFile(folder / "alive") as alive:
            return not (storage.taken(ledger.fd, ledger.path) and storage.taken(alive.fd, alive.path))
    except HwlicenseError:
        return True


def _read(path: Path) -> bytes:
    try:
        return storage.read_limited(path, 1 << 20)
    except HwlicenseError:
        return b""
