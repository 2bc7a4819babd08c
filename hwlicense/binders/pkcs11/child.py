"""The program of a module's process: one module, one request at a time, and never longer than it may take.

It ends when the application does: at the end of the connection it logs out, finalizes the module and exits. A module
that never returns is ended by SIGALRM, whether anyone still waits for it or not.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import msgspec

from hwlicense.binders.pkcs11 import protocol
from hwlicense.binders.pkcs11.protocol import Answer, Compute, Done, Failed, Generate, Inspect, Load, LogIn, Look

if TYPE_CHECKING:
    from hwlicense.binders.pkcs11.module import Module

_PR_SET_DUMPABLE: Final = 4
_STARTING, _MARGIN, _ENDING = 30.0, 1.0, 2.0  # seconds


def main(number: int) -> None:
    """Serve the connection with this file descriptor. Never returns."""
    _harden()
    channel = socket.socket(fileno=number)
    channel.set_inheritable(False)  # a program that the module starts would keep the connection open
    server = _Server()
    with suppress(EOFError, OSError, ValueError):  # the application is gone, or asks what no application of ours does
        server.serve(channel)
    _alarm(_ENDING)
    channel.close()
    with suppress(Exception):
        server.close()
    os._exit(0)  # past the destructors of the module


def _harden() -> None:
    _alarm(_STARTING)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # PINs and secrets are in no core file
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # nor seen by other programs of this user
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whatever the application's thread had blocked
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # They ask the application to end, which may have a procedure to finish. Programs that the module starts do not
        # inherit this, as they would if the signals were ignored; and calls of the module are not cut short by it.
        signal.signal(number, lambda *_: None)
        signal.siginterrupt(number, False)  # noqa: FBT003  # the standard library's


def _alarm(seconds: float) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # at each request: a module may have changed it
    signal.setitimer(signal.ITIMER_REAL, seconds)


class _Server:
    def __init__(self) -> None:
        self._module: Module | None = None
        self.over = False

    def serve(self, channel: socket.socket) -> None:
        """Answer until the application ends the connection, or until a login has failed."""
        while not self.over:
            _alarm(0)
            request, pin = protocol.receive(channel, protocol.REQUESTS)
            _alarm(request.seconds + _MARGIN)
            try:
                answer, secret = self._answer(request, pin)
            finally:
                pin[:] = bytes(len(pin))
            try:
                protocol.send(channel, answer, secret)
            finally:
                secret[:] = bytes(len(secret))

    def close(self) -> None:
        """Log out and finalize."""
        if self._module is not None:
            self._module.close()

    def _answer(self, request: protocol.AnyRequest, pin: bytearray) -> tuple[Answer, bytearray]:
        from hwlicense.binders.pkcs11.codes import code  # noqa: PLC0415  # loads the library: after hardening

        try:
            if isinstance(request, Compute):
                return self._loaded.compute(request, pin)
            return self._plain_answer(request, pin), bytearray()
        except Exception as error:  # noqa: BLE001  # a module's nonsense surfaces as any error at all
            return Failed(code(error)), bytearray()

    def _plain_answer(self, request: protocol.AnyRequest, pin: bytearray) -> Answer:
        match request:
            case Load():
                return self._load(request)
            case LogIn():
                return self._ending(self._loaded.log_in(request, pin))
            case Look():
                return self._loaded.look(request)
            case Inspect():
                return self._loaded.inspect(request)
            case Generate():
                return self._loaded.generate(request)
            case _:
                return self._loaded.tokens()

    @property
    def _loaded(self) -> Module:
        if self._module is None:
            raise ValueError("no module is loaded")
        return self._module

    def _ending(self, answer: Answer) -> Answer:
        """A session that cannot be closed ends with the process, unless that costs the login to another token."""
        self.over = self._loaded.leaking and not self._loaded.logins
        return msgspec.structs.replace(answer, ending=self.over) if isinstance(answer, Failed) else answer

    def _load(self, request: Load) -> Answer:
        from hwlicense.binders.pkcs11.module import Module  # noqa: PLC0415

        os.umask(0o077)  # after the imports: code compiled on the way stays readable
        try:
            self._module = Module(request.path)
        except Exception as error:  # noqa: BLE001
            return Failed("NOT_LOADED", detail=str(error)[:300])
        return Done()
