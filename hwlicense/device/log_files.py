"""The files of one recording: written in order, and mended where the disk was full in the middle of a record."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Literal

from hwlicense import storage
from hwlicense.core.chain import LINE_LIMIT, digest

if TYPE_CHECKING:
    from pathlib import Path

    from hwlicense.core.chain import Link

SUFFIX: Final = ".hwout"
_BATCH: Final = 1024
"""Lines of one write."""

_HELD: Final = 1 << 20
"""Bytes that are kept to be written again: after so many, files are brought to the disk before there is a signature."""

_NAME: Final = re.compile(r"([0-9]+)-([0-9]+)" + re.escape(SUFFIX))

Sync = Literal["never", "checkpoint", "always"]
"""When what was written is brought to the disk: when the kernel likes, at each signature, after each write."""


def path_of(folder: Path, recording: int, part: int) -> Path:
    """Names that sort in the order of the records."""
    return folder / f"{recording:08}-{part:04}{SUFFIX}"


class LogFiles:
    """Where lines go. For one thread at a time. Files have mode 0600.

    `number` records were written whole, of `total` bytes; `durable` of them as safely as `sync` asks. `links` are those
    that are not durable yet, in their order; more are added at the end.
    """

    def __init__(self, folder: Path, recording: int, sync: Sync) -> None:
        self._folder, self._recording, self._sync = folder, recording, sync
        self._fd, self._size, self._path = -1, 0, folder
        self.number = self.total = self.durable = 0
        self.links: list[Link] = []
        self._done = 0  # how many of the links were written
        self._durable_size = self._durable_total = 0
        self._torn = False  # whether there may be something after the last whole line

    def write(self) -> None:
        """Write what is left of `links`. After a failure it goes on, again, from what is safe.

        Raises StorageError, UsageError FILE_EXISTS.
        """
        while self._done < len(self.links):
            if self.links[self._done].part:
                self._begin(self.links[self._done])
                continue
            batch = self.links[self._done : self._done + _BATCH]
            batch = batch[: next((place for place, link in enumerate(batch) if link.part), len(batch))]
            self._append(b"".join(link.line + b"\n" for link in batch))
            self._done += len(batch)
            self.number, self.total = batch[-1].number, batch[-1].total
            if self._sync != "checkpoint" or self._size - self._durable_size > _HELD:
                self._settle()
        if self._done and self.links[self._done - 1].closed > self.durable:
            self._settle()

    def close(self) -> None:
        """Nothing is written any more. Doing it again changes nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def withdraw(self) -> None:
        """Take back the file that was begun last. Raises StorageError."""
        self.close()
        with storage.reporting(self._path):
            self._path.unlink(missing_ok=True)

    def _begin(self, link: Link) -> None:
        if self._done:
            self._settle()
        path = path_of(self._folder, self._recording, link.part)
        fd = -1
        try:
            with storage.new_file(path, 0o600) as file:  # whole or not at all: what has a name says what it belongs to
                file.write(link.line + b"\n")
                with storage.reporting(path):
                    fd = storage.above_standard(os.dup(file.fileno()))  # before it has a name: to be tried again
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        self.close()
        self._fd, self._torn = fd, False
        self._path, self._size = path, len(link.line) + 1
        self.number, self.total, self._done = link.number, link.total, 1
        self._settled()

    def _append(self, data: bytes) -> None:
        """All or nothing: after a failure the next try begins where the last whole line ended."""
        view, at = memoryview(data), self._size
        with storage.reporting(self._path):
            try:
                if self._torn:  # each call of the system may cost 5 ms, where another thread is busy
                    os.ftruncate(self._fd, at)
                self._torn = True
                while view:
                    done = os.pwrite(self._fd, view, at)
                    view, at = view[done:], at + done
            except OSError:
                with suppress(OSError):  # of a disk that fails altogether; then the next try does it
                    os.ftruncate(self._fd, self._size)
                raise
        self._size += len(data)
        self._torn = False

    def _settle(self) -> None:
        """Make what was written durable; where that fails, it is to be written again.

        Linux tells once of pages that it could not write, and takes them for written from then on.
        """
        with storage.reporting(self._path):
            try:
                if self._sync != "never":
                    os.fdatasync(self._fd)
            except OSError:
                self._done, self._size, self._torn = 0, self._durable_size, True
                self.number, self.total = self.durable, self._durable_total
                raise
        self._settled()

    def _settled(self) -> None:
        self.durable, self._durable_size, self._durable_total = self.number, self._size, self.total
        del self.links[: self._done]
        self._done = 0


def files_of(folder: Path) -> dict[int, list[Path]]:
    """The files in a folder by their recordings, each in the order of its parts. Raises StorageError.

    A name that `path_of` does not make is no file of a recording.
    """
    found: dict[int, list[tuple[int, Path]]] = {}
    with storage.reporting(folder):
        for path in folder.iterdir():
            if match := _NAME.fullmatch(path.name):
                recording, part = int(match[1]), int(match[2])
                if recording and part and path == path_of(folder, recording, part):
                    found.setdefault(recording, []).append((part, path))
    return {recording: [path for _, path in sorted(parts)] for recording, parts in sorted(found.items())}


def first_line(path: Path) -> bytes:
    """Without its newline; what is too long for a line is cut. Raises UsageError, StorageError."""
    with storage.OpenFile(path) as file:
        return file.read(LINE_LIMIT + 1, 0).partition(b"\n")[0]


def last_digest(path: Path) -> bytes | None:
    """The digest of the last whole line of a file; None where there is none. Raises UsageError, StorageError."""
    with storage.OpenFile(path) as file:
        size = min(file.size, 2 * LINE_LIMIT)
        tail = file.read(size, file.size - size)
    lines = tail.split(b"\n")[:-1]  # what follows the last newline was cut in the middle
    return digest(lines[-1]) if lines else None
