"""Looking after the account of an open license: what may be spent is written down before, the lease is renewed ahead.

A thread of its own does it, so that nobody who spends waits for hardware.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from hwlicense.core import calendar, leases
from hwlicense.core.account import Field
from hwlicense.core.errors import HardwareError, HwlicenseError, Reason, StorageError, out_of_memory
from hwlicense.core.validity import check_validity
from hwlicense.device import clock
from hwlicense.device.locking import PATIENCE, Turn
from hwlicense.threads import begin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from hwlicense.core.account import Account
    from hwlicense.core.documents import Grant
    from hwlicense.core.hardware import Anchor
    from hwlicense.device.ledger import Ledger
    from hwlicense.device.sharing import Shared

PERIOD: Final = 1.0
"""Seconds between rounds of looking after the account."""

RETRY: Final = 5.0
"""Seconds between attempts at an anchor that failed."""

SESSION: Final = 600
"""Seconds of a session that no continuity ends."""

_STEP: Final = 65.0  # seconds for a step of the anchor, which takes as long as hardware may
_ASKED: Final = 10.0  # seconds after which nobody waits for what was asked for
_MILLION: Final = 1_000_000
_CHECKED: Final = 60.0  # seconds between looks at the calendar
_MARKED: Final = 6 * 3600  # seconds by which a mark is older than the time, at the most


_SLOWER: Final = 1024  # a TPM's clock is taken to lose less than a part in so many


class AnchorClock:
    """The anchor's clock in milliseconds, from when it was last read: never ahead of it."""

    def __init__(self) -> None:
        self._read: tuple[int, int] | None = None

    def set(self, read: int, running: int | None = None) -> None:
        """It was `read` at so many nanoseconds of running time; now."""
        self._read = read, clock.running_time() if running is None else running

    def now(self) -> int | None:
        """None where there is no anchor."""
        if self._read is None:
            return None
        passed = (clock.running_time() - self._read[1]) // _MILLION
        return self._read[0] + passed - passed // _SLOWER - 1


class Tended:
    """One license's account in one process. `problem`: why no lease is renewed; `refusal`: why nothing starts."""

    def __init__(
        self, grant: Grant, like: Account, ledger: Ledger, anchor: Anchor | None, anchor_clock: AnchorClock
    ) -> None:
        """`ledger` is taken over; the account in it is recovered already."""
        self._grant, self._like, self._ledger = grant, like, ledger
        self._anchor, self._anchor_clock = anchor, anchor_clock
        self.offset = like.words[Field.OFFSET_NS]
        self.refusal: HwlicenseError | None = None
        self.problem: HwlicenseError | None = None
        self.closed = False
        self._demand, self._asked, self._seen = 0, 0.0, (-1, 0.0)
        self.on_round: Callable[[], None] = lambda: None
        self._new_process()

    @property
    def metered(self) -> bool:
        """Whether anything is to be spent."""
        return self._grant.terms_of_use.metered

    def _new_process(self) -> None:
        """No thread yet: in a forked child, that of the parent is not there."""
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._starting = Turn()
        self._stepping = False
        self._silent_since: float | None = None
        self._retry_at = self._calendar_at = 0.0

    def after_fork(self) -> None:
        """In a forked child: files and locks of its own."""
        self._new_process()
        if not self.closed:
            self._ledger.after_fork()

    def abandon(self) -> None:
        """Let go of the account as it is: what it says is for others to use."""
        self.closed = True
        self._ledger.close()

    # ---- the account

    @contextmanager
    def sharing(self) -> Iterator[tuple[Account, int]]:
        """The account, for this process alone, and the time on its clock. Kept if the block ends well."""
        process = os.getpid()
        with self._ledger.sharing() as shared:
            account, now = self._load(shared)
            yield account, now
            if os.getpid() != process:  # a signal handler forked: the lock, and what was booked, are the parent's
                raise forked()
            shared.share(account.encode())

    def writing(self) -> AbstractContextManager[object]:
        """Let no other process write anything down."""
        return self._ledger.writing()

    def now(self) -> int:
        """The time on the meter's clock, in nanoseconds."""
        return clock.boot_time() + self.offset

    def snapshot(self) -> tuple[Account, int]:
        """The account as it is, and the time on its clock."""
        with self._ledger.sharing() as shared:
            return self._load(shared)

    def _load(self, shared: Shared) -> tuple[Account, int]:
        account = self._like.copy(shared.snapshot())
        return account, account.advance(clock.boot_time() + self.offset)

    def _moment(self, read: int | None = None) -> leases.Moment:
        """Now, with the anchor's clock as it was just `read`, or as it must be."""
        anchors = self._anchor_clock.now() or 0 if read is None else read
        return leases.Moment(clock.running_time(), anchors, self.now(), longest_session(self._grant))

    def _recorded(self, change: Callable[[Account], bool]) -> bool:
        """Change the lease, write that down, and only then let it be used; others go on booking meanwhile."""
        process = os.getpid()
        with self._ledger.writing() as write:
            account, _ = self.snapshot()
            if not change(account):
                return False
            if os.getpid() != process:
                raise forked()
            self._write(write, account)
            with self.sharing() as (present, _):
                leases.adopt(present, account)
            if not leases.low(present, self._demand):
                self._demand = 0
            return True

    def _write(self, write: Callable[[bytes], None], account: Account) -> None:
        # With the time: windows go on from it after a restart
        calendar.progress(account.words, clock.boot_time(), self._anchor_clock.now())
        write(account.encode())

    @property
    def most(self) -> int | None:
        """Allowances that are reserved at once, at the most; None where nothing but the limits bounds it."""
        return self._like.largest_lease if self._anchor else None

    def ask(self, count: int) -> None:
        """Have so many reserved, without waiting for it."""
        self._demand, self._asked = max(self._demand, count), time.monotonic()
        self._wake.set()

    def reserve(self, count: int) -> bool:
        """Reserve so many now, if that takes no anchor; if it does, ask for it. Raises StorageError."""
        self._demand, self._asked = max(self._demand, count), time.monotonic()
        if self._anchor is None:
            self._recorded(lambda account: leases.reserve_freely(account, self._moment(), self._demand))
            return True  # by this thread, or another just before
        self._wake.set()
        return False

    def _confirm(self, anchor: Anchor) -> None:
        """See that this lease is the latest, and only then reserve more of it. Raises HwlicenseError."""
        with self._ledger.renewing() as mine:
            if not mine:
                return
            account, looked = self.snapshot()
            due = leases.due(account, clock.running_time(), self._demand)  # before the anchor says how things are
            with self._waiting():
                reading = anchor.read()
            self._anchor_clock.set(reading.clock)
            moment = self._moment(reading.clock)
            latest = reading.steps == account.words[Field.SERIAL]
            with self.sharing() as (present, _):
                if latest:
                    leases.confirm(present, moment, looked)
                else:
                    leases.fence(present)
            if latest:
                self._recorded(
                    lambda account: (
                        (due and leases.raise_reservation(account, moment, self._demand))
                        or leases.renew_record(account, moment, self._demand)
                    )
                )

    def _renew_lease(self, anchor: Anchor) -> None:
        """Take a further lease from the anchor. Raises HwlicenseError."""
        with self._ledger.renewing() as mine:
            if not mine:
                return
            account, looked = self.snapshot()
            step = leases.plan(account, self._moment(), self._demand)
            if not step or not leases.low(account, self._demand):  # another process was quicker
                return
            with self._ledger.writing() as write:  # what cannot be written down is not asked for
                self._write(write, self.snapshot()[0])
            self._stepping = True
            try:
                with self._waiting():
                    reading = anchor.step()
                self._anchor_clock.set(reading.clock)
                moment = self._moment(reading.clock)
                self._recorded(lambda account: leases.take(account, step, reading, moment, looked))
            finally:
                self._stepping = False

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self._silent_since = time.monotonic()
        try:
            yield
        finally:
            self._silent_since = None

    @property
    def silence(self) -> float:
        """Seconds since the anchor was asked something that it has not answered; 0 where it has."""
        since = self._silent_since
        return 0.0 if since is None else time.monotonic() - since

    # ---- the thread

    def wake(self) -> None:
        """Begin the next round now."""
        self._wake.set()

    def start(self) -> None:
        """Have a thread look after the account from now on. Raises StorageError where the system gives none."""
        with self._starting:
            if self._thread is not None or self.closed:
                return
            self._thread = begin("meter", _tend_on, weakref.ref(self), self._wake)
            self._ledger.serve()

    def tend(self) -> bool:
        """One round of looking after the account. False when there is nothing to look after any more."""
        if self.closed:
            return False
        problem = _problem(self._renew) if self.metered else None
        if problem:
            self._retry_at = time.monotonic() + RETRY
        others = [_problem(self.on_round), _problem(self._check_calendar)]
        found = next((each for each in (problem, *others) if each), None)
        if found or time.monotonic() >= self._retry_at:  # until then nothing was tried
            self.problem = found
        return True

    def _renew(self) -> None:
        anchor = self._anchor
        account, meter = self.snapshot()
        self._demand = min(
            self._demand,
            account.largest_lease,
            *([] if account.total is None else [account.remaining or 0]),
        )
        if time.monotonic() > self._asked + _ASKED:
            self._demand = 0
        used, now = account.words[Field.USED], time.monotonic()
        if used != self._seen[0]:
            self._seen = used, now
        idle = now - self._seen[1] >= leases.idle(account, meter) / 10**9 and not self._demand
        if idle and leases.settle(account, self._moment(), account.kept_idle):
            self._settle()
        if anchor is None and not idle:
            self._recorded(lambda account: leases.reserve_freely(account, self._moment(), self._demand))
        if anchor and now >= self._retry_at:
            low = leases.low(account, self._demand)
            due = leases.due(account, clock.running_time(), self._demand)
            if due or leases.unconfirmed(account, meter) or (low and leases.outdated(account, self._moment().clock)):
                self._confirm(anchor)
                account, _ = self.snapshot()
            if leases.low(account, self._demand) and not due:
                self._renew_lease(anchor)

    def _settle(self) -> None:
        with self._ledger.writing() as write, self.sharing() as (account, _):
            if leases.settle(account, self._moment(), account.kept_idle):
                self._write(write, account)

    def _check_calendar(self) -> None:
        now = time.monotonic()
        if now < self._calendar_at:
            return
        self._calendar_at = now + _CHECKED
        account, _ = self.snapshot()
        before = account.words[Field.MARK]
        clocks = calendar.Clocks(clock.wall(), clock.boot_time(), same_boot=True, anchor=self._anchor_clock.now())
        try:
            today = calendar.day(calendar.present(account.words, clocks, calendar.seconds(self._grant.issued)))
            check_validity(self._grant, today, calendar.day(account.words[Field.FIRST]))
            self.refusal = None
        except HwlicenseError as error:
            self.refusal = error.again()
        if account.words[Field.MARK] - before >= _MARKED:
            with self._ledger.writing() as write, self.sharing() as (present, _):
                calendar.remember(present.words, clocks, max(present.words[Field.MARK], account.words[Field.MARK]))
                write(present.encode())

    def close(self, last: Callable[[Account], None]) -> None:
        """End the thread, let `last` change the account, and let go. The last process writes down what was used."""
        self.closed = True
        self._wake.set()
        thread = self._thread
        if thread and thread is not threading.current_thread():
            thread.join(PATIENCE)
            if self._stepping:  # what comes of it is in the record then, and costs nothing
                thread.join(_STEP)
        try:
            with self._ledger.writing() as write:
                self._ledger.leave()
                with self.sharing() as (account, _):
                    last(account)
                    alone = self._ledger.alone()
                    if alone and leases.settle(account, self._moment(), 0):
                        self._write(write, account)
                if alone:
                    self._ledger.forget()
        finally:
            self._ledger.close()


def _problem(part: Callable[[], None]) -> HwlicenseError | None:
    """What one part of a round came to: no other is kept from its turn by it."""
    try:
        part()
    except HwlicenseError as error:
        return error.again()
    except MemoryError:
        return out_of_memory()
    except Exception as error:  # noqa: BLE001  # whatever it is, the next round may go well
        what = f"The account could not be looked after ({type(error).__name__}: {error})."
        problem = HardwareError(Reason.INTERNAL, what, "Open the model again; if it comes back, report it.")
        problem.__cause__ = error
        return problem
    return None


def _tend_on(tended: weakref.ref[Tended], wake: threading.Event) -> None:
    while True:
        wake.wait(PERIOD)
        wake.clear()
        present = tended()
        if present is None or not present.tend():
            return
        del present


def forked() -> StorageError:
    """What is said in a child that was forked in the middle of a change to the account."""
    what = "The process was forked in the middle of a change to the account, which is its parent's."
    return StorageError(Reason.STORAGE, what, "Try again. Do not fork in a signal handler.")


def longest_session(grant: Grant) -> int:
    """How long a session may last, in nanoseconds."""
    return (grant.continuity or SESSION) * 10**9
