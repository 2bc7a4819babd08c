"""Running a program that is not Python over an open model, for as long as the license allows it."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import stat
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from hwlicense.core.errors import Reason, UsageError
from hwlicense.device.keeping import FORWARDED, Mount
from hwlicense.device.memory import MountedFile, SealedFile
from hwlicense.device.serving import Server, pair
from hwlicense.device.tree import absent, setting_up, unusable
from hwlicense.storage import reporting

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hwlicense.core.documents import Member
    from hwlicense.core.errors import HwlicenseError
    from hwlicense.device.model import Model
    from hwlicense.device.tree import Tree

PERIOD: Final = 0.25
"""Seconds between looks at whether the hardware is still there."""

TERMINATING: Final = 10.0
"""Seconds from SIGTERM to SIGKILL, where it does not."""

_SPARE: Final = 16  # files and pages beyond what the members take: the root folder, and the kernel's own


def mount(path: Path, members: Sequence[Member], *, executable: bool) -> Mount:
    """What `path` must hold. Raises UsageError where it is no empty folder."""
    with reporting(path):
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise UsageError(Reason.USAGE, f"{path} is no folder; a link to one will not do.", "Give an empty folder.")
        if any(path.iterdir()):
            raise UsageError(Reason.USAGE, f"{path} is not empty: its files would be hidden.", "Give an empty folder.")
    page = os.sysconf("SC_PAGE_SIZE")
    size = sum(-(-member.size // page) * page for member in members) + _SPARE * page
    folders = {folder for member in members for folder in PurePosixPath(member.name).parents}
    return Mount(path.absolute(), size, len(members) + len(folders) + _SPARE, executable)


def check_command(name: str, at: Path | None, *, executable: bool) -> None:
    """Raises UsageError COMMAND_ABSENT or COMMAND_UNUSABLE for what would not run, before the license is asked.

    What is to lie in the folder `at` cannot be looked at yet, but for whether it may be `executable`.
    """
    if at and "/" in name and Path(os.path.abspath(name)).is_relative_to(os.path.abspath(at)):  # noqa: PTH100  # ".." goes
        if not executable:
            raise unusable(name, f"what lies in {at} is not to be run")
        return
    if at is None and re.fullmatch(r"\{.+\}", name):
        what = f"With --fd, COMMAND itself cannot come from the package ({name})."
        raise UsageError(Reason.COMMAND_ABSENT, what, "Use --at and --executable.")
    if shutil.which(name) is None:
        raise unusable(name, "no program, or no permission") if "/" in name and Path(name).exists() else absent(name)


class Program:
    """A program over an open model: its members in place, its process tree, its private socket.

    `fault` is a fault of our own by which one of its connections ended; the program went on.
    """

    def __init__(self, model: Model, tree: Tree) -> None:
        """Decrypts the members. Raises StorageError where memory is short, and as `Model.read`."""
        self._model, self._tree = model, tree
        self.fault: HwlicenseError | None = None
        self._files: list[MountedFile | SealedFile] = [self._placed(name) for name in model.names]

    def run(self) -> int:
        """Run it to its end: its exit status, 128+n where signal n ended it.

        Raises what became of the license, once no process of the tree is left.
        """
        server = Server(self._model)
        try:
            with setting_up(), _woken() as woken:
                descriptors = [file.fd for file in self._files if isinstance(file, SealedFile)]
                with server.connect() as connection:
                    self._tree.run(connection, descriptors)
                return self._watched(server, woken)
        finally:
            server.close()
            self.fault = server.fault

    def _watched(self, server: Server, woken: socket.socket) -> int:
        refusal: HwlicenseError | None = None
        give_up = 0.0
        poll = select.poll()
        poll.register(self._tree, select.POLLIN)
        poll.register(woken, select.POLLIN)
        while True:
            ready = {number for number, _ in poll.poll(PERIOD * 1000)}
            if self._tree.fileno() in ready:
                status = self._tree.wait()
                if refusal:
                    raise refusal.again()
                return status
            if woken.fileno() in ready:
                for number in woken.recv(64):
                    self._tree.signal(number)
            if refusal is None:
                refusal = self._refusal(server)
                if refusal:
                    self._tree.terminate()
                    give_up = time.monotonic() + TERMINATING
            elif time.monotonic() > give_up:
                self._tree.kill()

    def _refusal(self, server: Server) -> HwlicenseError | None:
        """Why the program must end: its hardware is gone, and nothing under way is kept from interruption.

        Whatever else comes to an end, limits and dates, ends no program: it is told when it asks.
        """
        return self._model.standing().refusal if self._model.locked and not server.session_under_way() else None

    def _placed(self, name: str) -> MountedFile | SealedFile:
        size, fill = self._model.size(name), partial(self._model.readinto, name)
        folder = self._tree.folder
        if folder < 0:
            return SealedFile(size, fill)
        with reporting(Path(name)):
            for parent in reversed(PurePosixPath(name).parents[:-1]):
                try:
                    os.mkdir(parent, 0o700, dir_fd=folder)
                except FileExistsError:
                    continue
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(name, flags, self._tree.mode, dir_fd=folder)
        return MountedFile(fd, size, fill, swappable=self._tree.swappable)


@contextmanager
def _woken() -> Iterator[socket.socket]:
    """The numbers of signals that come in meanwhile, as bytes. Those that were ignored stay so."""
    reading, writing = pair(socket.SOCK_STREAM)
    writing.settimeout(0)
    kept = {number: signal.getsignal(number) for number in FORWARDED}
    with reading, writing:
        before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        for number, handler in kept.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, lambda _number, _frame: None)
        try:
            yield reading
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)
