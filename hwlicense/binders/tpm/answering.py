"""A limit of time for a TPM that takes a command and never answers.

Its library waits as long as that takes, and lets no signal through. So calls of it run on a thread, which is left
behind where no answer comes: nothing else may use the connection then, and the thread closes it when one does come.
One thread makes all calls of a work: what the library leaves of a secret on its stack, the next ones write over.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hwlicense.core.errors import HardwareError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT: Final = 60.0
"""Seconds for a command; some may wait in the kernel for another program's."""

MAKING: Final = 300.0
"""Seconds for making a key. RSA takes some TPMs a minute; the kernel gives them as long."""

_MOMENT: Final = 1.0
R = TypeVar("R")

_hung: dict[str, Answers] = {}  # by address; a TPM that answers no command takes no further one


class Answers:
    """The answers of one connection to the TPM at an address; `late` is called with one that nobody waits for."""

    def __init__(self, address: str, late: Callable[[Future[Any]], None]) -> None:
        self._address, self._late = address, late
        self.given_up = False
        self._calls: SimpleQueue[Callable[[], None] | None] | None = None
        self._process = 0

    def wait(self, act: Callable[[], R], command: str) -> R:
        """What `act` gives. Raises HardwareError TPM_HUNG; the connection is not to be touched any more then."""
        seconds = MAKING if command == "create_primary" else LIMIT
        outcome = Future[R]()

        def run() -> None:
            try:
                outcome.set_result(act())
            except BaseException as error:  # noqa: BLE001  # whatever it is, it is raised where it is waited for
                outcome.set_exception(error)

        try:
            calls = self._thread()
        except RuntimeError:  # the system gives no thread: then it takes as long as it takes
            return act()
        try:
            calls.put(run)
            wait((outcome,), seconds)
        except BaseException:  # of a signal: the answer is most likely on its way
            wait((outcome,), _MOMENT)
            if not outcome.done():
                self._give_up(outcome)
            raise
        if not outcome.done():
            self._give_up(outcome)
            raise hung(f"The TPM gave no answer within {seconds:g} s (TPM command {command}).")
        return outcome.result()

    def end(self) -> None:
        """No further call is to come."""
        calls, self._calls = self._calls, None
        if calls:
            calls.put(None)

    def _thread(self) -> SimpleQueue[Callable[[], None] | None]:
        """What takes calls to the thread. Raises RuntimeError."""
        if self._calls is None or self._process != os.getpid():  # a forked child has not got the thread
            calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
            threading.Thread(target=_make, args=(calls,), name="hwlicense TPM", daemon=True).start()
            self._calls, self._process = calls, os.getpid()
        return self._calls

    def _give_up(self, outcome: Future[R]) -> None:
        self.given_up = True
        _hung[self._address] = self
        outcome.add_done_callback(self._come)

    def _come(self, outcome: Future[R]) -> None:
        """An answer after all, which nobody waits for; or the TPM is gone."""
        self._late(outcome)
        if _hung.get(self._address) is self:
            del _hung[self._address]


def _make(calls: SimpleQueue[Callable[[], None] | None]) -> None:
    while call := calls.get():
        call()
        del call


def check(address: str) -> None:
    """Raises HardwareError TPM_HUNG where the TPM still owes this process an answer."""
    if address in _hung:
        raise hung("The TPM has not answered an earlier command yet.")


def forget() -> None:
    """In a forked child: the thread that would see the answer is the parent's."""
    _hung.clear()


def hung(what: str) -> HardwareError:
    """The error for a TPM that does not answer."""
    hint = "Try again in a minute. If it stays, restart the machine, or the simulator; the kernel's log may say more."
    return HardwareError(Reason.TPM_HUNG, what, hint)
