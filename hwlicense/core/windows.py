"""Sliding windows that never hold more than their limit: allowances are booked in slots, and die with their slot.

A window is kept in a run of numbers, `WORDS` of them: the newest slot, and a ring with a count for each slot. Times are
nanoseconds of one clock that never goes back, over restarts too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, MutableSequence

    from hwlicense.core.limits import Rate

SLOTS: Final = 64
"""Slots of a window: a refused caller waits at the most so much longer than an exact list of times would say."""

_RING: Final = SLOTS + 2  # the slots that a window can touch, and one more for a caller that is held up after its check
WORDS: Final = 1 + _RING


class Window(msgspec.Struct, frozen=True):
    """At most `limit` in any `SLOTS` slots of `width` nanoseconds; its numbers begin `at`."""

    limit: int
    width: int
    at: int

    def slot(self, now: int) -> int:
        """The slot of a time."""
        return now // self.width

    def end(self, now: int) -> int:
        """When the slot of `now` is over."""
        return (now // self.width + 1) * self.width

    def forgotten(self, when: int) -> int:
        """From when on what is booked at a time does not count any more."""
        return (when // self.width + _RING) * self.width

    def advance(self, words: MutableSequence[int], now: int) -> None:
        """Forget what is older than the window."""
        slot, newest = self.slot(now), words[self.at]
        for old in range(max(newest + 1, slot - _RING + 1), slot + 1):
            words[self.at + 1 + old % _RING] = 0
        words[self.at] = max(slot, newest)

    def room(self, words: MutableSequence[int]) -> int:
        """How many more fit; below zero after a loss was charged."""
        return self.limit - sum(words[self.at + 1 : self.at + WORDS])

    def book(self, words: MutableSequence[int], slot: int, count: int) -> None:
        """`count` more in a slot, fewer where it is negative; nothing where the slot is forgotten already."""
        if words[self.at] - _RING < slot <= words[self.at]:
            at = self.at + 1 + slot % _RING
            words[at] = max(0, words[at] + count)

    def wait(self, words: MutableSequence[int], now: int, count: int) -> int | None:
        """Nanoseconds until `count` would fit, if nothing more is booked; None where they never do."""
        if count > self.limit:
            return None
        missing = count - self.room(words)
        newest = words[self.at]
        for slot in range(newest - _RING + 1, newest + 1):
            if missing <= 0:
                break
            missing -= words[self.at + 1 + slot % _RING]
            if missing <= 0:
                return max(0, (slot + _RING) * self.width - now)
        return 0


def windows(rates: Iterable[Rate], at: int) -> list[Window]:
    """Windows for `rates`, one behind the other from `at` on. A slot is rounded up, so a window is never too short."""
    return [Window(rate.count, -(-rate.seconds * 10**9 // SLOTS), at + i * WORDS) for i, rate in enumerate(rates)]
