"""The private socket of a program that is not Python: lines in, lines out, over an open model.

It has no name anywhere: the program inherits one end, and whoever has a connection can hand in the end of another. Each
connection has a thread of its own here, so that who hangs, floods or lies keeps nobody waiting but itself.

    spend COUNT              ok, or: no REASON WAIT
    standing SECONDS COUNT   the same
    session COUNT            the same; until `end` or the connection's end
    end                      ok
    connect                  no answer: the end of a new connection comes with it (SCM_RIGHTS, unix(7))

WAIT is in seconds, `-` where waiting does not help. Whatever else is sent is answered by `no USAGE -`, and ends the
connection.
"""

from __future__ import annotations

import array
import math
import re
import socket
import threading
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final

from hwlicense.core.errors import ExceededError, HwlicenseError, Reason, StorageError, UsageError, unforeseen
from hwlicense.storage import above_standard
from hwlicense.threads import begin

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwlicense.device.model import Model

LINE: Final = 128
"""Bytes of a line, its end included, at the most."""

CONNECTIONS: Final = 256
"""At one time; further ones are closed at once."""

_LINE: Final = re.compile(
    rb"spend [0-9]{1,10}|standing [0-9]{1,10}(\.[0-9]{1,9})? [0-9]{1,10}|session [0-9]{1,10}|end|connect"
)
_NO_LINE: Final = b"no USAGE -\n"
_GOODBYE: Final = 1.0  # seconds that closing waits for what the threads have under way
_FD: Final = array.array("i").itemsize


class Server:
    """Answers the connections of one program, until `close`. `fault` is the first of our own faults meanwhile."""

    def __init__(self, model: Model) -> None:
        """The model stays the caller's, and open until this is closed."""
        self._model = model
        self._guard = threading.Lock()
        self._connections: dict[_Connection, threading.Thread] = {}
        self._closed = False
        self.fault: HwlicenseError | None = None

    def connect(self) -> socket.socket:
        """The program's end of a new connection. Raises OSError."""
        ours, theirs = pair(socket.SOCK_STREAM)
        self._adopt(ours)
        return theirs

    def session_under_way(self) -> bool:
        """Whether some procedure is still kept from interruption."""
        with self._guard:
            return any(time.monotonic() < connection.session_until for connection in self._connections)

    def close(self) -> None:
        """End all connections. What their sessions did not spend is given back."""
        with self._guard:
            self._closed = True
            threads = list(self._connections.items())
        for connection, _ in threads:
            connection.hang_up()
        give_up = time.monotonic() + _GOODBYE
        for _, thread in threads:
            thread.join(max(0.0, give_up - time.monotonic()))

    def _adopt(self, end: socket.socket) -> None:
        connection = _Connection(self._model, end, self._adopt_number)
        with self._guard:  # which the thread waits for before it takes itself off the list
            if not self._closed and len(self._connections) < CONNECTIONS:
                with suppress(StorageError):  # the client sees its connection end
                    self._connections[connection] = begin("socket", self._serve, connection)
                    return
        end.close()

    def _adopt_number(self, number: int) -> None:
        """Serve what a client handed in, where it is a connection."""
        number = above_standard(number)
        try:
            end = socket.socket(fileno=number)
        except OSError:  # no socket
            socket.close(number)
            return
        if end.family == socket.AF_UNIX and end.type == socket.SOCK_STREAM:
            end.settimeout(None)
            self._adopt(end)
        else:
            end.close()

    def _serve(self, connection: _Connection) -> None:
        try:
            connection.serve()
            self.fault = self.fault or connection.fault
        except Exception as error:  # noqa: BLE001  # the client sees its connection end, and others go on
            self.fault = self.fault or unforeseen(error)
        finally:
            with self._guard:
                del self._connections[connection]


class _Connection:
    """One client. `session_until`: until when its session is kept from interruption, by the monotonic clock."""

    def __init__(self, model: Model, end: socket.socket, adopt: Callable[[int], None]) -> None:
        self._model, self._end, self._adopt = model, end, adopt
        self._session = ExitStack()
        self.session_until = -math.inf
        self.fault: HwlicenseError | None = None

    def hang_up(self) -> None:
        """Have `serve` return."""
        with suppress(OSError):  # ended by itself
            self._end.shutdown(socket.SHUT_RDWR)

    def serve(self) -> None:
        """Answer until the client goes, sends what is no line, or is hung up on."""
        try:
            with suppress(OSError), self._end:  # a client that is gone needs no answer
                self._answer_lines()
        finally:
            with suppress(HwlicenseError):  # what cannot be given back counts as spent
                self._end_session()

    def _answer_lines(self) -> None:
        waiting = b""
        while part := self._receive():
            *lines, waiting = (waiting + part).split(b"\n")
            for line in lines:
                if not _LINE.fullmatch(line):
                    self._end.sendall(_NO_LINE)
                    return  # at once: both ends of one connection, handed in here, would answer each other for ever
                if line != b"connect":
                    self._end.sendall(self._answer(line.decode()))
            if len(waiting) >= LINE:
                self._end.sendall(_NO_LINE)
                return

    def _receive(self) -> bytes:
        part, control, _, _ = self._end.recvmsg(LINE, socket.CMSG_LEN(_FD), socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(data[: len(data) - len(data) % _FD])
                for number in numbers:
                    self._adopt(number)
        return part

    def _answer(self, line: str) -> bytes:
        try:
            refusal = self._refusal(line)
        except HwlicenseError as error:
            refusal = error
        except Exception as error:  # noqa: BLE001  # others go on, and the client is told
            self.fault = unforeseen(error)
            return f"no {Reason.INTERNAL} -\n".encode()
        if refusal is None:
            return b"ok\n"
        wait = refusal.wait if isinstance(refusal, ExceededError) else None
        shown = "-" if wait is None else f"{math.ceil(wait * 1000) / 1000:.3f}"
        return f"no {refusal.reason} {shown}\n".encode()

    def _refusal(self, line: str) -> HwlicenseError | None:
        """Do what a line says, or say why not. Raises HwlicenseError."""
        match line.split():
            case ["spend", count]:
                self._model.spend(int(count))
                return None
            case ["standing", seconds, count]:
                return self._model.standing(float(seconds), int(count)).refusal
            case ["session", count] if not self._in_session:
                session = self._session.enter_context(self._model.session(int(count)))
                longest = math.inf if session.continuity is None else session.continuity
                self.session_until = time.monotonic() + longest
                return None
            case ["end"] if self._in_session:
                self._end_session()
                return None
        return UsageError(Reason.USAGE, "A session within a session, or the end of none.", "End one before the next.")

    @property
    def _in_session(self) -> bool:
        return self.session_until > -math.inf

    def _end_session(self) -> None:
        self.session_until = -math.inf
        self._session.close()


def pair(kind: int) -> tuple[socket.socket, socket.socket]:
    """Both ends of a private socket, none of them with a number that a standard stream has. Raises OSError."""
    one, other = (above_standard(end.detach()) for end in socket.socketpair(socket.AF_UNIX, kind))
    return socket.socket(fileno=one), socket.socket(fileno=other)
