"""What all processes share that have a license open: its account as it is now, in memory that no file leads to.

The first process makes the memory. Each further one asks for it at a socket in the state folder, and is given it when
it has shown that it knows the license's key; whoever is there answers. So nobody puts it back to an earlier state by
writing a file, and it is gone with the last process. One that is killed leaves it whole.
"""

from __future__ import annotations

import array
import errno
import fcntl
import hmac
import os
import secrets
import select
import socket
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hwlicense import storage
from hwlicense.core.errors import DamagedError, HwlicenseError, Reason, StorageError, UsageError
from hwlicense.device.locking import LockedFile, holders
from hwlicense.device.memory import memory_file
from hwlicense.device.records import PAGE, Records
from hwlicense.threads import begin

if TYPE_CHECKING:
    from collections.abc import Iterator

_FD: Final = array.array("i").itemsize
PATIENCE: Final = 10.0
"""Seconds to wait for the memory."""

_NAME: Final = "join"
_NONCE: Final = 32
_LOOK: Final = b"look"
_ANSWER: Final = 1.0  # seconds to wait for what the other says next
_WAITING: Final = 64
_NO_SOCKETS: Final = {errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL}
_NOT_NOW: Final = (ConnectionError, TimeoutError, BlockingIOError, FileNotFoundError)
_POLL: Final = 0.02
_LARGEST: Final = 1 << 20

MEND: Final = "Close every process that uses the license, and open it again."
"""What a user is to do about an account that was tampered with."""


class Shared:
    """An account in memory. Raises StorageError, DamagedError."""

    def __init__(self, file: LockedFile, records: Records) -> None:
        """`file` is taken over."""
        self.file, self._records, self._sequence = file, records, 0

    @classmethod
    def made(cls, path: Path, records: Records) -> Shared:
        """New memory, with nothing in it. Errors call it `path`."""
        with storage.reporting(path):
            file = LockedFile(path, memory_file())
            os.ftruncate(file.fd, PAGE + 2 * records.place)
            fcntl.fcntl(file.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return cls(file, records)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let one process at a time change it."""
        with self.file.locked():
            yield

    def snapshot(self) -> bytes:
        """The account. Raises DamagedError HOME_DAMAGED where someone else wrote there."""
        chosen = self.file.read(1, 0) == b"\1"
        raw = self.file.read(self._records.length, PAGE + chosen * self._records.place)
        found = self._records.opened(b"shared", raw)
        if found is None or found[0] < self._sequence:
            what = "The license's account was changed by something else while the license was open."
            raise DamagedError(Reason.HOME_DAMAGED, what, MEND)
        self._sequence = found[0]
        return found[1]

    def share(self, account: bytes) -> None:
        """Replace it: wholly, or not at all if the process is killed."""
        other = self.file.read(1, 0) != b"\1"
        self.file.write(self._records.made(b"shared", self._sequence + 1, account), PAGE + other * self._records.place)
        self.file.write(bytes([other]), 0)
        self._sequence += 1

    def close(self) -> None:
        """Let go of the memory."""
        self.file.close()


class Door:
    """The socket at which further processes ask. Every process that has the license open answers there."""

    def __init__(self, listener: socket.socket, shared: Shared, records: Records) -> None:
        """`listener` is taken over."""
        self._listener, self._shared, self._records = listener, shared, records
        self.after_fork()

    def after_fork(self) -> None:
        """In a forked child: nobody of this process answers yet."""
        self._thread: threading.Thread | None = None
        with storage.reporting(self._shared.file.path):
            self._end, self._ending = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)

    def serve(self) -> None:
        """Have a thread answer from now on. Raises StorageError where the system gives none."""
        if self._thread is None:
            self._thread = begin("account", self._answer_all, self._ending)

    def close(self) -> None:
        """End the thread. Others go on answering."""
        self._end.close()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(PATIENCE)
        self._ending.close()
        self._listener.close()

    def _answer_all(self, ending: socket.socket) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(ending, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if ending.fileno() in ready or ending.fileno() < 0:
                return
            try:
                asking, _ = self._listener.accept()
            except OSError:  # another process was quicker, or no descriptor is free
                time.sleep(_POLL)
                continue
            with asking, suppress(OSError, HwlicenseError):  # whoever asked says what went wrong
                asking.settimeout(_ANSWER)
                self._answer(asking)

    def _answer(self, asking: socket.socket) -> None:
        nonce = secrets.token_bytes(_NONCE)
        asking.send(nonce)
        asked = asking.recv(2 * _NONCE)
        theirs = asked[:_NONCE]
        if asked == _LOOK:
            with self._shared.locked():
                asking.send(self._shared.snapshot())
        elif hmac.compare_digest(asked, theirs + self._records.code(b"join" + nonce + theirs)):
            both = [self._shared.file.fd, self._listener.fileno()]
            socket.send_fds(asking, [self._records.code(b"joined" + nonce + theirs)], both)


def opened(folder: Path, shared: Shared, records: Records) -> Door | None:
    """A door at a new socket; None where the file system has no sockets: then one process at a time has the license."""
    with storage.reporting(folder / _NAME), _name(folder) as name:
        Path(name).unlink(missing_ok=True)
        listener = _socket()
        try:
            listener.bind(name)
            listener.listen(_WAITING)
            listener.settimeout(0)
            return Door(listener, shared, records)
        except BaseException as error:
            listener.close()
            if isinstance(error, OSError) and error.errno in _NO_SOCKETS:
                return None
            raise


def forget(folder: Path) -> None:
    """Remove the socket, where it can be."""
    with suppress(OSError):
        (folder / _NAME).unlink(missing_ok=True)


def joined(folder: Path, records: Records) -> tuple[Shared, Door]:
    """What the processes that have the license open share, and their door. Raises StorageError."""
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        if not (folder / _NAME).exists():
            what = (
                f"The license is open in a process, and {folder} has no socket to join it at: removed, or impossible."
            )
            raise StorageError(
                Reason.STORAGE, what, "Keep the state folder (--state) on a local disk that has sockets."
            )
        # Where one that answers is in the middle of its end, the next try tells.
        with storage.reporting(folder / _NAME), suppress(*_NOT_NOW), _asking(folder) as asking:
            nonce, mine = asking.recv(_NONCE), secrets.token_bytes(_NONCE)
            asking.send(mine + records.code(b"join" + nonce + mine))
            # Not recv_fds, which drops its flags in Python 3.11: the descriptors would outlast an execve
            code, given, _, _ = asking.recvmsg(_NONCE, socket.CMSG_SPACE(2 * _FD), socket.MSG_CMSG_CLOEXEC)
            numbers = array.array("i")
            for _, _, data in given:
                numbers.frombytes(data[: len(data) - len(data) % _FD])
            fds = [storage.above_standard(fd) for fd in numbers]
            if len(fds) == 2 and hmac.compare_digest(code, records.code(b"joined" + nonce + mine)):  # noqa: PLR2004
                return _taken(folder, fds, records)
            for fd in fds:
                os.close(fd)
        time.sleep(_POLL)
    raise _unanswered(folder / "alive")


def _taken(folder: Path, fds: list[int], records: Records) -> tuple[Shared, Door]:
    listener = socket.socket(fileno=fds[1])
    file = LockedFile(folder, fds[0])
    try:
        file.after_fork()  # a lock of its own
        shared = Shared(file, records)
        return shared, Door(listener, shared, records)
    except BaseException:
        file.close()
        listener.close()
        raise


def check_answered(alive: Path) -> None:
    """That somebody answers, where the license is open. Asked before hardware is: joining in vain would cost an open.

    `alive` is what those lock who have it open. Raises StorageError.
    """
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            with storage.OpenFile(alive) as file:
                if storage.taken(file.fd, alive) or seen(alive.parent) is not None:
                    return
        except UsageError:  # there is no such file: nobody has
            return
        if not (alive.parent / _NAME).exists():  # joining says what that means
            return
        if time.monotonic() > give_up:
            raise _unanswered(alive)
        time.sleep(_POLL)


def _unanswered(alive: Path) -> StorageError:
    pids = [pid for pid in (holders([alive.stat()]) if alive.exists() else ()) if pid != os.getpid()]
    named = f" ({', '.join(f'process {pid}' for pid in pids)})" if pids else ""
    what = (
        f"The license is open in a process that does not answer{named}: it is stopped, or a child that never used it."
    )
    return StorageError(Reason.STORAGE, what, f"End that process, or let it go on (`lsof {alive}`).")


def seen(folder: Path) -> bytes | None:
    """The account as those say who have the license open, unchecked; None where nobody answers."""
    try:
        with _asking(folder) as asking:
            asking.recv(_NONCE)
            asking.send(_LOOK)
            return asking.recv(_LARGEST) or None
    except OSError:
        return None


@contextmanager
def _asking(folder: Path) -> Iterator[socket.socket]:
    with (
        _name(folder) as name,
        _socket() as asking,
    ):
        asking.settimeout(_ANSWER)
        asking.connect(name)
        yield asking


@contextmanager
def _name(folder: Path) -> Iterator[str]:
    """An address of the socket that is short, wherever the folder is: unix(7) has room for 107 bytes."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{_NAME}"
    finally:
        os.close(fd)


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    return socket.socket(fileno=storage.above_standard(made.detach()))
