"""A workstation of the clinic: patients come as patients do, and each is told what the images say.

`workstation.py PACKAGE DIARY FIRST IMAGES RATE`: so many images from the FIRST on, of RATE patients an hour. In the
story, an hour takes a second.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
from measurements import deal
from product import Product, run

import hwlicense

if TYPE_CHECKING:
    from collections.abc import Iterator

    from measurements import Share

PROCEDURE = 4  # images of a patient who lies on the table; of others there is one
EVERY, SOME = 10, 5  # image 5 begins such a procedure, and so does 15
SEED = 272


def main(package: str, diary: str, first: str, images: str, rate: str) -> None:
    """See them all. Where the license says "later", the patient waits; raises where it says "never"."""
    share = deal().clinic
    chance = np.random.default_rng((SEED, int(first)))
    right = waits = 0
    with Product(package, diary) as product:
        try:
            for patient in patients(int(first), int(first) + int(images)):
                time.sleep(chance.exponential(1.0 / float(rate)))
                while True:
                    try:
                        right += see(product, share, patient)
                        break
                    except hwlicense.ExceededError as error:
                        if error.wait is None:
                            raise
                        waits += 1
                        time.sleep(error.wait)
        finally:
            print(f"{product.answers} answers, {right} of them right; waits: {waits}")


def patients(first: int, end: int) -> Iterator[range]:
    """Which images are whose."""
    while first < end:
        count = PROCEDURE if first % EVERY == SOME else 1
        yield range(first, min(first + count, end))
        first += count


def see(product: Product, share: Share, images: range) -> int:
    """How many findings about a patient are right. Raises ExceededError: before the first image, or not at all."""
    with product.procedure(len(images), seconds=1) if len(images) > 1 else nullcontext():
        return sum(product.classify(share.images[at]).malignant == share.malignant[at] for at in images)


if __name__ == "__main__":
    run(main)
