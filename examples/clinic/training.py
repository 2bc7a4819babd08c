"""The vendor trains the classifier: `training.py [weights.bin]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from classifier import HIDDEN, SHAPES, SIZE, Classifier, logarithms
from measurements import deal

if TYPE_CHECKING:
    from classifier import Field
    from measurements import Share

STEPS, RATE, DECAY = 400, 0.01, 0.02
SEED = 16


def train(share: Share, seed: int = SEED) -> dict[str, Field]:
    """Fit the network to all images at once, by Adam on the cross entropy with weight decay."""
    noise = np.random.default_rng(seed)
    seen = logarithms(share.images)
    offset, scale = seen.mean(axis=0), seen.std(axis=0)
    seen = (seen - offset) / scale
    weights = {
        "inner": noise.normal(scale=SIZE**-0.5, size=(SIZE, HIDDEN)),
        "bias": np.zeros(HIDDEN),
        "outer": np.append(noise.normal(scale=HIDDEN**-0.5, size=HIDDEN), 0.0),
    }
    first, second = ({name: np.zeros_like(part) for name, part in weights.items()} for _ in range(2))
    for step in range(1, STEPS + 1):
        hidden = np.tanh(seen @ weights["inner"] + weights["bias"])
        error = 1.0 / (1.0 + np.exp(-(hidden @ weights["outer"][:-1] + weights["outer"][-1]))) - share.malignant
        back = error[:, None] * weights["outer"][:-1] * (1.0 - hidden**2)
        slopes = {
            "inner": seen.T @ back / len(seen) + DECAY * weights["inner"],
            "bias": back.mean(axis=0),
            "outer": np.append(error @ hidden, error.sum()) / len(seen) + DECAY * weights["outer"],
        }
        for name, slope in slopes.items():
            first[name] = 0.9 * first[name] + 0.1 * slope
            second[name] = 0.999 * second[name] + 0.001 * slope**2
            stride = first[name] / (1.0 - 0.9**step) / (np.sqrt(second[name] / (1.0 - 0.999**step)) + 1e-8)
            weights[name] -= RATE * stride
    return {"offset": offset, "scale": scale, **weights}


def main(target: str) -> None:
    """Train, write the weights and say how good they are on images that the vendor never had."""
    shares = deal()
    weights = train(shares.vendor)
    raw = b"".join(weights[name].reshape(shape).astype("<f4").tobytes() for name, shape in SHAPES.items())
    Path(target).write_bytes(raw)
    classifier = Classifier(raw)
    found = np.array([classifier.classify(image).malignant for image in shares.clinic.images])
    right = found == shares.clinic.malignant
    print(f"trained on {len(shares.vendor.images)} images; right on {right.mean():.1%} of {len(right)} that are new")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "weights.bin")
