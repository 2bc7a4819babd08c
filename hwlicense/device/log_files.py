"""The files of one recording: written in order, and mended where the disk was full in the middle of a record."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Literal

from hwlicense import storage
from hwlicense.core.chain import LINE_LIMIT, digest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hwlicense.core.chain import Link

SUFFIX: Final = ".hwout"
_BATCH: Final = 1024
"""Lines of one write."""

_NAME: Final = re.compile(r"([0-9]+)-([0-9]+)" + re.escape(SUFFIX))

Sync = Literal["never", "checkpoint", "always"]
"""When what was written is brought to the disk: when the kernel likes, at each signature, after each write."""


def path_of(folder: Path, recording: int, part: int) -> Path:
    """Names that sort in the order of the records."""
    return folder / f"{recording:08}-{part:04}{SUFFIX}"


class LogFiles:
    """Where lines go. For one thread at a time. Files have mode 0600.

    `number` records were written whole, `durable` of them as safely as `sync` asks.
    """

    def __init__(self, folder: Path, recording: int, sync: Sync) -> None:
        self._folder, self._recording, self._sync = folder, recording, sync
        self._fd, self._size, self._path = -1, 0, folder
        self.number = self.durable = 0
        self._torn = False  # whether a write did not come to its end
        self._signed = False  # whether there is a signature that is not on the disk yet

    def write(self, links: Sequence[Link]) -> None:
        """Write lines; again, after a failure, those from `number` on. Raises StorageError, UsageError FILE_EXISTS."""
        todo = [link for link in links if link.number > self.number]
        while todo:
            if todo[0].part:
                self._begin(todo.pop(0))
                continue
            batch = todo[:_BATCH]
            batch = batch[: next((place for place, link in enumerate(batch) if link.part), len(batch))]
            self._append(b"".join(link.line + b"\n" for link in batch))
            self.number = batch[-1].number
            del todo[: len(batch)]
            self._signed |= batch[-1].closed > self.durable
            if self._sync == "always":
                self._to_disk()
        if self._signed and self._sync == "checkpoint":
            self._to_disk()
        if self._sync == "never":
            self.durable = self.number

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
        if self._fd >= 0 and self._sync != "never":
            self._to_disk()
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
        self.number = self.durable = link.number

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

    def _to_disk(self) -> None:
        with storage.reporting(self._path):
            os.fdatasync(self._fd)
        self.durable, self._signed = self.number, False


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
