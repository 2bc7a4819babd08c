"""Holding an open model to its license's limits of use, at a fraction of a microsecond a use.

A process books allowances in batches, in an account that all processes of the device share, and spends them one by one.
A thread of its own looks after the account: it writes down what may be spent before it is, renews the lease at the
anchor, and gives back what nobody spends. Spending waits for no hardware: where the lease is not renewed in time, it
refuses.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from contextlib import suppress
from itertools import repeat
from time import CLOCK_BOOTTIME, clock_gettime_ns  # by name: `spend` looks up a name less
from typing import TYPE_CHECKING, Final

from hwlicense.core import leases
from hwlicense.core.account import Short
from hwlicense.core.durations import of_rate, waiting
from hwlicense.core.errors import ClosedError, ExceededError, HwlicenseError, Reason, RefusedError, StorageError
from hwlicense.core.monitoring import Verdict
from hwlicense.core.wording import quantity
from hwlicense.device import clock
from hwlicense.device.locking import Turn
from hwlicense.device.starting import check_count, foremost, used_up
from hwlicense.device.tending import PERIOD, RETRY, SESSION, Tended

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hwlicense.core.account import Account, Booked
    from hwlicense.core.documents import Grant
    from hwlicense.device.instances import Instance
    from hwlicense.device.watching import Watch

BATCH: Final = 1024
"""Allowances that a process books at a time, at the most: what it loses if it is killed."""

_TICKET: Final = True
_SOON: Final = 0.5  # seconds after which a lease is expected to be renewed
_LONGER: Final = 1.1  # times its frame, a rate says no for other reasons
_WAITED, _POLL = 2.0, 0.01  # seconds
_SILENT: Final = 2.0  # seconds that hardware takes for an answer at times


class Metering:
    """The limits of one open model. Threads share it; forked processes have a copy of their own."""

    def __init__(
        self, grant: Grant, tended: Tended, watch: Watch | None = None, instance: Instance | None = None
    ) -> None:
        """All are taken over: the account, what looks for abnormal use, and a place among the instances."""
        self._grant, self._tended, self._watch, self._instance = grant, tended, watch, instance
        self._offset = tended.offset
        self._sessions: dict[int, list[Session]] = {}
        self._lost: HwlicenseError | None = None
        self._new_process()
        tended.on_round = self._on_round
        _meterings.add(self)

    def _new_process(self) -> None:
        self._turn = Turn()
        self._tickets: tuple[Iterator[bool], int] = iter(()), 0
        self._booked: Booked | None = None
        self._batch, self._refilled = 1, 0.0

    def after_fork(self) -> None:
        """In a forked child: what the parent booked is the parent's."""
        self._new_process()
        for session in [session for sessions in self._sessions.values() for session in sessions]:
            session.after_fork()
        self._sessions = {}
        if self._watch:
            self._watch.after_fork()
        try:
            self._tended.after_fork()
            clock.check_shared()
        except RefusedError as error:
            self._tended.abandon()
            self._lost = error.again()
        except (HwlicenseError, OSError):  # files of the parent's own are of no use here: its locks would be this one's
            self._tended.abandon()
            what = "The forked process could not open the files of the license's account for itself."
            self._lost = StorageError(Reason.STORAGE, what, "Raise the limit of open files (`ulimit -n`).")

    # ---- spending

    def spend(self, count: int = 1, features: Sequence[float] | None = None, label: int = 0) -> None:
        """Spend `count` allowances, or none. Raises as `hwlicense.device.model.Model.spend` does."""
        if self._watch is None:
            tickets, end = self._tickets
            # next() is one step to the interpreter: no two threads get the same ticket.
            if count == 1 and clock_gettime_ns(CLOCK_BOOTTIME) < end and next(tickets, False):
                return
            self._refill(count)
        else:
            self._spend_watched(self._watch, count, features, label)

    def _spend_watched(self, watch: Watch, count: int, features: Sequence[float] | None, label: int) -> None:
        """As `spend`, seen by the monitor: what it denies is still granted from what a session has reserved."""
        check_count(count)
        now = self._tended.now()
        seen = watch.observation(now, count, features, label)
        refusal, throttled = watch.refusal(now), watch.throttled(now)
        if refusal is None:
            tickets, end = self._tickets
            if throttled or count != 1 or now - self._offset >= end or not next(tickets, False):
                self._refill(count, throttled)
        elif not self._spend_held(count):
            raise refusal
        watch.saw(seen)

    def _refill(self, count: int, throttled: int = 0) -> None:
        """The slow way: spend, and book the next batch. `throttled` is until when the monitor holds use to its rate."""
        check_count(count)
        self._tended.start()
        with self._turn:
            for _ in range(3):
                self._check_open()
                short = self._book(count, throttled)
                if short is None:
                    return
                if self._spend_held(count):
                    return
                if short.rate or short.exhausted or short.wait:
                    raise self._exceeded(short, count, throttled=bool(throttled))
                if never := self._never(count):
                    raise never
                if not self._tended.reserve(count):
                    break
            raise self._pending()

    def _check_open(self) -> None:
        if self._lost:
            raise self._lost.again()
        if self._tended.closed:
            raise ClosedError(Reason.MODEL_CLOSED, "The model was closed.", "Open it again.")
        if self._instance and (refusal := self._instance.refusal()):
            raise refusal

    def _book(self, count: int, throttled: int) -> Short | None:
        with self._tended.sharing() as (account, now):
            self._take_back(account)
            result = account.book(now, count, count if count > 1 or throttled else self._batch, throttled=throttled)
            low = leases.low(account)
        if isinstance(result, Short):
            return result
        if low:
            self._tended.wake()
        end = result.end - self._offset
        if count == 1:
            # This call's is one of them.
            self._tickets, self._booked = (repeat(_TICKET, result.taken - 1), end), result
        fresh = time.monotonic()
        self._batch = 1 if fresh - self._refilled > PERIOD else min(2 * max(1, self._batch), BATCH)
        self._refilled = fresh
        return None

    def _take_back(self, account: Account) -> None:
        """Give back what is left of the last batch. Draining takes ticket by ticket: each is spent, or given back."""
        tickets, _ = self._tickets
        self._tickets = iter(()), 0
        left = sum(tickets)
        if left and self._booked:
            account.give_back(self._booked, left)
        self._booked = None

    def _exceeded(self, short: Short, count: int, *, throttled: bool = False) -> ExceededError:
        if short.exhausted:
            return self._too_few(count)
        wait = None if short.wait is None else short.wait / 1e9
        if short.rate is None:
            what = "Too many sessions with reserved inferences are under way."
            return ExceededError(Reason.RATE_EXCEEDED, what, "Wait until one of them ends.", wait)
        each = of_rate(short.rate)
        if throttled and wait is not None and short.rate not in self._grant.terms_of_use.limits.rates:
            what = f"Use is abnormal, so the monitor holds it to {each}; the next is allowed in {waiting(wait)}."
            hint = "Wait that long, or ask the vendor for a revision with other terms."
            return ExceededError(Reason.RATE_EXCEEDED, what, hint, wait)
        if wait is None:
            what = f"{count:,} inferences at once are more than the license ever allows ({each})."
            return ExceededError(Reason.RATE_EXCEEDED, what, f"Ask for {short.rate.count:,} at a time, or fewer.")
        what = f"The license allows {each}; the next is allowed in {waiting(wait)}."
        if wait > _LONGER * short.rate.seconds:
            what = f"{what} Sessions have reserved the rest, or a process that was killed may have spent it."
            hint = "Wait that long. End sessions early, and close the model when a process ends."
            return ExceededError(Reason.RATE_EXCEEDED, what, hint, wait)
        return ExceededError(
            Reason.RATE_EXCEEDED, what, "Wait that long, or ask for a license with a higher rate.", wait
        )

    def _too_few(self, count: int) -> ExceededError:
        limits = self._grant.terms_of_use.limits
        total = limits.inferences or 0
        left = min(self._tended.snapshot()[0].remaining or 0, count - 1)  # others may have given some back since
        if not left:
            return used_up(total)
        what = f"The license has {left:,} of {quantity(total, 'inference')} left; {count:,} were asked for."
        at_once = min([left, *(rate.count for rate in limits.rates)])
        hint = f"Ask for {at_once:,} or fewer{' at once' if at_once < left else ''}, or ask the vendor for a revision"
        return ExceededError(Reason.INFERENCES_EXHAUSTED, what, f"{hint} with more.")

    def _never(self, count: int) -> ExceededError | None:
        """What is said where no lease is large enough."""
        most = self._tended.most
        if most is None or count <= most:
            return None
        what = f"{count:,} inferences at once are more than this device ever reserves of the license."
        return ExceededError(Reason.RATE_EXCEEDED, what, f"Ask for {most:,} at a time, or fewer.")

    def _pending(self) -> ExceededError:
        if self._tended.problem:
            what = f"The lease of inferences is used up and cannot be renewed now. {self._tended.problem.what}"
            return ExceededError(Reason.LEASE_PENDING, what, self._tended.problem.hint, RETRY)
        if self._tended.silence > _SILENT:
            what = f"The lease of inferences is used up, and the TPM has not answered for {self._tended.silence:.0f} s."
            return ExceededError(Reason.LEASE_PENDING, what, "It is waited for: try again.", RETRY)
        what = "Inferences are asked for faster than the lease of them is renewed."
        return ExceededError(Reason.LEASE_PENDING, what, "Try again in a moment.", _SOON)

    # ---- sessions

    def hold(self, count: int, seconds: int | None) -> Session:
        """Reserve `count` allowances for a session of at most so many seconds. Raises as `spend` does.

        Where the lease must be renewed for that, it is waited for: two seconds at the most.
        """
        check_count(count)
        self._tended.start()
        give_up = time.monotonic() + _WAITED
        while True:
            self._check_open()
            with self._turn, self._tended.sharing() as (account, now):
                self._take_back(account)
                end = now + (seconds or SESSION) * 10**9
                held = account.hold(now, count, end)
            if isinstance(held, int):
                session = Session(self, held, end, count)
                self._sessions.setdefault(session.thread, []).append(session)
                return session
            if held.rate or held.exhausted or held.wait:
                raise self._exceeded(held, count)
            if never := self._never(count):
                raise never
            reserved = self._tended.reserve(count)
            if self._tended.problem or time.monotonic() > give_up:
                raise self._pending()
            if not reserved:
                time.sleep(_POLL)

    def let_go(self, session: Session) -> None:
        """The session is over."""
        mine = self._sessions.get(session.thread, [])
        if session in mine:
            mine.remove(session)
        with self._tended.sharing() as (account, now):
            account.let_go(session.place, session.end, now, session.count, session.drain())

    def _spend_held(self, count: int) -> bool:
        """From what a session of this thread has reserved."""
        sessions = list(self._sessions.get(threading.get_ident(), ()))
        return any(session.draw(count, self._tended.now()) for session in sessions)

    def may_start(self, count: int) -> HwlicenseError | None:
        """Why a session that spends so many could not start now; None if it may."""
        if refusal := self._lost or (self._instance.refusal() if self._instance else None):
            return refusal
        denied = self._watch.refusal(self._tended.now()) if self._watch else None
        return foremost(self._tended.refusal, denied, self._short_of(count))

    def _short_of(self, count: int) -> HwlicenseError | None:
        total = self._grant.terms_of_use.limits.inferences
        if not count and (total is None or self._tended.snapshot()[0].remaining):
            return None
        with self._turn, self._tended.sharing() as (account, now):
            self._take_back(account)
            short = account.check_session(now, count) if count else account.check(now, 1)
        if short is None:
            return None
        if not count:  # what a session under way has reserved is left to others of this process
            return self._exceeded(short, 1) if short.exhausted and not any(self._sessions.values()) else None
        if short.rate or short.exhausted or short.wait:
            return self._exceeded(short, count)
        if never := self._never(count):
            return never
        self._tended.ask(count)  # so that the session need not wait for it
        return self._pending() if self._tended.problem else None

    def _on_round(self) -> None:
        self._give_back_unused()
        if self._watch:
            self._watch.tend()

    def _give_back_unused(self) -> None:
        if self._booked is None or time.monotonic() - self._refilled < PERIOD or not self._turn.tried():
            return
        try:
            with self._tended.sharing() as (account, _):
                self._take_back(account)
        finally:
            self._turn.over()

    # ---- the end

    def close(self) -> None:
        """Give back what was not spent. Doing it again changes nothing."""
        if self._tended.closed:
            return
        self._tended.closed = True
        with suppress(HwlicenseError):  # what is not told now, this process has seen for nothing
            if self._watch:
                self._watch.close()
        with suppress(HwlicenseError):  # it counts as spent then, no more
            self._tended.close(self._take_back)
        if self._instance:
            self._instance.close()

    @property
    def verdict(self) -> Verdict:
        """What the monitor has found, as far as it is in force."""
        return self._watch.present() if self._watch else Verdict()


class Session:
    """Allowances that were reserved for one procedure, until it ends, or its time does."""

    def __init__(self, metering: Metering, place: int, end: int, count: int) -> None:
        """`end` is in nanoseconds of the meter."""
        self._metering, self.place, self.end, self.count = metering, place, end, count
        self._left, self._turn = count, Turn()
        self._mine, self.thread = True, threading.get_ident()

    def draw(self, count: int, now: int) -> bool:
        """Spend `count` of them; False where so many are not left."""
        if now >= self.end or not self._turn.tried():
            return False
        try:
            granted = count <= self._left
            self._left -= count * granted
            return granted
        finally:
            self._turn.over()

    def drain(self) -> int:
        """How many are left, for whoever gives them back: none of them is to be had any more. Raises StorageError."""
        with self._turn:
            left, self._left = self._left, 0
            return left

    def after_fork(self) -> None:
        """In a forked child: they are the parent's."""
        self._left, self._turn, self._mine = 0, Turn(), False

    def finish(self) -> None:
        """Give back what was not spent. Raises StorageError."""
        if self._mine:
            self._metering.let_go(self)


_meterings: weakref.WeakSet[Metering] = weakref.WeakSet()


def _after_fork() -> None:
    for metering in list(_meterings):
        metering.after_fork()


os.register_at_fork(after_in_child=_after_fork)
