"""Prints where the PP-OCR networks lie within the installed rapidocr_onnxruntime: what this example's vendor packs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

DET = "ch_PP-OCRv4_det_infer.onnx"
CLS = "ch_ppocr_mobile_v2.0_cls_infer.onnx"
REC = "ch_PP-OCRv4_rec_infer.onnx"


class Weights(NamedTuple):
    """The three networks: detection, classification of direction, recognition."""

    det: Path
    cls: Path
    rec: Path


def locate() -> Weights:
    """Return the three paths, without importing the package. Raises FileNotFoundError where they are not installed."""
    spec = find_spec("rapidocr_onnxruntime")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("rapidocr_onnxruntime is not installed: pip install rapidocr-onnxruntime==1.4.4")
    folder = Path(spec.origin).parent / "models"
    found = Weights(folder / DET, folder / CLS, folder / REC)
    for path in found:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: this rapidocr-onnxruntime ships other weights than 1.4.4")
    return found


if __name__ == "__main__":
    print(*locate(), sep="\n")
