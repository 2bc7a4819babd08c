"""The real networks of PP-OCR, in forms that frameworks take, in one package."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy
import onnx
import onnxruntime
import openvino
import pytest
import safetensors.numpy
from rapidocr_onnxruntime import __file__ as rapidocr

from tests.packages import opened, pack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hwlicense.core.secret import Secret
    from hwlicense.device.model import Model
    from tests.world import Vendor

NETWORKS = {
    "det.onnx": ("ch_PP-OCRv4_det_infer.onnx", (1, 3, 64, 96)),
    "cls.onnx": ("ch_ppocr_mobile_v2.0_cls_infer.onnx", (3, 3, 48, 192)),
    "rec.onnx": ("ch_PP-OCRv4_rec_infer.onnx", (2, 3, 48, 160)),
}
CHUNK = 64 << 10


class Made(NamedTuple):
    package: Path
    key: Secret
    files: Path
    """The same in plaintext."""


def picture(name: str = "cls.onnx") -> numpy.ndarray:
    return numpy.random.default_rng(7).random(NETWORKS[name][1], dtype="f4")


def with_initializers(network: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with its weights where exporters put them today; these are constants among the nodes."""
    constants = [node for node in network.graph.node if node.op_type == "Constant"]
    for node in constants:
        array = onnx.numpy_helper.to_array(node.attribute[0].t)
        network.graph.initializer.append(onnx.numpy_helper.from_array(array, node.output[0]))
        network.graph.node.remove(node)
    return network


@pytest.fixture(scope="session")
def made(vendor: Vendor, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("frameworks")
    files = folder / "files"
    (files / "apart").mkdir(parents=True)
    for name, (source, _) in NETWORKS.items():
        (files / name).write_bytes((Path(rapidocr).parent / "models" / source).read_bytes())
    network = with_initializers(onnx.load(files / "cls.onnx"))
    weights = {one.name: onnx.numpy_helper.to_array(one) for one in network.graph.initializer}
    safetensors.numpy.save_file(weights, files / "cls.safetensors", {"from": "PP-OCR"})
    onnx.save(network, files / "apart/cls.onnx", save_as_external_data=True, location="cls.weights", size_threshold=100)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(files / "cls.ort")
    onnxruntime.InferenceSession(files / "cls.onnx", options, ["CPUExecutionProvider"])
    openvino.save_model(openvino.Core().read_model(files / "rec.onnx"), files / "rec.xml", compress_to_fp16=False)
    package, key, _ = pack(vendor, folder, {}, chunk_size=CHUNK)
    return Made(package, key, files)


@pytest.fixture
def model(vendor: Vendor, made: Made) -> Iterator[Model]:
    with opened(vendor, made.package, made.key) as model:
        yield model


class _Stack(ctypes.Structure):
    """stack_t, of sigaltstack(2)."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@pytest.fixture(autouse=True)
def _signals_on_the_ordinary_stack() -> Iterator[None]:
    """OpenVINO gives a thread that runs a network a stack for signals, which may be gone when the next one comes."""
    yield
    disabled = _Stack(flags=2)
    assert ctypes.CDLL(None).sigaltstack(ctypes.byref(disabled), None) == 0
