"""Durations and rates as people write them in terms, and as they are shown to people."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hwlicense.core.limits import Rate

UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
"""Seconds of the units of a duration in terms."""

FRAMES: Final = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 7 * 86400}
"""Seconds of the time frames that have names."""

_SHOWN: Final = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
_FINE: Final = 10  # seconds below which tenths matter


def spelled(seconds: float, parts: int = len(_SHOWN)) -> str:
    """As "2 min 5 s", in at most so many units; rounded up, so that who waits so long has waited enough."""
    if seconds < _FINE:
        return f"{math.ceil(round(seconds * 10, 6)) / 10:g} s"
    whole = math.ceil(round(seconds, 6))
    first = next(at for at, (_, size) in enumerate(_SHOWN) if whole >= size)
    last = _SHOWN[first:][:parts][-1][1]
    whole = -(-whole // last) * last
    text = []
    for name, size in _SHOWN:
        count, whole = divmod(whole, size)
        if count:
            text.append(f"{count:,} {name}")
    return " ".join(text)


def waiting(seconds: float) -> str:
    """How long to wait, in the two largest units."""
    return spelled(seconds, 2)


def of_rate(rate: Rate) -> str:
    """As in terms: "100/hour", "5/90s"."""
    names = [name for name, size in FRAMES.items() if size == rate.seconds]
    names += [f"{rate.seconds // size}{unit}" for unit, size in reversed(UNITS.items()) if not rate.seconds % size]
    return f"{rate.count}/{names[0]}"
