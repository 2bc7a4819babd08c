"""The wire between a client and a simulated TPM, in the hands of a test: it records, alters, delays and cuts."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from hwlicense_simulators import commands

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

RETRY, NV_RATE, LOCKOUT, PCR_CHANGED = 0x922, 0x920, 0x921, 0x128
"""Response codes that a TPM gives now and then (TPM 2.0 Library, part 2, 6.6.3)."""


def environment(tcti: str, ek_root: Path) -> dict[str, str]:
    """The variables by which hwlicense, tpm2-tools and scripts find a simulated TPM."""
    return {"HWLICENSE_TPM": tcti, "TPM2TOOLS_TCTI": tcti, "HWLICENSE_SIMULATOR_EK_ROOT": str(ek_root)}


class Exchange(NamedTuple):
    """A command as the client sent it, and the answer as the TPM gave it: before anything was altered.

    The answer is empty where the wire was cut before it, and the injected one where a response code was injected.
    """

    command: bytes
    answer: bytes


@dataclass(slots=True, eq=False)
class _Fault:
    command: int | None
    after: int
    times: int
    code: int = 0
    seconds: float = 0.0
    cut: bool = False
    executed: bool = False


class Wire:
    """A machine in the middle. Made by `Tpm.tapped()`; clients use `tcti` or `environment`.

    `on_command` and `on_answer` take the bytes of a message and return those to pass on. They run in a thread of the
    wire; what they raise cuts the client's connection and is raised again when the wire is closed. Every command goes
    to swtpm on a connection of its own, so several clients may use one TPM in turn. They share its handles: nothing
    is virtualized, as a resource manager would.
    """

    def __init__(self, path: Path, upstream: Path, ek_root: Path, *, record: bool = True) -> None:
        self.path = path
        self.exchanges: list[Exchange] = []
        self.control: list[bytes] = []
        self.on_command: Callable[[bytes], bytes] | None = None
        self.on_answer: Callable[[bytes], bytes] | None = None
        self._upstream, self._ek_root, self._record = upstream, ek_root, record
        self._faults: list[_Fault] = []
        self._turn = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._ended, self._end = socket.socketpair()
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        self._listen(self.path, self._serve)
        self._listen(Path(f"{self.path}.ctrl"), self._serve_control)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.close()  # readable for every thread from now on
        for thread in self._threads:
            thread.join()
        self._ended.close()
        if self._error is not None and error is None:
            raise self._error

    # what was seen

    @property
    def tcti(self) -> str:
        """The TCTI string of tpm2-tss."""
        return f"swtpm:path={self.path}"

    @property
    def environment(self) -> dict[str, str]:
        """As `Tpm.environment`, for this wire."""
        return environment(self.tcti, self._ek_root)

    @property
    def commands(self) -> list[int]:
        """The command codes (TPM_CC), in order."""
        return [commands.command_code(exchange.command) for exchange in self.exchanges]

    @property
    def traffic(self) -> bytes:
        """Everything that went over both channels in both directions, to search for what must not be there."""
        return b"".join([part for exchange in self.exchanges for part in exchange] + self.control)

    def forget(self) -> None:
        """Start the record anew."""
        self.exchanges, self.control = [], []

    # what shall go wrong; `command` limits it to one TPM_CC, `after` lets that many pass first

    def inject(self, code: int, command: int | None = None, *, after: int = 0, times: int = 1) -> None:
        """Answer with a response code instead of asking the TPM."""
        self._faults.append(_Fault(command, after, times, code=code))

    def cut(self, command: int | None = None, *, after: int = 0, times: int = 1, executed: bool = False) -> None:
        """Close the connection instead of answering; the TPM has `executed` the command, or has never seen it."""
        self._faults.append(_Fault(command, after, times, cut=True, executed=executed))

    def delay(self, seconds: float, command: int | None = None, *, after: int = 0, times: int = 1) -> None:
        """Pass the command on late."""
        self._faults.append(_Fault(command, after, times, seconds=seconds))

    # inside

    def _listen(self, path: Path, serve: Callable[[socket.socket], None]) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(16)
        self._spawn(self._accept, listener, serve)

    def _spawn(self, run: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, name="tapped wire", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        with listener:
            while self._wait(listener):
                connection, _ = listener.accept()
                self._spawn(self._guard, connection, serve)

    def _guard(self, connection: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        # One side is gone, as happens with machines that lose power: the client sees its connection end.
        with connection, contextlib.suppress(OSError, EOFError):
            serve(connection)

    def _wait(self, *readable: socket.socket, seconds: float | None = None) -> list[socket.socket]:
        """Those that are readable; none when the wire is closed or the time is over."""
        ready, _, _ = select.select([*readable, self._ended], [], [], seconds)
        return [] if self._ended in ready else ready

    def _serve(self, client: socket.socket) -> None:
        while self._wait(client) and (command := commands.receive(client)):
            with self._turn:
                answer = self._answer(command)
            if not answer:
                return
            client.sendall(answer)

    def _answer(self, command: bytes) -> bytes:
        due = self._due(commands.command_code(command))
        answer = b""
        try:
            for fault in due:
                if fault.seconds:
                    self._wait(seconds=fault.seconds)
                elif fault.code:
                    answer = commands.refusal(fault.code)
                    return answer
                elif not fault.executed:
                    return b""
            passed = self._altered(self.on_command, command)
            # No limit here: some commands take seconds, and closing the wire is bound by the TPM's own work.
            answer = commands.exchange(self._upstream, passed, 120)
        finally:
            if self._record:
                self.exchanges.append(Exchange(command, answer))
        if any(fault.cut for fault in due):
            return b""
        return self._altered(self.on_answer, answer)

    def _altered(self, alter: Callable[[bytes], bytes] | None, message: bytes) -> bytes:
        if alter is None:
            return message
        try:
            return alter(message)
        except BaseException as error:
            self._error = self._error or error
            raise EOFError from error

    def _due(self, code: int) -> list[_Fault]:
        due = []
        for fault in [fault for fault in self._faults if fault.command in (None, code)]:
            if fault.after:
                fault.after -= 1
                continue
            due.append(fault)
            fault.times -= 1
            if not fault.times:
                self._faults.remove(fault)
        return due

    def _serve_control(self, client: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX) as upstream:
            upstream.connect(f"{self._upstream}.ctrl")
            while ready := self._wait(client, upstream):
                for source in ready:
                    data = source.recv(commands.LARGEST)
                    if not data:
                        return
                    if self._record:
                        self.control.append(data)
                    (upstream if source is client else client).sendall(data)
