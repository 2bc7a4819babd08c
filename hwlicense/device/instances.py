"""How many instances of an application run at once: locks in the state folder, which the kernel drops.

An instance is an opening with the processes that were forked from it: the lock lasts as long as one of them lives.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from hwlicense import storage
from hwlicense.core.errors import DamagedError, ExceededError, HwlicenseError, Reason
from hwlicense.device.locking import holders

PERIOD: Final = 1.0
"""Seconds between two looks at a place, where each inference may ask."""


_NAMED: Final = 8  # processes, at the most


class Instance:
    """A place among the instances, until `close`.

    Raises ExceededError INSTANCES_EXCEEDED, DamagedError HOME_DAMAGED, StorageError.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._fd, self._looked = -1, 0.0
        places = folder / "instances"
        storage.make_folders(places, 0o700)
        if places.is_symlink():  # it may lead each process elsewhere
            what = f"{places} is a symbolic link."
            raise DamagedError(Reason.HOME_DAMAGED, what, "Remove it: the locks of instances are made again.")
        for _ in range(2):  # whoever counts the places holds one of them for a moment
            for number in range(limit):
                self._path = places / str(number)
                self._fd = _open(self._path)
                try:
                    if storage.taken(self._fd, self._path):
                        return
                except BaseException:
                    self.close()
                    raise
                self.close()
            time.sleep(0.02)
        what = f"The license allows {limit} instance{'s' * (limit != 1)} at once, and so many are running."
        what += _held_by(places, limit)
        raise ExceededError(Reason.INSTANCES_EXCEEDED, what, "End one of them, or ask for a license with more.")

    def check(self) -> None:
        """That the place is still where others look for it. Raises DamagedError HOME_DAMAGED."""
        with storage.reporting(self._path):
            mine = os.fstat(self._fd)
            there = self._path.stat() if self._path.exists() else None
        if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            what = f"{self._path} was removed while the license was open."
            raise DamagedError(
                Reason.HOME_DAMAGED, what, "Close every process that uses the license, and open it again."
            )

    def refusal(self) -> HwlicenseError | None:
        """Why nothing may start: the place was lost. Looked at once a second, and whenever it was lost before."""
        now = time.monotonic()
        if self._fd < 0 or now - self._looked < PERIOD:
            return None
        try:
            self.check()
        except HwlicenseError as error:
            return error
        self._looked = now
        return None

    def close(self) -> None:
        """Give the place back; processes that were forked keep it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _held_by(places: Path, limit: int) -> str:
    """Who holds the places, where the kernel says so."""
    with suppress(OSError):
        pids = holders([(places / str(number)).stat() for number in range(limit)])
        if pids:
            names = [_named(pid) for pid in pids[:_NAMED]] + ["others"] * (len(pids) > _NAMED)
            return f" They are held by {', '.join(names)}."
    return ""


def _named(pid: int) -> str:
    """It is the one that locked the place, and may have left it to processes that it forked."""
    try:
        return f"process {pid} ({Path(f'/proc/{pid}/comm').read_text(errors='replace').strip()})"
    except OSError:
        return f"children of process {pid}, which has ended"


def running(folder: Path, limit: int) -> int:
    """How many of the places are taken now."""
    count = 0
    for number in range(limit):
        path = folder / "instances" / str(number)
        with storage.reporting(path):
            if not path.exists():
                continue
        fd = _open(path)
        try:
            count += not storage.taken(fd, path)
        finally:
            os.close(fd)
    return count


def _open(path: Path) -> int:
    with storage.reporting(path):
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        return storage.above_standard(os.open(path, flags, 0o600))
