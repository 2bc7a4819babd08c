"""The application: reads the lettering on a part with the PP-OCR networks, through RapidOCR and ONNX Runtime.

It knows nothing about licenses: it takes three paths, and a path that a licensed model gives is as good as a file's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rapidocr_onnxruntime import RapidOCR

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

GREEN, AMBER, INK = (64, 224, 120), (255, 178, 40), (12, 20, 14)
SURE = 0.9  # a reading below this confidence is marked for a person to look at


class Reading(NamedTuple):
    """One line of lettering: its text, the confidence (0 to 1) and its four corners in pixels, clockwise."""

    text: str
    confidence: float
    box: tuple[tuple[float, float], ...]


class LabelReader:
    """Finds text (detection), turns it upright (classification) and reads it (recognition)."""

    def __init__(
        self, det_path: str | PathLike[str], cls_path: str | PathLike[str], rec_path: str | PathLike[str]
    ) -> None:
        """Load the three ONNX files; the recognition network carries its own list of characters.

        The paths are not needed afterwards. Raises FileNotFoundError where one is missing.
        """
        self._engine = RapidOCR(
            det_model_path=str(det_path), cls_model_path=str(cls_path), rec_model_path=str(rec_path)
        )

    def read(self, picture: Image.Image) -> list[Reading]:
        """Return the lines on the picture from top to bottom; none is no error."""
        pixels = np.ascontiguousarray(np.asarray(picture.convert("RGB"))[:, :, ::-1])  # RapidOCR takes BGR
        found, _seconds = self._engine(pixels)
        return [
            Reading(text, float(confidence), tuple((float(across), float(down)) for across, down in box))
            for box, text, confidence in found or ()
        ]


def draw(picture: Image.Image, readings: Iterable[Reading]) -> Image.Image:
    """Return a colour copy of the picture with a box around every reading and its text and confidence above."""
    marked = picture.convert("RGB")
    pen = ImageDraw.Draw(marked)
    font = ImageFont.load_default(size=21)
    for reading in readings:
        colour = GREEN if reading.confidence >= SURE else AMBER
        pen.polygon(reading.box, outline=colour, width=3)
        corner = (min(across for across, _ in reading.box), min(down for _, down in reading.box) - 7)
        tag = f"{reading.text}   {reading.confidence:.1%}"
        left, top, right, bottom = pen.textbbox(corner, tag, font=font, anchor="ls")
        pen.rectangle((left - 6, top - 5, right + 6, bottom + 5), fill=colour)
        pen.text(corner, tag, font=font, fill=INK, anchor="ls")
    return marked


def main(arguments: list[str]) -> None:
    """Read PICTURE, write OUT and print one line per reading: `reader.py PICTURE OUT DET CLS REC`."""
    try:
        source, target, det, cls, rec = (Path(argument) for argument in arguments)
    except ValueError:
        raise SystemExit("usage: reader.py PICTURE OUT DET.onnx CLS.onnx REC.onnx") from None
    with Image.open(source) as picture:
        readings = LabelReader(det, cls, rec).read(picture)
        draw(picture, readings).save(target)
    for reading in readings:
        print(f"{reading.confidence:.3f}  {reading.text}")


if __name__ == "__main__":
    main(sys.argv[1:])
