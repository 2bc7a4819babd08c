"""Finds the Wisconsin breast cancer measurements within the installed scikit-learn, and deals them out.

569 digitised images of fine needle aspirates of breast masses; of each, thirty measurements of the cell nuclei that are
on it, and whether the mass turned out to be malignant. `measurements.py` prints where they lie.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Field: TypeAlias = NDArray[np.float64]

SIZE = 30
"""Measurements of an image."""

_VENDORS, _CLINICS = 285, 142
_SEED = 1995


class Share(NamedTuple):
    """Images: a row of thirty measurements each, and whether the mass was malignant."""

    images: Field
    malignant: Field


class Shares(NamedTuple):
    """Who has which images; nobody has another's."""

    vendor: Share
    clinic: Share
    competitor: Share


def locate() -> Path:
    """Return the file, without importing scikit-learn. Raises FileNotFoundError where it is not installed."""
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("scikit-learn is not installed: pip install scikit-learn")
    path = Path(spec.origin).parent / "datasets" / "data" / "breast_cancer.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: this scikit-learn ships other data than 1.9")
    return path


def deal(seed: int = _SEED) -> Shares:
    """Return half of the images for the vendor and a quarter each for the others. Raises FileNotFoundError."""
    rows = np.loadtxt(locate(), delimiter=",", skiprows=1)
    shuffled = rows[np.random.default_rng(seed).permutation(len(rows))]
    parts = np.split(shuffled, [_VENDORS, _VENDORS + _CLINICS])
    return Shares(*(Share(part[:, :SIZE], 1.0 - part[:, SIZE]) for part in parts))  # the file has 0 for malignant


if __name__ == "__main__":
    print(locate())
