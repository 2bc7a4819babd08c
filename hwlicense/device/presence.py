"""Presence of an open model's hardware: proofs at an interval, on threads of their own.

Nothing that the application calls waits for hardware, but for the first session of a forked process. The threads end
with the model, and start anew in a forked process.
"""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from hwlicense.core import documents
from hwlicense.core.errors import HardwareError, HwlicenseError, Reason, RefusedError, StorageError
from hwlicense.core.presence import Proofs
from hwlicense.device.pin_turn import PinTurn
from hwlicense.threads import begin

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwlicense.device.bound import Bound
    from hwlicense.device.grace import PresenceAccount
    from hwlicense.device.keyring import Keyring

QUANTUM: Final = 10.0
"""Seconds of grace that are paid for at a time, or a twentieth where that is less: what a short absence costs."""

_LEAST: Final = 0.5

_EARLY: Final = 0.5
"""Seconds before the paid ones end at which the next are paid for."""

_PAYING: Final = 1.0
"""Seconds within which the grace is written down, or not granted."""

_RETURN: Final = 2.0
"""Seconds between proofs while the hardware is away."""

_CREDITED: Final = 60.0
"""Seconds of presence that are credited at a time, for few writings."""

_FIRST: Final = 5.0
"""Seconds that a forked process waits for its first proof, at the most."""

_GOODBYE: Final = 2.0
"""Seconds that closing waits for a proof under way, so that a token is logged out when it returns."""


class Guarded(Protocol):
    """What presence guards: an open model."""

    @property
    def locked(self) -> bool:
        """Whether its keys are gone."""

    def lose_keys(self, refusal: HwlicenseError) -> None:
        """Wipe the keys at once: nothing may start any more. Must not wait for anything."""

    def reopen(self, bound: Bound, *, ask: bool) -> Keyring:
        """The keys anew, from the hardware; `ask` for a PIN where it takes one. Raises HwlicenseError."""

    def regain_keys(self, keys: Keyring) -> None:
        """Take them into use. Must not wait for anything."""


class Presence:
    """Watches the hardware of one open model. `proofs` counts those that held; `grace_left`, in seconds, is not paid.

    Three threads: one asks the hardware, which may hang; one pays for absence, which takes a disk; and one has neither
    to wait for, so that the keys go when the time has come, whatever the others meet.
    """

    def __init__(
        self, terms: documents.Presence, bound: Bound, account: PresenceAccount | None, answers: int | None
    ) -> None:
        """Opening was the first proof. `bound` and `account` are taken over; `guard` says what depends on them.

        `account` is None where nothing is to be written down. `answers` is how many proofs there are, where each serves
        once and none again.
        """
        self._terms, self._bound, self._account, self._answers = terms, bound, account, answers
        self._guarded: weakref.ref[Guarded] | None = None
        self._recorded = Proofs(terms.interval, time.monotonic())
        self._credit_from = self._recorded.proven_at
        self._pin_refusal: HwlicenseError | None = None
        self._turn = PinTurn()
        self._ended = False
        self.proofs = 0
        self.grace_left = account.grace_left if account else 0.0
        self._new_threads()

    def guard(self, guarded: Guarded) -> None:
        """Say what loses its keys, and start. It is not kept alive by this. Raises StorageError."""
        self._guarded = weakref.ref(guarded)
        self.ensure()

    def after_fork(self) -> None:
        """In a forked child, whose threads are the parent's: only the clock is watched before the model is used.

        A process that forks and does nothing with the model must not keep the keys for longer than the parent.
        """
        self._new_threads()
        self._forked = True
        if not self._ended and self._guarded is not None:
            try:
                self._start(self._watch)
            except StorageError as error:  # nobody would notice when the time has come
                self._lose(error)

    def _new_threads(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._threads: list[threading.Thread] = []
        self._proving = self._paying = self._forked = False
        self._first = threading.Event()
        self._numbers = range(0)  # those that a parent reserved are the parent's

    def ensure(self) -> None:
        """Start the threads, if this process has none yet. Raises StorageError where the system gives none."""
        with self._changed:
            if self._proving or self._ended:
                return
            if not self._threads:
                self._start(self._watch)  # first: who is watched by nobody must not go on
            self._proving = True
            try:
                self._start(self._prove_on)
            except BaseException:
                self._proving = False
                raise

    def _start(self, target: Callable[[], None]) -> None:
        def run() -> None:
            try:
                target()
            except Exception as error:  # noqa: BLE001  # nobody else would hear of it, and nothing is proved any more
                self._give_up(error)

        self._threads.append(begin("presence", run))

    def refusal(self, *, wait: bool = False) -> HwlicenseError | None:
        """Why nothing may start now; None if it may. Touches no hardware.

        With `wait`, a process that was forked waits for its first proof: an interval, or 5 s, at the most.
        """
        self.ensure()
        refusal = self._refusal()
        if refusal and wait and self._forked and self._first.wait(min(_FIRST, self._terms.interval)):
            return self._refusal()
        return refusal

    def peek(self) -> HwlicenseError | None:
        """As `refusal`, without a lock: for whoever may hold one that this object's threads want."""
        now = time.monotonic()
        return None if now < self._covered_until(now) else self._recorded.refusal(now)

    @property
    def here(self) -> bool:
        """Whether the last proof still holds; not so while a grace bridges an absence."""
        with self._changed:
            return self._recorded.here(time.monotonic())

    @property
    def bridged_left(self) -> float:
        """Seconds of absence that are still covered: what is left of the grace, and what of it is paid for already."""
        with self._changed:
            return self.grace_left + max(0.0, self._recorded.bridged_until - time.monotonic())

    def close(self) -> None:
        """End the threads and let go of the hardware, at the latest when a proof under way is over."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if not self._proving:
            self._bound.close()
        for thread in list(self._threads):
            if thread is not threading.current_thread():
                thread.join(_GOODBYE)
        if self._account and not any(thread.is_alive() for thread in self._threads):
            self._account.close(self._numbers)

    def _refusal(self) -> HwlicenseError | None:
        with self._changed:
            return self.peek()

    def _covered_until(self, now: float) -> float:
        """Until when absence is paid for, or being paid for: what covers this moment is just being written down."""
        if self.grace_left and self._proving and not self._locked:
            return max(self._recorded.bridged_until, self._recorded.away_since(now) + _PAYING)
        return self._recorded.bridged_until

    @property
    def _locked(self) -> bool:
        guarded = self._guarded() if self._guarded else None
        return guarded is None or guarded.locked

    # ---- asking for proofs

    def _prove_on(self) -> None:
        try:
            while True:
                began = time.monotonic()
                try:
                    self._prove(began)
                except Exception as error:  # noqa: BLE001  # whatever it is, it is no proof, and must not end the asking
                    self._failed(_unforeseen(error))
                self._first.set()
                with self._changed:
                    self._changed.notify_all()
                    while not self._ended and (left := began + self._period() - time.monotonic()) > 0:
                        self._changed.wait(left)
                    if self._ended:
                        return
        finally:
            self._first.set()
            self._bound.close()

    def _period(self) -> float:
        """Seconds between proofs; fewer while the hardware is away, as its return is waited for."""
        here = self._recorded.here(time.monotonic()) and not self._locked
        return self._recorded.period if here else min(self._recorded.period, _RETURN)

    def _prove(self, began: float) -> None:
        guarded = self._guarded() if self._guarded else None
        if guarded is None:
            return
        keys = None
        try:
            try:
                self._bound.present(self._next_number())
                logged_out = False
            except RefusedError as error:
                if error.reason != Reason.PIN_NEEDED:
                    raise
                logged_out = True  # a token is here, and was away since: its login is gone, not the license
            if guarded.locked or logged_out:
                keys = self._reopened(guarded)
        except HwlicenseError as error:
            self._failed(error.again())
            return
        with self._changed:
            if guarded.locked and keys is None:
                return  # lost within this proof: the next one opens anew
            if keys is not None:
                guarded.regain_keys(keys)
            if not self._recorded.here(began):
                self._credit_from = began
            self._recorded.proven(began)
            self.proofs += 1
        self._credit(began)

    def _failed(self, error: HwlicenseError) -> None:
        with self._changed:
            self._recorded.failed(error, time.monotonic())

    def _reopened(self, guarded: Guarded) -> Keyring:
        """The keys anew. After a PIN was refused, or none given, nobody is asked again before the model is opened.

        Nor by any other process that was forked since: what a stale PIN spends is the token's, not a process's.
        """
        ask = self._turn.take()
        refused = False
        try:
            return guarded.reopen(self._bound, ask=ask)
        except RefusedError as error:
            if error.reason not in _PINS:
                raise
            refused = ask
            self._pin_refusal = self._pin_refusal or (error.again() if ask else None)
            raise (self._pin_refusal or error).again() from error
        finally:
            if ask and not refused:
                self._turn.give_back()

    def _credit(self, now: float) -> None:
        if self._account is None or self._terms.regain is None:
            return
        if now - self._credit_from >= min(_CREDITED, self._terms.regain / 10):
            with suppress(HwlicenseError):  # what cannot be written down is not given back
                self._account.credit(self._credit_from, now)
                self.grace_left = self._account.grace_left
            self._credit_from = now

    def _next_number(self) -> int | None:
        """The number of the next proof; None where a dongle has none left for it."""
        if self._account is None or not self._bound.spends_proofs:
            return 0
        if not self._numbers:
            try:
                self._numbers = self._account.reserve_proofs()
            except StorageError:
                if self._answers is not None:
                    raise
                return documents.ANSWER_LIMIT  # as if all were used: no full disk locks a machine whose dongle is in
        number, self._numbers = self._numbers[0], self._numbers[1:]
        return None if self._answers is not None and number >= self._answers else number

    # ---- watching the clock

    def _watch(self) -> None:
        while self._watched():
            pass

    def _give_up(self, error: Exception) -> None:
        """End it all: without one of the threads, keys that came back would not be watched."""
        with self._changed:
            if self._ended:  # the model is closed: hardware that could not be let go of is of no more use to it
                return
            self._ended = True
            self._changed.notify_all()
        self._lose(error if isinstance(error, HwlicenseError) else _unforeseen(error))

    def _watched(self) -> bool:
        """Wait until the state may change, and see what has become of it. False at the end."""
        with self._changed:
            if self._ended or self._guarded is None or self._guarded() is None:
                return False
            now = time.monotonic()
            if self._recorded.here(now):
                self._changed.wait(max(0.0, self._recorded.proven_at + self._terms.interval - now) + 0.001)
                return True
            # Not in a process that was forked and asks for no proofs: that is no absence
            if self._account and self.grace_left and self._proving and not self._paying and not self._locked:
                self._paying = True
                try:
                    self._start(self._pay)
                except StorageError:  # what cannot be paid for is not granted
                    self._paying, self.grace_left = False, 0.0
            covered = self._covered_until(now)
            if now < covered:
                self._changed.wait(covered - now + 0.001)
                return True
            if not self._locked and (refusal := self._recorded.refusal(now)):
                self._lose(refusal)
            self._changed.wait(self._recorded.period)
            return True

    def _lose(self, refusal: HwlicenseError) -> None:
        guarded = self._guarded() if self._guarded else None
        if guarded is not None:
            guarded.lose_keys(refusal)

    # ---- paying for absence

    def _pay(self) -> None:
        """Pay for absence in steps while it lasts and the grace does."""
        assert self._account is not None  # noqa: S101  # the watch saw to it
        try:
            while True:
                with self._changed:
                    now = time.monotonic()
                    if self._ended or self._recorded.here(now) or self._locked:
                        return
                    paid = self._recorded.bridged_until - _EARLY - now
                    if paid > 0:  # by an absence just before, or by the parent of this process
                        self._changed.wait(paid)
                        continue
                    start = max(self._recorded.away_since(now), self._recorded.bridged_until)
                step = min(QUANTUM, max(_LEAST, self._terms.grace / 20))
                until = self._account.bridge(start, step + _EARLY)
                left = self._account.grace_left
                with self._changed:
                    self._recorded.bridged(until)
                    self.grace_left = left
                    self._changed.notify_all()
                    if until <= start:
                        return
        except Exception:  # noqa: BLE001  # whatever it is: what cannot be written down is not granted
            with self._changed:
                self.grace_left = 0.0
        finally:
            with self._changed:
                self._paying = False
                self._threads.remove(threading.current_thread())
                self._changed.notify_all()


_PINS: Final = {Reason.PIN_WRONG, Reason.PIN_LAST_TRY, Reason.PIN_NEEDED}


def _unforeseen(error: BaseException) -> HardwareError:
    what = f"A proof of presence failed in a way that was not foreseen ({type(error).__name__})."
    return HardwareError(Reason.PRESENCE_UNPROVEN, what, "Open the model again; if it comes back, report it.")
