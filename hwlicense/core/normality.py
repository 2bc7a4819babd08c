"""The Shapiro-Wilk statistic, by Royston's approximation (Applied Statistics 44, 1995, algorithm AS R94).

In Python itself, some 50 µs for 100 values: SciPy, whose figures the tests compare, costs a device half a second at the
start and 90 MB for this one number.
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_LAST: Final = (0.221157, -0.147981, -2.071190, 4.434685, -2.706056)
_LAST_BUT_ONE: Final = (0.042981, -0.293762, -1.752461, 5.682633, -3.582633)
_EXACT: Final = 3
_SMALL: Final = 5


def shapiro_wilk(values: Sequence[float]) -> float:
    """Near 1 for values as a normal distribution gives them, less for others.

    Of 3 values or more; 0 where all are the same, which nothing natural makes.
    """
    least, span = min(values), max(values) - min(values)
    if not span:
        return 0.0
    scaled = sorted((value - least) / span for value in values)  # so that no square is lost to underflow
    mean = math.fsum(scaled) / len(scaled)
    weighed = math.fsum(map(float.__mul__, _weights(len(scaled)), scaled))
    return weighed * weighed / math.fsum((value - mean) ** 2 for value in scaled)


@functools.lru_cache(maxsize=16)
def _weights(number: int) -> tuple[float, ...]:
    if number == _EXACT:
        return -math.sqrt(0.5), 0.0, math.sqrt(0.5)
    normal = NormalDist()
    scores = [normal.inv_cdf((rank - 0.375) / (number + 0.25)) for rank in range(1, number + 1)]
    squares = math.fsum(score * score for score in scores)
    outer = [scores[-1] / math.sqrt(squares) + _polynomial(_LAST, number)]
    if number > _SMALL:
        outer.insert(0, scores[-2] / math.sqrt(squares) + _polynomial(_LAST_BUT_ONE, number))
    inner = scores[len(outer) : -len(outer)]
    left = math.fsum(score * score for score in inner)
    scale = math.sqrt(left / (1 - 2 * math.fsum(weight * weight for weight in outer)))
    return (*(-weight for weight in reversed(outer)), *(score / scale for score in inner), *outer)


def _polynomial(factors: tuple[float, ...], number: int) -> float:
    return math.fsum(factor * number ** (-power / 2) for power, factor in enumerate(factors, 1))
