"""The application's side of a module's process: started when first used, asked one thing at a time, ended in time.

There is one for each module and application process, shared by whoever uses the module. It is never used across a fork:
a forked child lets go of the connection at once and starts a process of its own.
"""

from __future__ import annotations

import atexit
import fcntl
import math
import os
import re
import select
import socket
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hwlicense.binders.pkcs11 import failures, protocol
from hwlicense.binders.pkcs11.protocol import Done, Failed, Load
from hwlicense.core.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hwlicense.binders.pkcs11.protocol import AnyAnswer, Request

STARTING: Final = 20.0
"""Seconds for the interpreter and the module to load: some modules look at all readers first."""

ENDING: Final = 2.0
"""Seconds for a process to log out and finalize its module before it is killed."""

SLOW: Final = 1.5
"""Seconds after which a token that works may be waiting for a finger."""

PROGRAM: Final = (
    "import ctypes; ctypes.CDLL(None).prctl(4, 0, 0, 0, 0); "  # PR_SET_DUMPABLE, before anything is to be seen
    "import sys; sys.path += sys.argv[2:]; from hwlicense.binders.pkcs11.child import main; main(int(sys.argv[1]))"
)
_LIBRARIES: Final = ("hwlicense", "pkcs11", "asn1crypto", "msgspec", "cryptography", "typing_extensions")
_STANDARD_ERROR: Final = 2

# Never PYTHON*, LD_* or HWLICENSE_*: what a process is to run is not for the environment to say
_ENVIRONMENT: Final = re.compile(
    "HOME|USER|LANG|LC_.*|TZ|XDG_RUNTIME_DIR|TMPDIR"
    "|(SOFTHSM2|OPENSC|PCSCLITE|P11_KIT|PKCS11|YKCS11|CRYPTOKI|CS_PKCS11|CKNFAST|NFAST)_.*|ChrystokiConfigurationPath"
)

_registry = threading.RLock()
_starting = threading.RLock()  # held while a process is made, and while the application forks
_processes: dict[str, ModuleProcess] = {}


def borrow(path: str, user: object) -> ModuleProcess:
    """The process for a module. It stays until all users have given it back, or have gone."""
    with _registry:
        process = _processes.setdefault(path, ModuleProcess(path))
        process.users.add(user)
        return process


def give_back(path: str, user: object) -> None:
    """Ends the process if nobody else uses it. Raises HardwareError TOKEN_BUSY within a request of the same thread."""
    with _registry:
        process = _processes.get(path)
        if process is None or user not in process.users:
            return
        process.users.discard(user)
        used = bool(process.users)
    if not used:
        process.end_unused()  # which may take its time: others borrow meanwhile, and are looked for again


class ModuleProcess:
    """Threads take turns. What is asked is asked once: a PIN that is sent twice costs two tries."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.users: weakref.WeakSet[object] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._busy = False
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None
        self._started = 0.0

    def ask(
        self,
        request: Request,
        secret: Secret | None = None,
        slow: Callable[[], object] | None = None,
    ) -> tuple[AnyAnswer, Secret]:
        """The answer with its secret part, for whoever asked to wipe. `slow` is called once, where it takes long.

        Raises HardwareError: TOKEN_HUNG, TOKEN_CRASHED, TOKEN_FORGED for what is no answer, TOKEN_FAILED where the
        module cannot be loaded, TOKEN_BUSY within a request of the same thread.
        """
        with self._alone():
            if self._running is not None and _over(*self._running):
                self._end(ENDING)  # in between, when nothing was asked: nothing is repeated by starting anew
            if self._running is None:
                self._start()
            answer, content = self._exchange(request, secret, slow)
            if isinstance(answer, Failed) and answer.ending:
                self._end(ENDING)
            return answer, content

    def restart(self, before: float = math.inf) -> bool:
        """End the process if it was started `before` (time.monotonic). The next request starts another."""
        with self._alone():
            old = self._running is not None and self._started < before
            if old:
                self._end(ENDING)
            return old

    def end_unused(self) -> None:
        """End it unless somebody has borrowed it since."""
        with self._alone():
            if not self.users:
                self._end(ENDING)

    def end_now(self) -> None:
        """At the application's end. A process that a daemon thread still waits for ends with the connection."""
        if self._lock.acquire(timeout=ENDING):
            try:
                if not self._busy:
                    self._end(ENDING)
            finally:
                self._lock.release()

    def forget(self) -> None:
        """In a forked child: the connection and the process are the parent's, the lock may be held by no one here."""
        self._lock, self._busy = threading.RLock(), False
        running, self._running = self._running, None
        if running is not None:
            process, channel = running
            channel.close()  # of this copy: the parent's connection stays
            process.returncode = 0  # it is no child of ours, not even to be waited for

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._lock:
            if self._busy:
                raise failures.in_use()
            try:
                self._busy = True
                yield
            finally:
                self._busy = False

    def _start(self) -> None:
        if not sys.executable or getattr(sys, "frozen", None):
            raise failures.not_started(self.path, "this program has no Python interpreter to run")
        try:
            with _starting:
                self._running = _spawn()
        except OSError as error:
            raise failures.not_started(self.path, error.strerror or str(error)) from error
        self._started = time.monotonic()
        answer, _ = self._exchange(Load(STARTING, self.path), None, None)
        if not isinstance(answer, Done):
            self._end(ENDING)
            raise failures.refused(answer, self.path) if isinstance(answer, Failed) else failures.nonsense(self.path)

    def _exchange(
        self, request: Request, secret: Secret | None, slow: Callable[[], object] | None
    ) -> tuple[AnyAnswer, Secret]:
        assert self._running is not None  # noqa: S101  # started above
        process, channel = self._running
        wait, done = _Wait(channel, request.seconds, slow), False
        try:
            channel.settimeout(request.seconds)
            protocol.send(channel, request, None if secret is None else secret.buffer)
            answer, content = protocol.receive(channel, protocol.ANSWERS, wait)
            done = True
        except TimeoutError:
            if process.poll() is not None:  # a program that it started still holds the connection
                raise failures.crashed(self.path, process.returncode) from None
            self._end(0)
            raise failures.hung(self.path, request.seconds) from None
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                process.wait(ENDING)  # the connection ends a moment before the process does
            status = process.returncode
            if isinstance(request, Load) and status is not None and status > 0:
                why = f"{sys.executable} ended with status {status}"
                raise failures.not_started(self.path, why) from None
            raise failures.crashed(self.path, status) from None
        except ValueError:
            self._end(0)
            raise failures.nonsense(self.path) from None
        finally:
            if not done and self._running == (process, channel):
                # Whatever is still to come would be taken for the next answer. Not killed at once: it may be writing.
                self._end(ENDING)
        return answer, Secret(content)

    def _end(self, patience: float) -> None:
        if self._running is None:
            return
        (process, channel), self._running = self._running, None
        channel.close()
        try:
            if patience:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(patience)
        finally:
            if process.returncode is None:
                process.kill()
                with suppress(subprocess.TimeoutExpired):  # in a driver that cannot be interrupted it ends later
                    process.wait(ENDING)


def _over(process: subprocess.Popen[bytes], channel: socket.socket) -> bool:
    """Whether the process has ended, or says something that nobody asked for: what follows would be no answer."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    return process.poll() is not None or bool(poll.poll(0))


class _Wait:
    """Until something can be read. Raises TimeoutError after so many seconds in all."""

    def __init__(self, channel: socket.socket, seconds: float, slow: Callable[[], object] | None) -> None:
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        now = time.monotonic()
        self._deadline, self._slow_at, self._slow = now + seconds, now + SLOW, slow

    def __call__(self) -> None:
        while True:
            now = time.monotonic()
            if self._slow is not None and now >= self._slow_at:
                slow, self._slow = self._slow, None
                slow()
            if now >= self._deadline:
                raise TimeoutError
            until = self._deadline if self._slow is None else min(self._deadline, self._slow_at)
            if self._poll.poll(max(1, (until - now) * 1000)):
                return


def _spawn() -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = map(_above_standard, socket.socketpair())
    try:
        process = subprocess.Popen(  # noqa: S603  # the interpreter that runs this, with a constant program
            [sys.executable, "-I", "-S", "-c", PROGRAM, str(theirs.fileno()), *_folders()],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={name: value for name, value in os.environ.items() if _ENVIRONMENT.fullmatch(name)},
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return process, ours


def _folders() -> list[str]:
    """Where the process finds its half of this package and what it imports: exactly where this process does."""
    found: dict[str, None] = {}
    for name in _LIBRARIES:
        spec = find_spec(name)
        if spec is not None and spec.origin is not None:
            place = Path(spec.origin).absolute().parent
            found[str(place.parent if spec.submodule_search_locations else place)] = None
    return list(found)


def _above_standard(end: socket.socket) -> socket.socket:
    """The same end under a number above 2. A daemon may have closed those: what is then printed would be sent."""
    if end.fileno() > _STANDARD_ERROR:
        return end
    with end:
        return socket.socket(fileno=fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, _STANDARD_ERROR + 1))


def _before_fork() -> None:
    """Let no other thread be making a process: a child would inherit the process's own end of the connection."""
    _starting.acquire()


def _after_fork() -> None:
    _starting.release()


def _forget_all() -> None:
    """In a forked child, where other threads of the parent hold locks for ever."""
    global _registry, _starting
    _registry, _starting = threading.RLock(), threading.RLock()
    for process in tuple(_processes.values()):
        process.forget()


def _end_all() -> None:
    for process in tuple(_processes.values()):
        process.end_now()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_forget_all)
atexit.register(_end_all)
