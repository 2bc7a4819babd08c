"""The product on a line: part after part, each in a session of its own, under a license that asks for presence.

A session is refused at its start or not at all: a dongle that is pulled while a part is being read spoils no reading.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from PIL import Image
from vendor_keys import VENDOR
from weights import CLS, DET, REC

import hwlicense


def main(package: str, picture: str, stop: str) -> None:
    """Read `picture` again and again until the file `stop` appears; say what changes."""
    said = None
    with hwlicense.open(package, vendor=VENDOR) as model, model.importer(), Image.open(picture) as part:
        from reader import LabelReader  # noqa: PLC0415  # sealed: there is none on the disk

        reader = LabelReader(*(model.path(name) for name in (DET, CLS, REC)))
        while not Path(stop).exists():
            try:
                with model.session():
                    state = f"the line runs: {reader.read(part)[2].text}"
            except hwlicense.HwlicenseError as error:
                state = f"the line stands still: {error.reason}"
            if state != said:
                print(state, flush=True)
                said = state
            time.sleep(0.1)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except hwlicense.HwlicenseError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}\nreason: {error.reason}\nhint: {error.hint}")
