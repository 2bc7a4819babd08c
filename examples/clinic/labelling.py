"""A competitor's program: it has bought the product, and wants the answers as labels to train a copy on.

`labelling.py PACKAGE DIARY`. It respects the process: who patches that, as root, is not held by the runtime's limits
(docs/threat-model.md).
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from measurements import deal
from product import Product, run

import hwlicense

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from classifier import Field

    from hwlicense import Reason

FEW = 12  # images of which it makes many
STRETCH = 0.02  # how much each measurement changes when an image is scanned once more


class Outcome(NamedTuple):
    """How many images were asked about and answered, what ended it, and for how many seconds."""

    asked: int
    answered: int
    reason: Reason | None
    wait: float


def main(package: str, diary: str) -> None:
    """Try three ways, each a little more careful than the last."""
    images = deal().competitor.images
    chance = np.random.default_rng(2019)
    with Product(package, diary) as product:
        ways: dict[str, Callable[[], Outcome]] = {
            "all at once": lambda: all_at_once(product, images),
            "just below the rate": lambda: patiently(product, images, clockwork(10)),
            "few images, stretched": lambda: patiently(product, stretched(images, chance), at_random(10, chance)),
        }
        print(f"{'way':<22} {'asked':>6} {'labels':>6}  ended by")
        for name, way in ways.items():
            found = way()
            print(f"{name:<22} {found.asked:>6} {found.answered:>6}  {found.reason}", flush=True)
            time.sleep(found.wait)


def all_at_once(product: Product, images: Field) -> Outcome:
    """Ask as fast as the computer can, whatever is refused."""
    before, last = product.answers, None
    for image in images:
        try:
            product.classify(image)
        except hwlicense.ExceededError as error:
            last = error
    reason, wait = (last.reason, last.wait or 0.0) if last else (None, 0.0)
    return Outcome(len(images), product.answers - before, reason, wait)


def patiently(product: Product, images: Iterable[Field], pauses: Iterator[float]) -> Outcome:
    """Ask at a pace of one's own, and heed the rates; stop where the license says that this is no use of a clinic."""
    before, asked = product.answers, 0
    for image in images:
        time.sleep(next(pauses))
        asked += 1
        try:
            product.classify(image)
        except hwlicense.ExceededError as error:
            if error.reason not in {hwlicense.Reason.RATE_EXCEEDED, hwlicense.Reason.LEASE_PENDING}:
                return Outcome(asked, product.answers - before, error.reason, error.wait or 0.0)
            time.sleep(error.wait or 0.0)
    return Outcome(asked, product.answers - before, None, 0.0)


def clockwork(rate: float) -> Iterator[float]:
    """So many an hour, evenly."""
    start = time.monotonic()
    for number in itertools.count(1):
        yield max(0.0, start + number / rate - time.monotonic())


def at_random(rate: float, chance: np.random.Generator) -> Iterator[float]:
    """As patients come."""
    while True:
        yield chance.exponential(1.0 / rate)


def stretched(images: Field, chance: np.random.Generator) -> Iterator[Field]:
    """A few images, and then the same ones again and again, never quite alike."""
    few = images[:FEW]
    yield from few
    for _ in range(200):
        image = few[chance.integers(FEW)]
        yield image * np.exp(STRETCH * chance.normal(size=image.shape))


if __name__ == "__main__":
    run(main)
