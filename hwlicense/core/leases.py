"""How allowances are leased to an account: charged in full before they are spent.

The account is written to the disk as a record. What is written down as reserved may be spent; after a crash it counts
as spent. The anchor (a count in hardware) gives each *lease* a serial. A record is trusted to be the last one of its
lease only as far as hardware says: further reservations in a lease are at least `SPACING` apart and at most `STEP`
each, so that the powered-on time since the record bounds what may have been reserved since. An older record that is
put back is charged all of that, and so are later leases: the first record of a lease announces the most of the next
one's reservations, which are `GROWTH` times as large at the most. So whoever crashes, deletes or restores loses, and
never gains.

Without an anchor, a record is taken for the latest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from hwlicense.core.account import Field

if TYPE_CHECKING:
    from hwlicense.core.account import Account

LARGEST: Final = 1 << 28
"""Allowances of the largest lease, and what a lease is charged of which nothing is known."""

SPACING: Final = 10_000
"""Milliseconds between reservations in one lease, at the least."""

_BITS: Final = 2
GROWTH: Final = 1 << _BITS
"""How many times as large the reservations of the next lease can be."""

_DOUBLINGS: Final = 64
_NANOSECONDS: Final = SPACING * 1_000_000
_RESERVATIONS: Final = 128  # in a lease: about twenty minutes of use, with one writing in the anchor
_OF_LEASE: Final = (
    *(Field.SERIAL, Field.SIZE, Field.BASE, Field.RESERVED, Field.STEP, Field.ANNOUNCED, Field.SETTLED),
    *(Field.CLOCK_MS, Field.RAISED_NS, Field.PACE, Field.COUNTED),
)


class Moment(NamedTuple):
    """When something is written down: running time in nanoseconds, and the anchor's clock in milliseconds."""

    running: int
    clock: int


def low(account: Account, demand: int = 0) -> bool:
    """Whether more should be reserved, for use as it is or for a session of `demand`."""
    words = account.words
    enough = account.least if words[Field.SETTLED] else words[Field.STEP]
    return words[Field.LEFT] < max(demand, (enough + 1) // 2)


def raise_reservation(account: Account, moment: Moment, demand: int = 0, *, anchored: bool) -> bool:
    """Reserve more, as far as that is due and the lease has it. To be written down before any of it is booked."""
    words = account.words
    if not low(account, demand):
        return False
    spaced = moment.running - words[Field.RAISED_NS] >= _NANOSECONDS
    if anchored and (words[Field.SETTLED] or not spaced):
        return False
    _measure(account, moment)
    if anchored:
        more = min(words[Field.STEP], max(_step(account), demand), words[Field.SIZE] - words[Field.RESERVED])
    else:
        more = words[Field.STEP] = _step(account, surge=not spaced)
        more = max(more, demand)
        if account.total is not None:
            more = min(more, account.total - words[Field.USED] - words[Field.LEFT])
        words[Field.SETTLED] = 0
    if more <= 0:
        return False
    words[Field.RESERVED] += more
    words[Field.LEFT] += more
    _raised(account, moment)
    return True


def settle(account: Account, moment: Moment, keep: int) -> bool:
    """Keep only so much of the reservation, and reserve nothing more in this lease. False where that is so already."""
    words = account.words
    if words[Field.SETTLED] and words[Field.LEFT] <= keep:
        return False
    _measure(account, moment)
    words[Field.LEFT] = max(0, min(words[Field.LEFT], keep))
    words[Field.RESERVED] = words[Field.USED] - words[Field.BASE] + words[Field.LEFT]
    words[Field.SETTLED] = 1
    _raised(account, moment)
    return True


def plan(account: Account, moment: Moment, demand: int = 0) -> int:
    """The reservations of the next lease, as large as use asks for; 0 where the total leaves nothing to lease."""
    words = account.words
    _measure(account, moment)
    surge = moment.running - words[Field.RAISED_NS] < _NANOSECONDS
    step = max(demand, _step(account, surge=surge and not words[Field.SETTLED]))
    return min(step, words[Field.ANNOUNCED]) if account.total is None or account.total > words[Field.USED] else 0


def take(account: Account, step: int, serial: int, moment: Moment) -> bool:
    """Begin the lease `serial`; those between are charged. To be written down before any of it is booked: True."""
    words = account.words
    if missing := max(0, serial - words[Field.SERIAL] - 1):
        account.charge(_unknown(account, missing, _RESERVATIONS))
    kept = words[Field.LEFT]  # others may be about to book it
    size = kept + step * _RESERVATIONS
    if account.total is not None:
        size = min(size, max(0, account.total - words[Field.USED]))
    words[Field.SERIAL], words[Field.BASE], words[Field.SIZE] = serial, words[Field.USED], size
    words[Field.LEFT] = words[Field.RESERVED] = min(kept + step, size)
    words[Field.STEP], words[Field.SETTLED] = max(step, 1), 0
    words[Field.ANNOUNCED] = min(max(step * GROWTH, account.first), LARGEST // _RESERVATIONS)
    _raised(account, moment)
    return True


def adopt(account: Account, recorded: Account) -> None:
    """Take over what was written down of the lease, while others went on booking from what was reserved before."""
    for field in _OF_LEASE:
        account.words[field] = recorded.words[field]
    if lost := recorded.words[Field.LOST] - account.words[Field.LOST]:
        account.charge(lost)
    spent = account.words[Field.USED] - account.words[Field.BASE]
    account.words[Field.LEFT] = account.words[Field.RESERVED] - spent


def recover(account: Account, serial: int | None, elapsed: int) -> int:
    """Charge what may have been spent since the record was written; how much that is.

    `serial` is the latest that the anchor has given out, None without an anchor. Of powered-on time, `elapsed`
    milliseconds are between the record's `CLOCK_MS` and when the power went, or now.
    """
    words = account.words
    charge = words[Field.RESERVED] - (words[Field.USED] - words[Field.BASE])
    if serial is not None:
        more = max(0, elapsed) * 17 // (16 * SPACING)  # a little more, as clocks may differ
        if not words[Field.SETTLED]:
            charge += min(words[Field.SIZE] - words[Field.RESERVED], words[Field.STEP] * more)
        missing = serial - words[Field.SERIAL]
        if missing < 0:
            charge += LARGEST  # that anchor never gave out the record's serial
        elif missing > 0:
            charge += _unknown(account, missing, min(1 + more, _RESERVATIONS))
        words[Field.SERIAL] = serial
    charge = min(max(0, charge), LARGEST)
    account.charge(charge)
    _begin(account)
    return charge


def lose(account: Account, serial: int) -> None:
    """Charge leases of which nothing is known: the account was deleted, or is damaged."""
    account.charge(min(serial * LARGEST, LARGEST))
    account.words[Field.SERIAL] = serial
    _begin(account)


def _unknown(account: Account, leases: int, reservations: int) -> int:
    """What later leases than the account's may have reserved, each with so many reservations."""
    first = account.words[Field.ANNOUNCED] * reservations
    charges = (min(LARGEST, first << _BITS * place) for place in range(min(leases, _DOUBLINGS)))
    return min(LARGEST, sum(charges))


def _begin(account: Account) -> None:
    words = account.words
    words[Field.LEFT] = words[Field.RESERVED] = words[Field.SIZE] = words[Field.RAISED_NS] = 0
    words[Field.BASE], words[Field.SETTLED] = words[Field.USED], 1


def _raised(account: Account, moment: Moment) -> None:
    words = account.words
    words[Field.RAISED_NS] = moment.running
    words[Field.CLOCK_MS] = max(words[Field.CLOCK_MS], moment.clock)
    words[Field.COUNTED] = words[Field.USED]


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
    return min(max(pace, 2 * words[Field.STEP] if surge else 0, account.least), LARGEST // _RESERVATIONS)
