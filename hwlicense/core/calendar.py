"""What day it is, where the wall clock may have been set back, or never set: a mark that only goes up.

The mark is kept in the account. Seconds are since 1970, UTC.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Final

import msgspec

from hwlicense.core.account import Field
from hwlicense.core.errors import Reason, RefusedError

if TYPE_CHECKING:
    from collections.abc import MutableSequence

TOLERANCE: Final = 3600
"""Seconds that a clock may be set back, as by a correction."""

DAY: Final = 86400


class Clocks(msgspec.Struct, frozen=True):
    """`wall` in seconds; `boot` in nanoseconds since this boot, and whether the mark was set in the `same_boot`;
    `anchor`, in milliseconds of powered-on time, None without an anchor.
    """

    wall: int
    boot: int
    same_boot: bool
    anchor: int | None


def present(words: MutableSequence[int], clocks: Clocks, floor: int) -> int:
    """The time to go by, which is remembered. `floor` is when the license was issued: earlier times are no times.

    Raises RefusedError CLOCK_SET_BACK.
    """
    known = max(words[Field.MARK], floor)
    if words[Field.MARK]:
        if clocks.same_boot:
            known += max(0, clocks.boot - words[Field.MARK_NS]) // 10**9
        elif clocks.anchor is not None:
            known += max(0, clocks.anchor - words[Field.MARK_CLOCK_MS]) // 1000
    if not (never := unset(clocks.wall, floor)) and clocks.wall < known - TOLERANCE:
        what = f"The clock says {_text(clocks.wall)}, but this device has seen {_text(known)}."
        hint = "Set the clock right. If it was ahead by mistake: ask the vendor for a clock reset, and install it."
        raise RefusedError(Reason.CLOCK_SET_BACK, what, hint)
    now = known if never else max(known, clocks.wall)
    remember(words, clocks, now)
    words[Field.UNSET] = never
    return now


def remember(words: MutableSequence[int], clocks: Clocks, now: int) -> None:
    """Set the mark, and where the other clocks were then."""
    words[Field.MARK], words[Field.MARK_NS] = now, clocks.boot
    if clocks.anchor is not None:
        words[Field.MARK_CLOCK_MS] = clocks.anchor


def unset(wall: int, floor: int) -> bool:
    """Whether nobody has set this clock: it says that the license was not issued yet, by more than a day."""
    return wall < floor - DAY


def progress(words: MutableSequence[int], boot: int, anchor: int | None) -> None:
    """Move the mark on, in the boot that it was set in, by nothing but the time since."""
    passed = max(0, boot - words[Field.MARK_NS]) // 10**9
    words[Field.MARK] += passed
    words[Field.MARK_NS] += passed * 10**9
    if anchor is not None:
        words[Field.MARK_CLOCK_MS] = anchor


def reset(words: MutableSequence[int], clocks: Clocks, time: int) -> bool:
    """Take in the vendor's word for the time, once. False where it, or a later one, was taken in before."""
    if time <= words[Field.RESET]:
        return False
    words[Field.RESET] = time
    remember(words, clocks, time)
    return True


def day(seconds: int) -> datetime.date:
    """The day, in UTC. A clock far beyond all calendars is in their last year."""
    return datetime.datetime.fromtimestamp(min(seconds, _LAST), datetime.UTC).date()


def seconds(day_: datetime.date) -> int:
    """When a day begins, in UTC."""
    return (day_ - datetime.date(1970, 1, 1)).days * DAY


_LAST: Final = 253_402_300_799  # the end of the year 9999


def _text(when: int) -> str:
    return f"{datetime.datetime.fromtimestamp(max(0, min(when, _LAST)), datetime.UTC):%Y-%m-%d %H:%M} UTC"
