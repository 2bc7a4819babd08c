"""What nobody is to read: story.sh makes a native module of it with Cython, and only that travels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WEIGHT = 0.75


def score(pixels: Sequence[int], weights: Sequence[int]) -> float:
    """How far the pixels of a part are from those of a good one, from 0 to 1."""
    total = 0.0
    for place, pixel in enumerate(pixels):
        total += abs(pixel - weights[place % len(weights)]) * WEIGHT
    return total / (255 * WEIGHT * len(pixels))
