"""The keeper of a program's process tree: what it sets up, and how it sees to everybody's end. See `tree`."""

from __future__ import annotations

import array
import errno
import json
import os
import re
import resource
import select
import signal
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from hwlicense.core.errors import unforeseen
from hwlicense.device import namespaces
from hwlicense.device.memory import forbid_dumps
from hwlicense.device.serving import pair
from hwlicense.storage import above_standard

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

FORWARDED: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that COMMAND gets when hwlicense does."""

BATCH: Final = 100
"""Descriptors in one message."""

_MESSAGE: Final = 4096
_NO_LONGER: Final = 10.0  # seconds that killed processes are waited for
_NO_CORE: Final = 1
"""Bytes of a core dump: 0 would still let one be piped to a collector, 1 forbids that too (core(5), and the kernel's
`coredump.c`, where it is a value of its own)."""


class Mount(NamedTuple):
    """Where the members are seen: `size` bytes in so many `files`, folders among them."""

    path: Path
    size: int
    files: int
    executable: bool


def child(
    control: socket.socket, theirs: socket.socket, command: Sequence[str], mount: Mount | None, names: Sequence[str]
) -> NoReturn:
    """What the forked process does instead of what its parent would go on with."""
    status = 1
    try:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        theirs.close()
        status = _Keeper(control, command, mount, names, mask).keep()
    except BaseException as error:  # noqa: BLE001  # nothing of the parent's may run here; it hears of the error
        number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
        told = f"keeper {number}" if number else f"fault {unforeseen(error).what}"
        with suppress(OSError):
            control.send(told.encode())
    finally:
        os._exit(status)


class _Keeper:
    def __init__(
        self,
        control: socket.socket,
        command: Sequence[str],
        mount: Mount | None,
        names: Sequence[str],
        mask: Iterable[int],
    ) -> None:
        """`mask`: signals that COMMAND starts with blocked."""
        self._control, self._arguments, self._mount, self._names = control, command, mount, names
        self._mask = mask
        self._folder, self._members = -1, list[int]()
        self._command = 0

    def keep(self) -> int:
        """Set everything up, and keep COMMAND until it or hwlicense ends. What to exit with."""
        step = "namespaces"
        try:
            if self._mount:
                namespaces.leave()
                if child := os.fork():
                    self._say(f"kept {child}")
                    return 0
                if not self._begun():
                    return 1
                namespaces.signal_from_parents_end(signal.SIGKILL)
                namespaces.separate()
            else:
                namespaces.adopt_orphans()
                self._say(f"kept {os.getpid()}")
                if not self._begun():
                    return 1
                namespaces.signal_from_parents_end(signal.SIGCONT)  # one that a terminal has stopped must notice
            said = "ready swap"
            if self._mount:
                step = "folder"
                below = os.open(self._mount.path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                step = "memory"
                if self._mounted(self._mount, below):
                    said = "ready noswap"
        except OSError as error:
            if not error.errno:  # a fault of our own
                raise
            self._say(f"{step} {error.errno}")
            return 1
        forbid_dumps()  # who could stop and lead this process could have it mount and show what it likes
        socket.send_fds(self._control, [said.encode()], [self._folder] if self._mount else [])
        return self._obey()

    def _begun(self) -> bool:
        """Whether hwlicense, and nobody between, is this process's parent by now."""
        return received(self._control)[0] == ["begin"]

    def _mounted(self, mount: Mount, below: int) -> bool:
        """Mount on an open folder, and see it from within. Whether it stays out of swap."""
        here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        within = os.path.samestat(os.fstat(here), os.fstat(below))
        os.close(here)
        outside = namespaces.mount_memory(below, mount.size, mount.files, executable=mount.executable)
        self._folder = os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        covered, found = os.fstat(below), os.fstat(self._folder)
        os.close(below)
        # The path may lead elsewhere by now: nothing is decrypted into what is not the memory that was mounted
        own = (stat.S_IMODE(found.st_mode), found.st_uid) == (0o700, os.geteuid())
        if found.st_dev == covered.st_dev or not own or not namespaces.in_memory(self._folder):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if within:
            os.fchdir(self._folder)
        return outside

    def _say(self, line: str) -> None:
        self._control.send(line.encode())

    def _obey(self) -> int:
        woken, waking = pair(socket.SOCK_STREAM)
        waking.settimeout(0)
        signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        while True:
            ready, _, _ = select.select([self._control, woken], [], [])
            if woken in ready:
                woken.recv(_MESSAGE)
                if (status := self._reap()) is not None:
                    return self._ended(status)
            if self._control in ready:
                words, numbers = received(self._control)
                if words == [""]:  # hwlicense has ended
                    return self._ended(1)
                self._do(words, numbers)

    def _do(self, words: list[str], numbers: list[int]) -> None:
        match words, numbers:
            case ["members"], _:
                self._members += [above_standard(number) for number in numbers]
            case ["run"], [connection]:
                self._start(above_standard(connection))
            case ["signal", number], _:
                self._pass_on(int(number))
            case ["terminate"], _:
                self._terminate()
            case _:
                raise ValueError(f"no message for a keeper: {words[0]} with {len(numbers)} descriptors")

    def _ended(self, status: int) -> int:
        if not self._mount:  # the kernel does it for a namespace, when this process is gone
            end_descendants()
        return status

    def _reap(self) -> int | None:
        """The exit status of COMMAND, if it has ended."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._command:
                    status = os.waitstatus_to_exitcode(ended[1])
                    return 128 - status if status < 0 else status
        return None

    def _start(self, connection: int) -> None:
        if self._mount:
            namespaces.make_read_only(self._folder, executable=self._mount.executable)
        environment = {**os.environ, "HWLICENSE_SOCKET": str(connection)}
        environment.pop("HWLICENSE_FDS", None)  # of an `exec` around this one
        arguments = list(self._arguments)
        if self._names:
            numbers = dict(zip(self._names, self._members, strict=True))
            environment["HWLICENSE_FDS"] = json.dumps(numbers)
            arguments = [_filled(argument, numbers) for argument in arguments]
        reading, writing = os.pipe2(os.O_CLOEXEC)
        keeper = os.getpid()
        self._command = os.fork()
        if not self._command:
            self._become(keeper, arguments, environment, [connection, *self._members], writing)
        os.close(writing)
        failed = os.read(reading, 16)
        for number in (reading, connection, *self._members):
            os.close(number)
        if self._folder >= 0:
            os.close(self._folder)
        self._say(f"command {failed.decode()}" if failed else "started")

    def _become(
        self, keeper: int, arguments: list[str], environment: dict[str, str], passed: Sequence[int], writing: int
    ) -> None:
        """Become COMMAND; never returns."""
        number = errno.EIO
        try:
            namespaces.signal_from_parents_end(signal.SIGKILL)
            if os.getppid() != keeper:
                return  # it ended just before
            hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
            most = _NO_CORE if hard == resource.RLIM_INFINITY else min(_NO_CORE, hard)
            resource.setrlimit(resource.RLIMIT_CORE, (most, most))
            for each in passed:
                os.set_inheritable(each, True)  # noqa: FBT003  # its name says what
            for changed in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD):  # Python's own settings
                signal.signal(changed, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            os.execvpe(arguments[0], arguments, environment)  # noqa: S606  # COMMAND is what the caller asks for
        except OSError as error:
            number = error.errno or number
        finally:
            os.write(writing, str(number).encode())
            os._exit(1)

    def _pass_on(self, number: int) -> None:
        found = signal.sigtimedwait([number], 0)  # of others that wait, word is still to come
        from_terminal = found is not None and found.si_code > 0  # by the kernel: to the whole group
        if self._command and not from_terminal:
            os.kill(self._command, number)

    def _terminate(self) -> None:
        if self._mount:
            with suppress(ProcessLookupError):
                os.kill(-1, signal.SIGTERM)  # all of the namespace but this process
        else:
            _signal_all(descendants(os.getpid()), signal.SIGTERM)


def _filled(argument: str, numbers: dict[str, int]) -> str:
    """`argument` with a path in the place of each {member}; other braces stay."""
    return re.sub(r"\{([^{}]*)\}", lambda m: f"/proc/self/fd/{numbers[m[1]]}" if m[1] in numbers else m[0], argument)


def end_descendants(spared: Collection[int] = ()) -> None:
    """SIGKILL all processes below this one but those `spared`, and wait until they are gone: 10 s at the most."""
    give_up = time.monotonic() + _NO_LONGER
    while (found := descendants(os.getpid(), spared)) and time.monotonic() < give_up:
        _signal_all(found, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.002)


def descendants(ancestor: int, spared: Collection[int] = ()) -> set[int]:
    """Processes below this one, but those `spared` and what is below them."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # ended meanwhile
                parents[int(entry.name)] = int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])
    found, more = set[int](), {ancestor}
    while more:
        more = {pid for pid, parent in parents.items() if parent in more} - found - set(spared)
        found |= more
    return found


def _signal_all(pids: set[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):  # ended meanwhile; or of another user, by its own doing
            os.kill(pid, number)


def received(control: socket.socket) -> tuple[list[str], list[int]]:
    """The words of a message, none where the other side has ended, and what descriptors came with it."""
    size = socket.CMSG_SPACE(BATCH * array.array("i").itemsize)
    try:
        part, found, flags, _ = control.recvmsg(_MESSAGE, size, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return [""], []
    numbers = array.array("i")
    for _, _, data in found:
        numbers.frombytes(data)
    if flags & socket.MSG_CTRUNC:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return part.decode().split() or [""], list(numbers)
