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

AT_ONCE, PATIENTLY, FEW = 60, 60, 12  # images of its own for each way; of the last it makes many
QUIET = 5.5  # hours that it lies low before the next
STEP = 0.05  # how far each measurement is moved, up or down


class Outcome(NamedTuple):
    """How many images were asked about and answered, what ended it, and how many seconds to wait then."""

    asked: int
    answered: int
    ended: str
    wait: float


def main(package: str, diary: str) -> None:
    """Try three ways, each a little more careful than the last."""
    at_once, others, few, _ = np.split(deal().competitor.images, np.cumsum([AT_ONCE, PATIENTLY, FEW]))
    chance = np.random.default_rng(2019)
    with Product(package, diary) as product:
        ways: dict[str, Callable[[], Outcome]] = {
            "all at once": lambda: all_at_once(product, at_once),
            "just below the rate": lambda: patiently(product, others, clockwork(10)),
            "few images, stretched": lambda: patiently(product, stretched(few, chance), at_random(10, chance)),
        }
        print(f"{'way':<22} {'asked':>6} {'labels':>6}  ended by")
        quiet = 0.0
        for name, way in ways.items():
            time.sleep(quiet)
            found = way()
            print(f"{name:<22} {found.asked:>6} {found.answered:>6}  {found.ended}", flush=True)
            quiet = max(found.wait, QUIET)


def all_at_once(product: Product, images: Field) -> Outcome:
    """Ask as fast as the computer can, whatever is refused."""
    before, refusals = product.answers, []
    for image in images:
        try:
            product.classify(image)
        except hwlicense.ExceededError as error:
            refusals.append(error)
    ended = refusals[0].reason if refusals else ""
    return Outcome(
        len(images), product.answers - before, ended, max((error.wait or 0.0 for error in refusals), default=0.0)
    )


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
                ended = " ".join((error.reason, *product.noticed))
                return Outcome(asked, product.answers - before, ended, error.wait or 0.0)
            time.sleep(error.wait or 0.0)
    return Outcome(asked, product.answers - before, "", 0.0)


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
    """The few images, and then others that are made from them, each a step away: to see where the answer changes."""
    yield from images
    for _ in range(200):
        image = images[chance.integers(len(images))]
        yield image * np.exp(STEP * chance.choice([-1.0, 1.0], size=image.shape))


if __name__ == "__main__":
    run(main)
