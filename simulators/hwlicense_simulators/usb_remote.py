"""A simulated bus for other processes: JSON with its length before it, over a Unix socket."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import select
import socket
import struct
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Self

from hwlicense_simulators.usb_bus import Bus, BusError, Session

if TYPE_CHECKING:
    from pathlib import Path

_LENGTH = struct.Struct(">I")


def _send(connection: socket.socket, value: Any) -> None:  # noqa: ANN401  whatever JSON has
    data = json.dumps(value).encode()
    connection.sendall(_LENGTH.pack(len(data)) + data)


def _receive(connection: socket.socket) -> Any:  # noqa: ANN401  whatever JSON has
    """Raises EOFError where the other side is gone."""
    return json.loads(_exactly(connection, *_LENGTH.unpack(_exactly(connection, _LENGTH.size))))


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


class Server:
    """Serves a bus, as a context manager. The connections of one client are one session, which ends with the last."""

    def __init__(self, bus: Bus, path: Path) -> None:
        self._bus, self._path = bus, path
        self._ended, self._end = socket.socketpair()
        self._turn = threading.Lock()
        self._sessions: dict[str, tuple[Session, list[socket.socket]]] = {}
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._path))
        self._path.chmod(0o600)
        listener.listen(16)
        self._spawn(self._accept, listener)
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.close()  # readable for every thread from now on
        with self._turn:
            sessions = list(self._sessions.values())
        for session, connections in sessions:
            session.end()
            for connection in list(connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)  # a client may have stopped in the middle of a message
        for thread in self._threads:
            thread.join()
        self._ended.close()

    def _spawn(self, run: Any, connection: socket.socket) -> None:  # noqa: ANN401  a function of one argument
        thread = threading.Thread(target=run, args=(connection,), name="simulated USB", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _waits_for(self, readable: socket.socket) -> bool:
        return self._ended not in select.select([readable, self._ended], [], [])[0]

    def _accept(self, listener: socket.socket) -> None:
        with listener:
            while self._waits_for(listener):
                self._spawn(self._serve, listener.accept()[0])

    def _serve(self, connection: socket.socket) -> None:
        # A client that was killed is a client that left.
        with connection, contextlib.suppress(OSError, EOFError):
            if not self._waits_for(connection):
                return
            client = _receive(connection)
            session = self._join(client, connection)
            try:
                while self._waits_for(connection):
                    _send(connection, _answer(session, _receive(connection)))
            finally:
                self._leave(client, connection)

    def _join(self, client: str, connection: socket.socket) -> Session:
        with self._turn:
            session, connections = self._sessions.setdefault(client, (Session(self._bus), []))
            connections.append(connection)
        return session

    def _leave(self, client: str, connection: socket.socket) -> None:
        with self._turn:
            session, connections = self._sessions[client]
            connections.remove(connection)
            if connections:
                return
            del self._sessions[client]
        session.end()


def _answer(session: Session, request: list[Any]) -> dict[str, Any]:
    try:
        return {"value": session.call(*request)}
    except BusError as error:
        return {"errno": error.errno}


class RemoteBus:
    """The other end: `call` is as that of a Session. Raises OSError where there is no bus to begin with.

    Each call has a connection to itself, one that is idle or a new one: a finalizer that runs in the middle of a call
    may make another call.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._begin()
        self._idle.append(self._connect())

    def _begin(self) -> None:
        self._process, self._name = os.getpid(), secrets.token_hex(8)
        self._idle: deque[socket.socket] = deque()

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(self._path)
            _send(connection, self._name)
        except BaseException:
            connection.close()
            raise
        return connection

    def _take(self) -> socket.socket:
        try:
            return self._idle.pop()
        except IndexError:
            return self._connect()

    def call(self, operation: str, *arguments: Any) -> Any:  # noqa: ANN401  whatever JSON has
        """Do one of a Session's operations. Raises BusError. When the bus is gone, so are its devices."""
        if self._process != os.getpid():
            self._begin()  # after a fork the parent's handles are the parent's
        try:
            connection = self._take()
            try:
                _send(connection, [operation, *arguments])
                answer = _receive(connection)
            except BaseException:
                connection.close()
                raise
        except (OSError, EOFError) as error:
            if operation == "devices":
                return []
            raise BusError(errno.ENODEV) from error
        self._idle.append(connection)
        if "errno" in answer:
            raise BusError(answer["errno"])
        return answer["value"]
