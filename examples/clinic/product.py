"""The product: the classifier under its license. Both customers have it, and what they do with it is their own.

The vendor's public keys are a constant of the product (vendor_keys.py, written when it was built).
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from classifier import Classifier
from vendor_keys import VENDOR

import hwlicense

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from classifier import Field, Finding


class Product:
    """Classifies images, one inference each. Every answer and every refusal goes into a diary, a line of JSON each."""

    def __init__(self, package: str, diary: str) -> None:
        """Opens the package: raises what `hwlicense.open` does, such as RefusedError INSTANCES_EXCEEDED."""
        self._model = hwlicense.open(package, vendor=VENDOR)
        self._classifier = Classifier(self._model.read("weights.bin"))
        self._diary = Path(diary).open("a", encoding="utf-8")  # noqa: SIM115  # until __exit__
        self.answers = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        del self._classifier  # it borrowed the weights, which are wiped when the last borrower returns them
        self._model.close()
        self._diary.close()

    def classify(self, image: Field) -> Finding:
        """An answer, or ExceededError with the reason and how long to wait.

        The monitor compares what the classifier saw within each class, so it is told before the answer is given.
        """
        finding = self._classifier.classify(image)
        try:
            self._model.spend(features=finding.features.tolist(), label=int(finding.malignant))
        except hwlicense.ExceededError as error:
            self._write(error.reason)
            raise
        self.answers += 1
        self._write("answer")
        return finding

    @property
    def noticed(self) -> tuple[str, ...]:
        """Which detectors of the license's monitor say that this is no normal use."""
        return self._model.monitored.detectors

    @contextmanager
    def procedure(self, images: int, seconds: int) -> Iterator[None]:
        """Several images of a patient who lies there and waits: all are reserved, or it does not begin.

        Raises RefusedError, ExceededError.
        """
        standing = self._model.standing(horizon=seconds, inferences=images)  # touches no hardware, promises nothing
        if standing.refusal:
            self._write(standing.refusal.reason)
            raise standing.refusal
        with self._model.session(inferences=images):
            yield

    def _write(self, what: str) -> None:
        self._diary.write(json.dumps({"at": time.time(), "what": what}) + "\n")
        self._diary.flush()


def run(main: Callable[..., None]) -> None:
    """Run a program of the product: an error ends it with its reason and hint, as hwlicense's own commands."""
    try:
        main(*sys.argv[1:])
    except hwlicense.HwlicenseError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}\nreason: {error.reason}\nhint: {error.hint}")
