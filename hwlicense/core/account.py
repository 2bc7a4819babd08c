"""The account of a license's use: what is booked of its limits. A row of numbers that all processes of a device share.

An *allowance* is one inference. `hwlicense.core.leases` says how many of them may be booked.
"""

from __future__ import annotations

from array import array
from enum import IntEnum, auto
from typing import TYPE_CHECKING, Final, Self

import msgspec

from hwlicense.core.windows import WORDS, Window, windows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hwlicense.core.limits import Limits, Rate

SESSIONS: Final = 32
"""Sessions with reserved allowances that can be under way at once."""

FOREVER: Final = 1 << 62
"""Nanoseconds of the meter that never come."""

RESERVATIONS: Final = 128
"""Reservations in one lease."""

LARGEST: Final = 1 << 28
"""Allowances of the largest lease."""

_SMALL: Final = 64  # allowances reserved at first, and kept by an idle process, at the most
_FEW: Final = 16  # allowances that are kept at a pause even where a thousandth is less
_PARTS: Final = 1024  # of the smallest limit: what is kept at a pause, at the most
_LEASED: Final = 256  # parts of the total: the most of one reservation
_AHEAD: Final = 15  # seconds of use that a reservation is for
_FREQUENT: Final = 60  # seconds of a rate's frame from which on a loss to it would be felt
_LAYOUT: Final = 2
_MOST: Final = 1 << 60


class Field(IntEnum):
    """Where each number of the account is. Times are as the names say."""

    LAYOUT = 0
    BOOT_HIGH = auto()
    BOOT_LOW = auto()
    USED = auto()  # allowances that were booked, ever, or lost
    LOST = auto()  # of these, by crashes and the like
    LEFT = auto()  # reserved and not booked
    SERIAL = auto()  # of the present lease
    SIZE = auto()
    BASE = auto()  # allowances before the lease
    RESERVED = auto()  # of the lease
    STEP = auto()  # the most of one reservation
    SETTLED = auto()  # 1: nothing more is reserved in this lease
    CLOCK_MS = auto()  # of the anchor, at the last reservation
    RAISED_NS = auto()  # running time, at the last reservation
    PACE = auto()  # allowances in a thousand seconds
    COUNTED = auto()  # `USED` at the last reservation
    OFFSET_NS = auto()  # from this boot's time to the meter's
    NEWEST_NS = auto()  # the latest time of the meter
    MARK = auto()  # the latest time of the calendar, in seconds since 1970
    MARK_NS = auto()  # this boot's time then
    MARK_CLOCK_MS = auto()  # the anchor's clock then
    FIRST = auto()  # when it was first opened, in seconds since 1970
    RESET = auto()  # the last clock reset
    UNSET = auto()  # 1: the wall clock was not set
    MONITOR = auto()  # the number of the monitor's state, which goes up
    FRESH_NS = auto()  # until when what is reserved may be booked, by the meter
    DOUBTED = auto()  # allowances that another may be about to spend
    DOUBTED_NS = auto()  # until when, by the meter
    ANCHOR_MS = auto()  # the anchor's clock when it was last asked
    ANCHOR_NS = auto()  # running time then
    WORN_NS = auto()  # the meter's time by which the anchor has rested from its steps


_SESSIONS_AT: Final = range(len(Field), len(Field) + 2 * SESSIONS, 2)  # when it ends at the latest, and how many
_WINDOWS_AT: Final = len(Field) + 2 * SESSIONS


class Short(msgspec.Struct, frozen=True):
    """Why nothing was booked: `rate` says no for `wait` nanoseconds (None: always); or the total is used up; or else
    more must be reserved first.
    """

    rate: Rate | None = None
    wait: int | None = 0
    exhausted: bool = False


class Booked(msgspec.Struct, frozen=True):
    """`taken` allowances that are good until `end`, in nanoseconds of the meter, in these slots of the windows."""

    taken: int
    end: int
    slots: tuple[int, ...]


class Account:
    """One license's account. `words` are signed numbers of 64 bits."""

    def __init__(self, limits: Limits, throttle: Rate | None = None, raw: bytes | None = None) -> None:
        """`throttle` is a rate that a monitor may impose. `raw` is as `encode` gave it, of the right size."""
        self._limits, self._throttle = limits, throttle
        self.total = limits.inferences
        self._rates = [*limits.rates, *([throttle] if throttle else [])]
        self._windows = windows(self._rates, _WINDOWS_AT)
        self.words = array("q", raw or bytes(8 * (_WINDOWS_AT + len(self._windows) * WORDS)))
        small = [rate.count for rate in limits.rates if rate.seconds >= _FREQUENT]
        smallest = min([*small, self.total or _SMALL * _PARTS])
        self.first_step = max(1, min(_SMALL, smallest))
        """Allowances of the first reservation."""
        # What a crash of an idle process may cost: a thousandth of the total, and yet enough for a first few calls.
        self.kept_idle = max(1, min(_SMALL, max(smallest // _PARTS, min(_FEW, smallest // 8))))
        """Allowances that stay reserved at a pause in use."""
        # Of any lease, whoever took it: so a lease of which nothing else is known is bounded.
        bounds = [
            -(-_AHEAD * rate.count // rate.seconds) if rate.seconds < _AHEAD else rate.count for rate in limits.rates
        ]
        self.largest_step = max(
            self.first_step, min([LARGEST // RESERVATIONS, (self.total or LARGEST) // _LEASED, *bounds])
        )
        """Allowances of the largest reservation."""
        self.largest_lease = self.largest_step * RESERVATIONS
        """Allowances that an anchored account reserves before some are spent, at the most."""
        if raw is None:
            self.words[Field.LAYOUT] = _LAYOUT
            self.words[Field.STEP] = self.kept_idle

    def encode(self) -> bytes:
        """The numbers as bytes of this machine's order: the account never leaves the device."""
        return self.words.tobytes()

    def copy(self, raw: bytes) -> Self:
        """An account of the same license with these numbers."""
        return type(self)(self._limits, self._throttle, raw)

    @property
    def known(self) -> bool:
        """Whether the numbers are of this layout."""
        return self.words[Field.LAYOUT] == _LAYOUT

    @property
    def remaining(self) -> int | None:
        """Allowances of the total that are not booked; None where all use is free."""
        return None if self.total is None else max(0, self.total - self.words[Field.USED])

    def advance(self, now: int) -> int:
        """Let time pass; the time to go on with, which never goes back."""
        words = self.words
        now = words[Field.NEWEST_NS] = max(now, words[Field.NEWEST_NS])
        for window in self._windows:
            window.advance(words, now)
        if words[Field.DOUBTED] and words[Field.DOUBTED_NS] <= now:
            self._count(words[Field.DOUBTED], words[Field.DOUBTED_NS])
            words[Field.DOUBTED] = words[Field.DOUBTED_NS] = 0
        for at in _SESSIONS_AT:
            if words[at + 1] and words[at] <= now:
                self._count(words[at + 1], words[at])
                words[at] = words[at + 1] = 0
        return now

    def _count(self, count: int, when: int) -> None:
        for window in self._windows:
            window.book(self.words, window.slot(when), min(count, window.limit))

    def check(self, now: int, count: int, *, throttled: int = 0) -> Short | None:
        """Why `count` allowances could not be booked now; None if they could.

        `throttled` is until when the throttle is in force, by the meter; 0 where it is not.
        """
        words = self.words
        if self.total is not None and words[Field.USED] + count > self.total:
            return Short(None, None, exhausted=True)
        shorts = [
            Short(rate, self._wait(window, now, count))
            for rate, window in self._in_force(throttled=False)
            if self._room(window) < count
        ]
        if throttled and self._throttle and self._room(self._windows[-1]) < count:
            wait, left = self._wait(self._windows[-1], now, count), max(1, throttled - now)
            shorts.append(Short(self._throttle, left if wait is None else min(wait, left)))
        if shorts:  # that which says no for longest
            return max(shorts, key=lambda short: FOREVER if short.wait is None else short.wait)
        return Short() if words[Field.LEFT] < count or words[Field.FRESH_NS] <= now else None

    def _room(self, window: Window) -> int:
        return window.room(self.words) - self._reserved_by_sessions - min(self.words[Field.DOUBTED], window.limit)

    def _wait(self, window: Window, now: int, count: int) -> int | None:
        """Nanoseconds until `count` would fit in a window, if nothing more is booked; None where they never do."""
        words, doubted = self.words, min(self.words[Field.DOUBTED], window.limit)
        taken = self._reserved_by_sessions + doubted
        if count > window.limit or not taken or count + taken <= window.limit:
            return window.wait(words, now, count + taken)
        ends = [words[at] for at in _SESSIONS_AT if words[at + 1]]
        if doubted:  # it counts from then on
            until = words[Field.DOUBTED_NS]
            ends.append(until if count + doubted <= window.limit else window.forgotten(until))
        return max(1, max(ends) - now)

    def book(self, now: int, least: int, most: int, *, throttled: int = 0) -> Booked | Short:
        """Book from `least` to `most` allowances, or none. `throttled` is as in `check`."""
        if short := self.check(now, least, throttled=throttled):
            return short
        words = self.words
        free, end = words[Field.LEFT], words[Field.FRESH_NS]
        for _, window in self._in_force(throttled=bool(throttled)):
            free, end = min(free, self._room(window)), min(end, window.end(now))
        taken = max(least, min(most, free // 4))  # near the limit, others get a share
        slots = tuple(window.slot(now) for window in self._windows)
        self._book(taken, slots)
        return Booked(taken, end, slots)

    def give_back(self, booked: Booked, count: int) -> None:
        """`count` of what was booked was not spent."""
        self._book(-count, booked.slots)

    def check_session(self, now: int, count: int) -> Short | None:
        """Why no session of `count` allowances could begin now; None if one could."""
        if all(self.words[at + 1] for at in _SESSIONS_AT):
            return Short(None, max(1, min(self.words[at] for at in _SESSIONS_AT) - now))
        return self.check(now, count)

    def hold(self, now: int, count: int, end: int) -> int | Short:
        """Book for a session that ends by `end`, when all of it counts as spent. The session's place."""
        if short := self.check_session(now, count):
            return short
        words = self.words
        place = next(at for at in _SESSIONS_AT if not words[at + 1])
        words[place], words[place + 1] = end, count
        words[Field.LEFT] -= count
        words[Field.USED] += count
        return place

    def let_go(self, place: int, end: int, now: int, count: int, unspent: int) -> None:
        """The session of `count` until `end` is over: what it spent counts from now on, the rest is free."""
        words = self.words
        if (words[place], words[place + 1]) == (end, count):  # if not, its time was over before
            words[place] = words[place + 1] = 0
            words[Field.LEFT] += unspent
            words[Field.USED] -= unspent
            self._count(count - unspent, now)

    def charge(self, count: int, until: int = 0) -> None:
        """Count `count` allowances as lost: as far as the total goes, and at most a full window of each rate.

        They count in the windows from now on; or where others may be about to spend them, from `until` on.
        """
        words = self.words
        if self.total is not None:
            count = min(count, max(0, self.total - words[Field.USED]))
        else:
            count = min(count, max((window.limit for window in self._windows), default=0))
        words[Field.USED] = min(words[Field.USED] + count, _MOST)
        words[Field.LOST] = min(words[Field.LOST] + count, _MOST)
        if until > words[Field.NEWEST_NS]:
            words[Field.DOUBTED] = min(words[Field.DOUBTED] + count, _MOST)
            words[Field.DOUBTED_NS] = max(words[Field.DOUBTED_NS], until)
        else:
            for window in self._windows:
                window.book(words, words[window.at], min(count, window.limit))

    def rooms(self, now: int, *, throttled: bool = False) -> Iterator[tuple[Rate, int, int]]:
        """Each rate of the license, how much of it is left, and nanoseconds until there is more; the throttle last."""
        for rate, window in self._in_force(throttled=throttled):
            room = max(0, self._room(window))
            yield rate, room, self._wait(window, now, room + 1) or 0

    def _book(self, count: int, slots: tuple[int, ...]) -> None:
        self.words[Field.LEFT] -= count
        self.words[Field.USED] += count
        for window, slot in zip(self._windows, slots, strict=True):
            window.book(self.words, slot, count)

    @property
    def rated(self) -> bool:
        """Whether any use is limited by time."""
        return bool(self._windows)

    @property
    def _reserved_by_sessions(self) -> int:
        return sum(self.words[at + 1] for at in _SESSIONS_AT)

    def _in_force(self, *, throttled: bool) -> list[tuple[Rate, Window]]:
        pairs = list(zip(self._rates, self._windows, strict=True))
        return pairs if throttled or not self._throttle else pairs[:-1]
