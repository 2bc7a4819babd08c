"""Presence of an open model's hardware: proofs at an interval, on threads of their own.

Nothing that the application calls waits for hardware. One thread asks for proofs; another watches the clock, so that
hardware that hangs is noticed in time, pays for absence from the grace, and has the keys wiped the moment that nothing
covers it any more. Both end with the model, and start anew in a forked child when it first uses the model.
"""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from hwlicense.core.errors import HwlicenseError, Reason, RefusedError
from hwlicense.core.presence import Standing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hwlicense.core import documents
    from hwlicense.device.bound import Bound
    from hwlicense.device.grace import Account
    from hwlicense.device.memory import Memory

QUANTUM: Final = 10.0
"""Seconds of grace that are paid for at a time: what a kill during an absence can lose."""

_EARLY: Final = 0.5
_RETURN: Final = 2.0
"""Seconds between proofs while the hardware is away."""

_CREDITED: Final = 60.0
"""Seconds of presence that are credited at a time, for few writings."""

_PAYING: Final = 1.0
"""Seconds within which the grace is written down, or not granted."""

_FIRST: Final = 5.0
_GOODBYE: Final = 2.0
"""Seconds that closing waits for a proof under way, so that a token is logged out when it returns."""

_BLOCKING: Final = {Reason.PIN_WRONG, Reason.PIN_LAST_TRY, Reason.PIN_NEEDED, Reason.ANSWERS_EXHAUSTED}
"""Answers that asking again would not better, and might worsen: they stand until the model is opened anew."""


class Guarded(Protocol):
    """What presence guards: an open model."""

    def lose_keys(self, refusal: HwlicenseError) -> None:
        """Wipe the keys at once: nothing may start any more. Must not wait for anything."""

    def reopen(self, bound: Bound) -> Memory:
        """The keys anew, from the hardware. Raises HwlicenseError."""

    def regain_keys(self, keys: Memory) -> None:
        """Take them into use. Must not wait for anything."""


class Presence:
    """Watches the hardware of one open model. `proofs` counts those that held, `grace_left` is in seconds."""

    def __init__(self, terms: documents.Presence, bound: Bound, account: Account | None, answers: int | None) -> None:
        """Opening was the first proof. `bound` is taken over; `guard` says what depends on it.

        `account` is None where nothing is to be written down. `answers` is how many proofs there are, where each serves
        once and none again.
        """
        self._terms, self._bound, self._account, self._answers = terms, bound, account, answers
        self._guarded: weakref.ref[Guarded] | None = None
        self._standing = Standing(terms.interval, time.monotonic())
        self._credit_from = self._standing.proven_at
        self._lost = False
        self._blocked: HwlicenseError | None = None
        self.proofs = 0
        self.grace_left = account.grace_left if account else 0.0
        self.renew()

    def guard(self, guarded: Guarded) -> None:
        """Say what loses its keys. It is not kept alive by this."""
        self._guarded = weakref.ref(guarded)

    def renew(self) -> None:
        """In a forked child: the threads are the parent's, and the locks may be held by no one."""
        self._changed = threading.Condition(threading.RLock())
        self._threads: list[threading.Thread] = []
        self._ended = False
        self._first = threading.Event()
        self._numbers: Iterator[int] = iter(())  # those that the parent reserved are the parent's

    def ensure(self) -> None:
        """Start the threads, if this process has none yet."""
        if self._threads or self._ended:
            return
        with self._changed:
            if self._threads or self._ended:
                return
            for target in (self._prove_on, self._watch):
                thread = threading.Thread(target=target, name="hwlicense presence", daemon=True)
                thread.start()
                self._threads.append(thread)

    def refusal(self, *, wait: bool = False) -> HwlicenseError | None:
        """Why nothing may start now; None if it may. Touches no hardware.

        With `wait`, a process that was just forked waits for its first proof: an interval, or 5 s, at the most.
        """
        self.ensure()
        refusal = self._refusal()
        if refusal and wait and not self._first.is_set() and self._first.wait(max(_FIRST, self._terms.interval)):
            return self._refusal()
        return refusal

    @property
    def here(self) -> bool:
        """Whether the last proof still holds; not so while a grace bridges an absence."""
        with self._changed:
            return self._standing.here(time.monotonic())

    def close(self) -> None:
        """End the threads and let go of the hardware, at the latest when a proof under way is over."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if not self._threads:
            self._bound.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_GOODBYE)

    def _refusal(self) -> HwlicenseError | None:
        with self._changed:
            now = time.monotonic()
            refusal = self._blocked or self._standing.refusal(now)
            paying = self.grace_left and not self._lost and not self._blocked
            if paying and self._standing.away_for(now) < _PAYING:
                return None  # the grace that covers this moment is just being written down
            return refusal

    # ---- asking for proofs

    def _prove_on(self) -> None:
        try:
            while True:
                began = time.monotonic()
                self._prove(began)
                self._first.set()
                with self._changed:
                    self._changed.notify_all()
                    while not self._ended and (left := began + self._period() - time.monotonic()) > 0:
                        self._changed.wait(left)
                    if self._ended:
                        return
        finally:
            self._bound.close()

    def _period(self) -> float:
        """Seconds between proofs; fewer while the hardware is away, as its return is waited for."""
        away = self._lost or not self._standing.here(time.monotonic())
        return min(self._standing.period, _RETURN) if away else self._standing.period

    def _prove(self, began: float) -> None:
        guarded = self._guarded() if self._guarded else None
        if self._blocked or guarded is None:
            return
        keys = None
        try:
            try:
                self._bound.prove(self._next_number())
                logged_out = False
            except RefusedError as error:
                if error.reason != Reason.PIN_NEEDED:
                    raise
                logged_out = True  # the token is here, and was away since: its login is gone, not the license
            if self._lost or logged_out:
                keys = guarded.reopen(self._bound)
        except HwlicenseError as error:
            with self._changed:
                self._blocked = error if error.reason in _BLOCKING else None
                self._standing.failed(error, time.monotonic())
            return
        with self._changed:
            if self._lost and keys is None:
                return  # lost within this proof: the next one opens anew
            if keys is not None:
                guarded.regain_keys(keys)
            if not self._standing.here(began):
                self._credit_from = began
            self._standing.proven(began)
            self._lost = False
            self.proofs += 1
        self._credit(began)

    def _credit(self, now: float) -> None:
        if self._account is None or self._terms.regain is None:
            return
        if now - self._credit_from >= min(_CREDITED, self._terms.regain / 10):
            with suppress(HwlicenseError):  # what cannot be written down is not given back
                self._account.credit(self._credit_from, now)
                self.grace_left = self._account.grace_left
            self._credit_from = now

    def _next_number(self) -> int:
        if self._account is None or not self._bound.spends_proofs:
            return 0
        number = next(self._numbers, None)
        if number is None:
            self._numbers = iter(self._account.reserve_proofs())
            number = next(self._numbers)
        if self._answers is not None and number >= self._answers:
            raise exhausted(self._answers)
        return number

    # ---- watching the clock

    def _watch(self) -> None:
        while True:
            with self._changed:
                if self._ended or self._guarded is None or self._guarded() is None:
                    return
                now = time.monotonic()
                if self._blocked is None and self._standing.here(now):
                    self._changed.wait(max(0.0, self._standing.holds_until(now) - now) + 0.001)
                    continue
            self._cover(now)

    def _cover(self, now: float) -> None:
        """Pay for the next seconds of absence; where nothing is left to pay with, the keys go."""
        until = now
        if self._account and self._terms.grace and not self._blocked and not self._lost:
            with suppress(HwlicenseError):  # what cannot be written down is not granted
                until = self._account.bridge(now, QUANTUM)
                self.grace_left = self._account.grace_left
        with self._changed:
            self._standing.bridged(until)
            refused = self._blocked or self._standing.refusal(time.monotonic())
            guarded = self._guarded() if self._guarded else None
            if refused and not self._lost and guarded:
                self._lost = True
                guarded.lose_keys(refused)
            if not self._ended:
                # A little early while the grace runs, so that the next seconds are paid for before these end
                left = until - time.monotonic() - _EARLY
                self._changed.wait(max(0.01, left) if until > now else self._standing.period)


def exhausted(answers: int) -> RefusedError:
    """What is said where no recorded answer is left and none may serve twice."""
    what = f"The license's {answers:,} recorded answers of its dongle are used up, and none may serve twice."
    return RefusedError(Reason.ANSWERS_EXHAUSTED, what, "Ask the vendor for a new license.")
