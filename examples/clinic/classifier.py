"""The classifier: from thirty measurements of an image to the probability that the mass is malignant.

It knows nothing about licenses: it takes a buffer of weights, and one that a licensed model lends is as good as any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Field: TypeAlias = NDArray[np.float64]

SIZE, HIDDEN = 30, 16
SHAPES = {"offset": (SIZE,), "scale": (SIZE,), "inner": (SIZE, HIDDEN), "bias": (HIDDEN,), "outer": (HIDDEN + 1,)}
"""What the weights are, in this order, as little-endian float32."""

LEAST = 1e-3  # some measurements are 0, and what is learned from is their logarithm


class Finding(NamedTuple):
    """What the classifier says of an image. `features` are what it saw: each about 0, and 1 wide, over many images."""

    malignant: bool
    probability: float
    features: Field


def logarithms(images: Field) -> Field:
    """What is learned from: sizes, and most other measurements, spread over decades."""
    return np.log(images + LEAST)


class Classifier:
    """A network of one hidden layer."""

    def __init__(self, weights: memoryview | bytes) -> None:
        """Views into `weights`, without a copy. Raises ValueError where there are not as many as expected."""
        values, at = np.frombuffer(weights, dtype="<f4"), 0
        parts = {}
        for name, shape in SHAPES.items():
            parts[name] = values[at : at + int(np.prod(shape))].reshape(shape)
            at += parts[name].size
        if at != values.size:
            raise ValueError(f"{values.size} weights where {at} were expected")
        self._weights = parts

    def classify(self, image: Field) -> Finding:
        """Classify the thirty measurements of one image."""
        part = self._weights
        features = (logarithms(image) - part["offset"]) / part["scale"]
        hidden = np.tanh(features @ part["inner"] + part["bias"])
        probability = 1.0 / (1.0 + np.exp(-(hidden @ part["outer"][:-1] + part["outer"][-1])))
        return Finding(bool(probability > 0.5), float(probability), features)  # noqa: PLR2004  # a half: undecided
