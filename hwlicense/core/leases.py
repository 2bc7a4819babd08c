"""How allowances are leased to an account: charged in full before they are spent.

The account is written to the disk as a record. What is written down as reserved may be spent; after a crash it counts
as spent. The anchor (a count in hardware) gives each *lease* a serial, and only the holder of the latest reserves more:
each reservation is at least `SPACING` after the one before, at most `STEP`, and comes after a look at the anchor. So
the powered-on time since a record bounds what may have been reserved in its lease, and in later ones, whose
reservations are `Account.largest_step` at the most. An older record that is put back, or a copy that is used beside it,
is charged all of that. Whoever crashes, deletes, restores or copies loses, and never gains.

Rates need more: what is reserved is booked within `LASTING` after a look at the anchor. Until then what a copy may have
reserved is kept free in all windows, and counts from then on.

Without an anchor, a record is taken for the latest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from hwlicense.core.account import FOREVER, RESERVATIONS, Field

if TYPE_CHECKING:
    from hwlicense.core.account import Account
    from hwlicense.core.hardware import Reading

SPACING: Final = 10_000
"""Milliseconds between reservations in one lease, at the least."""

LASTING: Final = 300 * 10**9
"""Nanoseconds after a look at the anchor in which a license with rates books what is reserved."""

_NANOSECONDS: Final = SPACING * 1_000_000
_OUTDATED: Final = 600_000
_EVERYTHING: Final = 1 << 60
_REST: Final = 675 * 10**9  # of the anchor for each step: 128 steps a day, ten years with 500,000 of them
_LONGEST_IDLE: Final = 300 * 10**9
_OF_LEASE: Final = (
    *(Field.SERIAL, Field.SIZE, Field.BASE, Field.RESERVED, Field.STEP, Field.SETTLED),
    *(Field.CLOCK_MS, Field.RAISED_NS, Field.PACE, Field.COUNTED, Field.FRESH_NS, Field.WORN_NS),
    *(Field.ANCHOR_MS, Field.ANCHOR_NS),
)


class Moment(msgspec.Struct, frozen=True):
    """When something is written down: running time and the meter's in nanoseconds, the anchor's clock in milliseconds.

    `session` is the longest session in nanoseconds: what one has reserved may be spent until its end.
    """

    running: int
    clock: int
    meter: int
    session: int = 0


def low(account: Account, demand: int = 0) -> bool:
    """Whether more should be reserved, for use as it is or for a session of `demand`."""
    words = account.words
    enough = account.kept_idle if words[Field.SETTLED] else words[Field.STEP]
    return words[Field.LEFT] < max(demand, (enough + 1) // 2)


def due(account: Account, running: int, demand: int = 0) -> bool:
    """Whether this lease should and may reserve more, as far as the account says: the anchor has the last word."""
    words = account.words
    spaced = running - words[Field.RAISED_NS] >= _NANOSECONDS
    return low(account, demand) and spaced and not words[Field.SETTLED] and words[Field.RESERVED] < words[Field.SIZE]


def raise_reservation(account: Account, moment: Moment, demand: int = 0) -> bool:
    """Reserve more where that is `due`, and the anchor was seen to be at this lease since. To be written down before
    any of it is booked.
    """
    words = account.words
    # By the anchor's clock, too: who runs in a namespace of its own may have set the system's on.
    if not due(account, moment.running, demand) or not _reservations(moment.clock - words[Field.CLOCK_MS]):
        return False
    steady = moment.running - words[Field.RAISED_NS] < 2 * _NANOSECONDS
    _measure(account, moment)
    wanted = max(_step(account), demand)
    if steady:  # a crash costs a reservation or two: they need be no larger than use asks for
        words[Field.STEP] = min(words[Field.STEP], wanted * 5 // 4)
    _reserve(account, min(words[Field.STEP], wanted, words[Field.SIZE] - words[Field.RESERVED]))
    _raised(account, moment)
    return True


def reserve_freely(account: Account, moment: Moment, demand: int = 0) -> bool:
    """Reserve more, where there is no anchor to lease it. To be written down before any of it is booked."""
    words = account.words
    if not low(account, demand):
        return False
    surge = moment.running - words[Field.RAISED_NS] < _NANOSECONDS
    _measure(account, moment)
    words[Field.STEP] = _step(account, surge=surge)
    more = max(words[Field.STEP], demand)
    if account.total is not None:
        more = min(more, account.total - words[Field.USED] - words[Field.LEFT])
    if more <= 0:
        return False
    words[Field.SETTLED], words[Field.FRESH_NS] = 0, FOREVER
    _reserve(account, more)
    _raised(account, moment)
    return True


def confirm(account: Account, moment: Moment, looked: int) -> None:
    """The anchor was at this lease when it was asked: after `looked`, by the meter."""
    note_anchor(account, moment)
    account.words[Field.FRESH_NS] = looked + LASTING if account.rated else FOREVER


def note_anchor(account: Account, moment: Moment) -> None:
    """The anchor was asked just now."""
    account.words[Field.ANCHOR_MS], account.words[Field.ANCHOR_NS] = moment.clock, moment.running


def unconfirmed(account: Account, meter: int) -> bool:
    """Whether the anchor should be looked at again."""
    return account.words[Field.LEFT] > 0 and account.words[Field.FRESH_NS] - meter < LASTING // 2


def outdated(account: Account, anchors: int) -> bool:
    """Whether the record is so old, by the anchor's clock, that a cut right after a step would be charged for long."""
    words = account.words
    ended = words[Field.SETTLED] or words[Field.RESERVED] >= words[Field.SIZE]
    return bool(ended) and anchors - words[Field.CLOCK_MS] > _OUTDATED


def renew_record(account: Account, moment: Moment, demand: int) -> bool:
    """Before a further lease: note that none was taken after this one till now. To be written down: True."""
    if not (low(account, demand) and outdated(account, moment.clock)):
        return False
    _measure(account, moment)
    _raised(account, moment)
    return True


def fence(account: Account) -> None:
    """Another took a lease after this one: give up what is reserved and not booked."""
    words = account.words
    words[Field.LEFT] = words[Field.FRESH_NS] = 0
    words[Field.RESERVED] = words[Field.SIZE] = words[Field.USED] - words[Field.BASE]
    words[Field.SETTLED] = 1


def idle(account: Account, meter: int) -> int:
    """Nanoseconds without use after which a lease is settled: the longer, the more leases there were of late."""
    return _NANOSECONDS + min(max(0, account.words[Field.WORN_NS] - meter) // 64, _LONGEST_IDLE)


def settle(account: Account, moment: Moment, keep: int) -> bool:
    """Keep only so much of the reservation, and reserve nothing more in this lease. False where that is so already."""
    words = account.words
    if words[Field.SETTLED] and words[Field.LEFT] <= keep:
        return False
    _measure(account, moment)
    words[Field.LEFT] = max(0, min(words[Field.LEFT], keep))
    words[Field.RESERVED] = words[Field.USED] - words[Field.BASE] + words[Field.LEFT]
    words[Field.SETTLED] = 1
    _followed(account, moment)  # its `CLOCK_MS` stays: nobody looked whether the lease is still the latest
    return True


def plan(account: Account, moment: Moment, demand: int = 0) -> int:
    """The reservations of the next lease, as large as use asks for; 0 where the total leaves nothing to lease."""
    words = account.words
    _measure(account, moment)
    surge = moment.running - words[Field.RAISED_NS] < _NANOSECONDS
    step = max(demand, _step(account, surge=surge and not words[Field.SETTLED]))
    if words[Field.SETTLED] and words[Field.RAISED_NS]:  # after a pause in use: as at the burst before it, nearly
        step = max(step, words[Field.STEP] * 3 // 4)
    return min(step, account.largest_step) if account.total is None or account.total > words[Field.USED] else 0


def take(account: Account, step: int, reading: Reading, moment: Moment, looked: int) -> bool:
    """Begin the lease that the anchor counted, after `looked`; those of others are charged. To be written down before
    any of it is booked: True.
    """
    words = account.words
    if missing := reading.steps - words[Field.SERIAL] - 1:
        fence(account)
        charge = _unknown(account, missing, reading)
        account.charge(charge, moment.meter + LASTING + moment.session)
    kept = words[Field.LEFT]  # others may be about to book it
    size = kept + step * RESERVATIONS
    if account.total is not None:
        left = max(0, account.total - words[Field.USED])
        size = min(size, left, max(kept + step, account.total // 2))  # one crash costs no more than half of it
    words[Field.SERIAL], words[Field.BASE], words[Field.SIZE] = reading.steps, words[Field.USED], size
    words[Field.LEFT] = words[Field.RESERVED] = min(kept + step, size)
    words[Field.STEP], words[Field.SETTLED] = max(step, 1), 0
    words[Field.WORN_NS] = max(words[Field.WORN_NS], moment.meter) + _REST
    confirm(account, moment, looked)
    _raised(account, moment)
    return True


def adopt(account: Account, recorded: Account) -> None:
    """Take over what was written down of the lease, while others went on booking from what was reserved before."""
    for field in _OF_LEASE:
        account.words[field] = recorded.words[field]
    account.words[Field.USED] += recorded.words[Field.LOST] - account.words[Field.LOST]
    for field in (Field.LOST, Field.DOUBTED, Field.DOUBTED_NS):
        account.words[field] = recorded.words[field]
    spent = account.words[Field.USED] - account.words[Field.BASE]
    account.words[Field.LEFT] = account.words[Field.RESERVED] - spent


def recover(account: Account, reading: Reading | None, moment: Moment, *, same_boot: bool) -> None:
    """Charge what may have been spent since the record was written, and what others may be about to spend.

    `reading` is the anchor's; None without one. `same_boot`: the record is of this boot, so that whoever wrote it may
    still be there. To be written down before the next step.
    """
    words, until, charge = account.words, 0, unsettled(account, 0)
    if reading:
        missing = reading.steps - words[Field.SERIAL]
        passed = reading.clock - words[Field.CLOCK_MS]
        # Whatever the system says of its boots: a clock that went on since is of this run of the anchor.
        this_run = same_boot or passed + reading.lapse < reading.uptime
        until_cut = passed + reading.lapse - reading.uptime
        if this_run or passed < reading.uptime:  # or it may be, and is charged as if
            until_cut = max(passed, until_cut)
        charge = unsettled(account, until_cut) + _unknown(account, missing, reading)
        if missing or (this_run and charge):
            until = moment.meter + LASTING + moment.session
        words[Field.SERIAL] = reading.steps
        words[Field.CLOCK_MS] = max(words[Field.CLOCK_MS], reading.clock)
    account.charge(max(0, charge), until if charge > 0 else 0)
    _begin(account)


def unsettled(account: Account, passed: int) -> int:
    """What of this lease may have been spent and is not booked, `passed` milliseconds after the last reservation."""
    words = account.words
    reserved = words[Field.RESERVED] - (words[Field.USED] - words[Field.BASE])
    if words[Field.SETTLED]:
        return reserved
    more = words[Field.STEP] * _reservations(passed)
    return reserved + max(0, min(words[Field.SIZE] - words[Field.RESERVED], more))


def lose(account: Account, reading: Reading | None, moment: Moment) -> None:
    """Charge everything: the account was deleted, or is damaged."""
    account.charge(_EVERYTHING, moment.meter + LASTING + moment.session)
    if reading:
        account.words[Field.SERIAL], account.words[Field.CLOCK_MS] = reading.steps, reading.clock
    _begin(account)


def _reservations(milliseconds: int) -> int:
    """How many there may be in so much time: a little more, as clocks may differ."""
    return max(0, milliseconds) * 17 // (16 * SPACING)


def _unknown(account: Account, leases: int, reading: Reading) -> int:
    """What so many leases may have reserved, of which only the time since the account's is known."""
    if leases <= 0:
        return -leases and _EVERYTHING  # below zero: that anchor never gave out the account's serial
    # Each may have ended with a power cut, which took from the anchor's clock.
    passed = reading.clock - account.words[Field.CLOCK_MS] + leases * reading.lapse
    return account.largest_step * min(leases + _reservations(passed), leases * RESERVATIONS)


def _begin(account: Account) -> None:
    words = account.words
    words[Field.LEFT] = words[Field.RESERVED] = words[Field.SIZE] = words[Field.RAISED_NS] = 0
    words[Field.BASE], words[Field.SETTLED], words[Field.FRESH_NS] = words[Field.USED], 1, 0


def _reserve(account: Account, more: int) -> None:
    account.words[Field.RESERVED] += more
    account.words[Field.LEFT] += more


def _raised(account: Account, moment: Moment) -> None:
    _followed(account, moment)
    account.words[Field.CLOCK_MS] = max(account.words[Field.CLOCK_MS], moment.clock)


def _followed(account: Account, moment: Moment) -> None:
    account.words[Field.RAISED_NS] = moment.running
    account.words[Field.COUNTED] = account.words[Field.USED]


def _measure(account: Account, moment: Moment) -> None:
    """Follow the pace of use: upwards at once, downwards slowly."""
    words = account.words
    passed = moment.running - words[Field.RAISED_NS]
    if words[Field.RAISED_NS] and passed > 0:
        pace = max(0, words[Field.USED] - words[Field.COUNTED]) * 10**12 // passed
        words[Field.PACE] = min(max(pace, words[Field.PACE] * 7 // 8), 1 << 40)


def _step(account: Account, *, surge: bool = False) -> int:
    """Allowances for half as long again as reservations are apart; twice the last where those were too few."""
    words = account.words
    pace = words[Field.PACE] * SPACING * 3 // 2 // 10**6
    return min(max(pace, 2 * words[Field.STEP] if surge else 0, account.kept_idle), account.largest_step)
