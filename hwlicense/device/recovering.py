"""Opening a license's account: what may have been spent is charged, a lease is taken, and the day is known."""

from __future__ import annotations

import shutil
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from hwlicense.core import calendar, leases
from hwlicense.core.account import Account, Field
from hwlicense.core.errors import DamagedError, Reason, RefusedError, StorageError, UsageError
from hwlicense.core.validity import check_validity
from hwlicense.device import clock
from hwlicense.device.ledger import Ledger, prepare, unverified
from hwlicense.device.sharing import check_answered
from hwlicense.device.tending import AnchorClock, Tended, longest_session

if TYPE_CHECKING:
    import datetime
    from collections.abc import Callable
    from pathlib import Path

    from hwlicense.core.documents import ClockReset, Grant
    from hwlicense.core.hardware import Anchor, Reading, Steps
    from hwlicense.core.limits import Rate
    from hwlicense.core.secret import Secret

_OPENING = 60.0  # seconds to wait for another process that opens the account, and for its TPM


def account_folder(state: Path, grant: Grant) -> Path:
    """Where the account of this revision is kept: each has its own, as its keys are."""
    return state / "licenses" / grant.license / f"use-{grant.revision}"


def forget_others(folder: Path) -> None:
    """Remove the accounts of other revisions, whose licenses are gone from here. What cannot be removed stays."""
    for other in folder.parent.glob("use-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)


def open_account(folder: Path, grant: Grant, key: Secret, anchor: Anchor | None, reset: ClockReset | None) -> Tended:
    """The account of a license that has one, recovered. `key` is taken over, also where this fails.

    Raises RefusedError (CLOCK_SET_BACK, LICENSE_EXPIRED, LICENSE_NOT_YET_VALID, NOT_ANCHORED), StorageError,
    HardwareError, DamagedError.
    """
    use = grant.terms_of_use
    if use.anchor and anchor is None:
        key.wipe()
        what = "The license asks for an account that a TPM anchors, and this device's is not anchored."
        raise RefusedError(Reason.NOT_ANCHORED, what, "Ask the vendor for a license for a request with --counted.")
    like = Account(use.limits, throttle(grant))
    ledger = Ledger(folder, key, len(like.encode()))
    try:
        opened = _Opening(grant, like, ledger, anchor, reset)
        with ledger.writing(_OPENING) as write:
            account = opened.opened(write)
        tended = Tended(grant, account, ledger, anchor, opened.clock)
        if anchor is None and use.metered:
            tended.reserve(account.first_step)
    except BaseException:
        ledger.close()
        raise
    return tended


def remembered_day(folder: Path, grant: Grant, key: Secret, anchor: Anchor | None, reset: ClockReset | None) -> None:
    """Hold a license that has no account to its dates, by a clock that does not go back. `key` is taken over.

    Where the state folder cannot be written, nothing is remembered. Raises RefusedError as `open_account` does.
    """
    like = Account(grant.terms_of_use.limits)
    try:
        ledger = Ledger(folder, key, len(like.encode()))
    except (StorageError, UsageError):
        check_validity(grant, calendar.day(known(calendar.seconds(grant.issued))))
        return
    try:
        with ledger.writing() as write:
            _Opening(grant, like, ledger, None, reset).dated(write, anchor)
    finally:
        ledger.close()


class _Opening:
    def __init__(
        self, grant: Grant, like: Account, ledger: Ledger, anchor: Anchor | None, reset: ClockReset | None
    ) -> None:
        self._grant, self._like, self._ledger, self._anchor, self._reset = grant, like, ledger, anchor, reset
        self._boot, self._gone = clock.boot_identifier(), False
        self.clock = AnchorClock()

    def opened(self, write: Callable[[bytes], None]) -> Account:
        """The account, by the first process that has the license open or a further one."""
        if not self._ledger.alone():
            try:
                return self.joined()
            except StorageError:
                if not self._ledger.left():  # who was there has ended meanwhile
                    raise
        return self.first(write)

    def first(self, write: Callable[[bytes], None]) -> Account:
        """No other process has the license open."""
        with self._anchor.together() if self._anchor else nullcontext() as anchor:
            account, stepped = self._begun(write, anchor)
        if stepped:
            write(account.encode())
            with self._ledger.sharing() as shared:
                shared.share(account.encode())
        return account

    def _begun(self, write: Callable[[bytes], None], anchor: Steps | None) -> tuple[Account, bool]:
        """The account recovered and shared with whoever joins; and whether it has a first lease to be written down."""
        reading = anchor.read() if anchor else None
        if reading:
            self.clock.set(reading.clock)
        account, recorded = self._found(reading)
        same_boot = _boot_of(account) == self._boot
        problem = self._dated(account)
        account.advance(clock.boot_time() + account.words[Field.OFFSET_NS])
        moment = self._moment(account)
        if recorded:
            leases.recover(account, reading, moment, same_boot=same_boot)
        elif self._gone:
            leases.lose(account, reading, moment)
        write(account.encode())
        if problem:
            raise problem
        # All that can be short (descriptors, threads, room for a socket) is taken before the anchor is asked to count.
        self._ledger.begin(account.encode())
        self._ledger.serve()
        return account, anchor is not None and self._step(anchor, account)

    def _step(self, anchor: Steps, account: Account) -> bool:
        """Take a first lease, where there is something to lease."""
        metered, looked = self._grant.terms_of_use.metered, self._moment(account)
        step = leases.plan(account, looked, account.first_step)
        if metered and not step:
            return False
        reading = anchor.step()
        self.clock.set(reading.clock)
        if metered:
            leases.take(account, step, reading, self._moment(account), looked.meter)
        else:
            account.words[Field.SERIAL] = reading.steps
            leases.note_anchor(account, self._moment(account))
        return True

    def _moment(self, account: Account) -> leases.Moment:
        meter = clock.boot_time() + account.words[Field.OFFSET_NS]
        return leases.Moment(clock.running_time(), self.clock.now() or 0, meter, longest_session(self._grant))

    def joined(self) -> Account:
        """Other processes have it open, and have recovered the account."""
        self._ledger.join()
        self._ledger.serve()
        with self._ledger.sharing() as shared:
            account = self._like.copy(shared.snapshot())
        if not account.known or _boot_of(account) != self._boot:
            what = "The license is open in a process of another release, whose account of use this one cannot read."
            raise StorageError(Reason.STORAGE, what, "Close that process, or use the same release in both.")
        if self._anchor:
            self.clock.set(account.words[Field.ANCHOR_MS], account.words[Field.ANCHOR_NS])
        if problem := self._dated(account):
            raise problem
        return account

    def dated(self, write: Callable[[bytes], None], anchor: Anchor | None) -> None:
        """Nothing but the day is kept."""
        account = self._recorded() or self._like
        before = account.words[Field.MARK], account.words[Field.RESET], _boot_of(account)
        same_boot = _boot_of(account) == self._boot
        if anchor and not same_boot and calendar.unset(clock.wall(), calendar.seconds(self._grant.issued)):
            self.clock.set(anchor.read().clock)
        problem = self._dated(account)
        after = account.words[Field.MARK], account.words[Field.RESET], _boot_of(account)
        if after[0] // calendar.DAY != before[0] // calendar.DAY or after[1:] != before[1:]:
            write(account.encode())
        if problem:
            raise problem

    def _recorded(self) -> Account | None:
        raw = self._ledger.recorded()
        if raw is None:
            return None
        account = self._like.copy(raw)
        return account if account.known else None

    def _found(self, reading: Reading | None) -> tuple[Account, bool]:
        """The account as it was written down, and whether it was."""
        try:
            account = self._recorded()
            damaged = False
        except DamagedError:
            account, damaged = None, True
        if account is not None:
            return account, True
        self._gone = bool(reading.steps) if reading else damaged
        if self._gone:
            self._like.words[Field.FIRST] = calendar.seconds(self._grant.issued)
        return self._like, False

    def _dated(self, account: Account) -> RefusedError | None:
        """Go on with the account's clocks. What the license says to the day."""
        words, grant = account.words, self._grant
        same_boot = _boot_of(account) == self._boot
        floor = calendar.seconds(grant.issued)
        clocks = calendar.Clocks(clock.wall(), clock.boot_time(), same_boot, self.clock.now())
        before = words[Field.MARK]
        if self._reset and calendar.reset(words, clocks, self._reset.time):
            before = 0  # how long it was off is not known
        problem = None
        try:
            now = calendar.present(words, clocks, floor)
            words[Field.FIRST] = words[Field.FIRST] or now
            check_validity(grant, calendar.day(now), calendar.day(words[Field.FIRST]))
        except RefusedError as error:
            problem = error
        if not same_boot:
            off = max(0, words[Field.MARK] - before) * 10**9 if before and not problem else 0
            words[Field.OFFSET_NS] = words[Field.NEWEST_NS] + off - clock.boot_time()
            words[Field.BOOT_HIGH], words[Field.BOOT_LOW] = self._boot
        return problem


def foreseeable(folder: Path, grant: Grant, reset: ClockReset | None) -> None:
    """Refuse by the clock, and by what the account says unchecked, before hardware is asked: that costs no open.

    Makes the account's files where there are none: what is no place for them is found out now. Raises RefusedError as
    `open_account`, StorageError.
    """
    clock.check_shared()
    like, floor = Account(grant.terms_of_use.limits, throttle(grant)), calendar.seconds(grant.issued)
    first: datetime.date | None = None
    now = known(floor)
    with suppress(ValueError, OverflowError):  # numbers that nobody wrote: opening says so
        if account := latest(folder, like):
            clocks = calendar.Clocks(
                clock.wall(), clock.boot_time(), _boot_of(account) == clock.boot_identifier(), None
            )
            if reset:
                calendar.reset(account.words, clocks, reset.time)
            now = calendar.present(account.words, clocks, floor)
            first = calendar.day(account.words[Field.FIRST]) if account.words[Field.FIRST] else None
    check_validity(grant, calendar.day(now), first)
    if kept(grant):
        prepare(folder, len(like.encode()))
        check_answered(folder / "alive")


def known(floor: int) -> int:
    """The time by the wall clock; `floor`, where that was never set."""
    return floor if calendar.unset(clock.wall(), floor) else clock.wall()


def kept(grant: Grant) -> bool:
    """Whether a license cannot be opened without an account."""
    use = grant.terms_of_use
    return bool(use.metered or use.days or use.anchor)


def latest(folder: Path, like: Account) -> Account | None:
    """The account as it was last, unchecked, as only an open license can check it; None where there is none."""
    size = len(like.encode())
    copies = (like.copy(raw[:size]) for raw in unverified(folder) if len(raw) >= size)
    return next((account for account in copies if account.known), None)


def _boot_of(account: Account) -> tuple[int, int]:
    return account.words[Field.BOOT_HIGH], account.words[Field.BOOT_LOW]


def throttle(grant: Grant) -> Rate | None:
    """The rate that the license's monitor may impose."""
    monitor = grant.terms_of_use.monitor
    return monitor.throttled if monitor else None
