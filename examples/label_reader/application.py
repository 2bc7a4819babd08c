"""The product that the customer gets: it reads the lettering on a part with networks that are sold under a license.

The vendor's public keys are a constant of the application (vendor_keys.py, written when the product was built). They
are its only root of trust: nothing on the customer's machine can replace them. What prepares the picture and makes
something of what the networks say (reader.py) is sealed with them, and imported from memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from vendor_keys import VENDOR
from weights import CLS, DET, REC

import hwlicense


def main(package: str, picture: str, target: str) -> None:
    """Read `picture`, print its lines and draw them into `target`."""
    with hwlicense.open(package, vendor=VENDOR) as model, model.importer():
        from reader import LabelReader, draw  # noqa: PLC0415  # there is none on the disk

        reader = LabelReader(*(model.path(name) for name in (DET, CLS, REC)))  # paths in memory, never files
        with Image.open(picture) as part:
            readings = reader.read(part)
            draw(part, readings).save(target)
    for reading in readings:
        print(f"{reading.confidence:6.1%}  {reading.text}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except hwlicense.HwlicenseError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}\nreason: {error.reason}\nhint: {error.hint}")
