"""What a simulator leaves behind: nothing. Processes and folders that end with the process that made them."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from hwlicense_simulators.errors import SimulatorError, program

if TYPE_CHECKING:
    from collections.abc import Sequence

_SOCKET_PATH = 107  # bytes: sizeof(sun_path) - 1, unix(7)
_LONGEST_NAME = len("/hwtpm-xxxxxxxx/wire-999.ctrl")

# Waits until its owner writes a line or dies; the owner's last descriptor is closed just before its children are
# killed, hence the second try.
_JANITOR = 'read -r line; cd /; n=0; until rm -rf -- "$1" || [ $n -ge 50 ]; do n=$((n+1)); sleep 0.1; done'


class ShortFolder:
    """A private folder (mode 0700) for sockets, whose path leaves room in a socket address.

    A small shell removes it when it is closed, and also when this process dies, even by SIGKILL.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="hwtpm-", dir=_base()))
        self._owner = os.getpid()
        self._janitor = subprocess.Popen(
            ["/bin/sh", "-c", _JANITOR, "sh", self.path],
            stdin=subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal is not for it
        )

    def close(self) -> None:
        """Remove the folder. Raises SimulatorError if that is impossible."""
        if self._janitor.returncode is not None or self._owner != os.getpid():
            return
        # A line, because a forked child may hold the pipe open.
        self._janitor.communicate(b"\n")
        if self.path.exists():
            raise SimulatorError(f"the folder {self.path} could not be removed")


def _base() -> str:
    for folder in (tempfile.gettempdir(), "/tmp"):  # noqa: S108  the folder made in it is private
        # A comma would end the path in the options of swtpm and in the name of a TCTI.
        short = len(os.fsencode(folder)) + _LONGEST_NAME <= _SOCKET_PATH
        if short and "," not in folder and os.access(folder, os.W_OK):
            return folder
    raise SimulatorError("there is no temporary folder with a short name", "set TMPDIR to one such as /tmp")


class Process:
    """A program that runs until it is killed here or this process dies, and is reaped at once.

    The kernel ties PR_SET_PDEATHSIG to the *thread* that started the program. So each has a thread of its own, which
    starts it and stays until it has ended; a thread of the caller may come and go.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._arguments = (program("setpriv"), "--pdeathsig", "KILL", *arguments)
        self._log = log
        self._owner = os.getpid()
        self._started = threading.Event()
        self._popen: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._live, name=f"{arguments[0]} keeper", daemon=True)

    def start(self) -> None:
        """Start the program. Raises SimulatorError."""
        self._thread.start()
        self._started.wait()
        if self._error:
            raise SimulatorError(f"{self._arguments[3]} could not be started: {self._error}") from self._error

    def _live(self) -> None:
        try:
            with self._log.open("wb") as log:
                self._popen = subprocess.Popen(
                    self._arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            self._error = error
            return
        finally:
            self._started.set()
        self._popen.wait()

    @property
    def pid(self) -> int:
        """The process id of the program."""
        if self._popen is None:
            raise SimulatorError(f"{self._arguments[3]} was not started")
        return self._popen.pid

    @property
    def running(self) -> bool:
        """Whether the program still runs."""
        return self._thread.is_alive()

    @property
    def output(self) -> str:
        """The last lines that the program wrote."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-5:])

    def kill(self) -> None:
        """End the program by SIGKILL and wait until it is gone. Does nothing in a forked child, whose it is not."""
        if self._owner != os.getpid() or not self._thread.ident:
            return
        self._started.wait()
        if self._popen is not None:
            self._popen.kill()
        self._thread.join()
