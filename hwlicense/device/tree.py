"""The processes around a program that is not Python, and how they end together.

    hwlicense ── keeper ── COMMAND ── whatever that starts

The keeper is forked before anything secret is in memory. In namespaces of its own it is their first process: when it
ends, the kernel kills all that live there and frees what was mounted. Without namespaces it adopts what COMMAND leaves
behind, and kills it. It ends when hwlicense does, and COMMAND when it does, each by a signal of the kernel
(PR_SET_PDEATHSIG, prctl(2)): so whichever is killed, nothing stays.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, Self

from hwlicense.core.errors import REPORT, HwlicenseError, Reason, StorageError, UsageError
from hwlicense.device import keeping, namespaces
from hwlicense.device.serving import pair
from hwlicense.storage import HINTS, above_standard

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hwlicense.device.keeping import Mount

_REFUSALS: Final = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EINVAL, errno.EUSERS}
"""Of namespaces and mounts, as is ENOSPC of namespaces: beyond user.max_user_namespaces (user_namespaces(7))."""


class Tree:
    """COMMAND and its keeper. A context manager: at its end no process of them is left."""

    def __init__(self, command: Sequence[str], mount: Mount | None, names: Sequence[str] = ()) -> None:
        """`names` are the descriptors that `run` is given. Raises UsageError, StorageError.

        Call it in a process without threads and secrets: it forks. `folder` is what was mounted, open, and `swappable`
        whether it is kept out of swap by nothing.
        """
        self.command, self._mount = command, mount
        self.folder, self.swappable = -1, True
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who ignores it is told of no child's end
        with setting_up():
            self._others = keeping.descendants(os.getpid())  # a shell that has become this process may have left some
            namespaces.adopt_orphans()
            self._control, theirs = pair(socket.SOCK_SEQPACKET)
            self.keeper = 0
            try:
                self._start(theirs, names)
            except BaseException:
                self.close()
                raise

    def _start(self, theirs: socket.socket, names: Sequence[str]) -> None:
        with theirs:
            self.keeper = first = os.fork()
            if not first:
                keeping.child(theirs, self._control, self.command, self._mount, names)
        answer, numbers = self._receive()
        if answer[0] == "kept":
            self.keeper = int(answer[1])
            if self.keeper != first:
                os.waitpid(first, 0)  # now the keeper is a child of this process
            self._tell("begin")
            answer, numbers = self._receive()
        self._expect("ready", answer)
        if self._mount:
            self.folder, self.swappable = above_standard(numbers[0]), answer[1] != "noswap"

    @property
    def mode(self) -> int:
        """Of the files that are mounted."""
        return 0o500 if self._mount and self._mount.executable else 0o400

    def run(self, connection: socket.socket, members: Sequence[int] = ()) -> None:
        """Start COMMAND, with one end of its private socket and the descriptors of `names`.

        Raises UsageError COMMAND_ABSENT, COMMAND_UNUSABLE, StorageError.
        """
        if self.folder >= 0:
            os.close(self.folder)
            self.folder = -1
        for start in range(0, len(members), keeping.BATCH):
            self._send("members", *members[start : start + keeping.BATCH])
        self._send("run", connection.fileno())
        self._expect("started", self._receive()[0])

    def fileno(self) -> int:
        """For select(2): readable when the keeper has ended."""
        return self._control.fileno()

    def signal(self, number: int) -> None:
        """Pass a signal on to COMMAND, unless a terminal has sent it to both."""
        self._tell(f"signal {number}")

    def terminate(self) -> None:
        """SIGTERM to the whole tree."""
        self._tell("terminate")

    def kill(self) -> None:
        """SIGKILL to the keeper, and so to the whole tree."""
        with suppress(ProcessLookupError):
            os.kill(self.keeper, signal.SIGKILL)

    def wait(self) -> int:
        """The exit status of COMMAND, 128+n where signal n ended it; waits for the keeper. Raises StorageError."""
        if self._control.fileno() >= 0 and (last := self._receive()[0])[0]:
            raise self._failure(last)
        status = os.waitstatus_to_exitcode(os.waitpid(self.keeper, 0)[1])
        self.keeper = 0
        return 128 - status if status < 0 else status

    def close(self) -> None:
        """Kill what is left."""
        self._control.close()
        if self.keeper:
            self.kill()
            with suppress(ChildProcessError):
                self.wait()
        if self.folder >= 0:
            os.close(self.folder)
            self.folder = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
        keeping.end_descendants(self._others)  # orphans of a tree whose keeper was killed

    def _send(self, word: str, *numbers: int) -> None:
        with suppress(BrokenPipeError):  # the keeper has ended: whoever reads its answer hears of it
            socket.send_fds(self._control, [word.encode()], numbers)

    def _tell(self, line: str) -> None:
        with suppress(BrokenPipeError):
            self._control.send(line.encode())

    def _receive(self) -> tuple[list[str], list[int]]:
        return keeping.received(self._control)

    def _expect(self, word: str, answer: list[str]) -> None:
        if answer[0] != word:
            raise self._failure(answer)

    def _failure(self, answer: list[str]) -> HwlicenseError:
        """What an answer means that is not the one hoped for."""
        if answer[0] == "fault":  # in the keeper, whose words these are
            return HwlicenseError(Reason.INTERNAL, " ".join(answer[1:]), REPORT)
        step, number = (answer[0], int(answer[1])) if len(answer) > 1 else ("ended", errno.ESRCH)
        why = os.strerror(number)
        match step:
            case "command" if number in {errno.ENOENT, errno.ENOTDIR}:
                return absent(self.command[0])
            case "command":
                return unusable(self.command[0], why)
            case "folder" | "memory" if self._mount and number in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
                return UsageError(Reason.FILE_ABSENT, f"{self._mount.path}: {why}.", "Give an empty folder as --at.")
            case "namespaces" | "memory" if number in _REFUSALS or (step, number) == ("namespaces", errno.ENOSPC):
                what = f"The system refuses this process namespaces and mounts of its own ({why})."
                hint = (
                    "Use --fd, which needs none; or allow user namespaces (user.max_user_namespaces), or run as root."
                )
                return StorageError(Reason.NAMESPACES_REFUSED, what, hint)
        what = f"The processes around COMMAND could not be set up ({step}: {why})."
        return StorageError(Reason.STORAGE, what, HINTS.get(number, "Check the limits of the process (`ulimit -a`)."))


@contextmanager
def setting_up() -> Iterator[None]:
    """Turn what the system refuses meanwhile into a StorageError."""
    try:
        yield
    except OSError as error:
        what = f"The processes around COMMAND could not be set up ({error.strerror or error})."
        hint = HINTS.get(error.errno or 0, "Check the limits of the process (`ulimit -a`).")
        raise StorageError(Reason.STORAGE, what, hint) from error


def absent(command: str) -> UsageError:
    """COMMAND is nowhere."""
    what = f"The command {command} was not found, or what it is to be run by was not."
    return UsageError(Reason.COMMAND_ABSENT, what, "Give the path of a program, or the name of one on PATH.")


def unusable(command: str, why: str) -> UsageError:
    """COMMAND is there."""
    what = f"{command} could not be run: {why}."
    return UsageError(Reason.COMMAND_UNUSABLE, what, "Make it executable; a program in DIR also takes --executable.")
