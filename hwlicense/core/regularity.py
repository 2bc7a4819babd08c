"""How regular the intervals between calls are: a figure that tells machines from people."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

TICK: Final = 8
"""Milliseconds that intervals must have for their spread to mean more than the clock's own steps."""

_BLOCKS: Final = 16
_DEVIATIONS: Final = 1.349  # the range of the middle half of a normal distribution, in standard deviations


def spread(intervals: Sequence[int]) -> float:
    """How much intervals vary: about 0 for a machine's, 1 for calls that come at random, above 1 for bursts.

    The least that is found for sums of 1, 2, 4, ... intervals, each times the root of how many: sums show the
    regularity of several machines at once, whose single intervals look random, and of calls faster than the clock
    shows. Of each the range of the middle half, over the middle: a late call now and then hides nothing.
    """
    ends = [0]
    for interval in intervals:
        ends.append(ends[-1] + interval)
    least, span = math.inf, 1
    while span == 1 or len(intervals) >= _BLOCKS * span:
        sums = sorted(end - start for start, end in zip(ends, ends[span:], strict=False))
        middle = sums[len(sums) // 2]
        if middle >= TICK:
            wide = sums[len(sums) * 3 // 4] - sums[len(sums) // 4]
            least = min(least, wide / _DEVIATIONS / middle * math.sqrt(span))
        span *= 2
    if least == math.inf:  # too fast for the clock's steps throughout: a machine, or a short burst
        return 0.0 if len(intervals) >= 2 * _BLOCKS else 1.0
    return least
