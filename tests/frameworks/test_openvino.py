"""OpenVINO over a package, beside OpenVINO over files."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import numpy
import openvino
import openvino.opset13
import openvino.properties
import pytest

from hwlicense import integrations
from hwlicense.core.errors import ClosedError, Reason, UsageError
from hwlicense.device.memory import protection
from hwlicense.integrations import metered
from hwlicense.integrations.openvino import TRACING, compile_model, read_model
from tests.frameworks.conftest import picture
from tests.packages import opened, pack


@pytest.fixture(scope="module")
def expected(made) -> bytes:
    return output(openvino.Core().compile_model(made.files / "rec.xml", "CPU"))


def output(network: openvino.CompiledModel) -> bytes:
    found = network(picture("rec.onnx"))[0]
    assert found.std() > 0
    return bytes(found.tobytes())


def test_the_output_is_that_of_the_plain_file(model, expected):
    assert output(compile_model(model, "rec.xml")) == expected
    assert output(openvino.Core().compile_model(read_model(model, "rec.xml"), "CPU")) == expected
    assert output(compile_model(model, "rec.xml", weights="rec.bin")) == expected


def test_other_formats_that_openvino_reads(model, made):
    plain = openvino.Core().compile_model(made.files / "rec.onnx", "CPU")
    assert output(compile_model(model, "rec.onnx")) == output(plain)


def test_weights_are_decrypted_where_openvino_uses_them(model):
    before = protection().held
    network = read_model(model, "rec.xml")
    assert protection().held == before  # no buffer of ours besides
    largest = max(
        (one for one in network.get_ops() if one.get_type_name() == "Constant"), key=lambda one: one.data.nbytes
    )
    assert largest.data.tobytes() in bytes(model.read("rec.bin"))


def test_a_network_in_one_file_is_read_without_a_copy_in_the_ordinary_heap(model, expected):
    held, files = protection().held, len(list(Path("/proc/self/fd").iterdir()))
    tracemalloc.start()
    network = read_model(model, "rec.onnx")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < model.size("rec.onnx") // 4
    assert (protection().held, len(list(Path("/proc/self/fd").iterdir()))) == (held, files)
    model.close()
    assert "memfd:hwlicense" not in Path("/proc/self/maps").read_text()
    assert len(output(openvino.Core().compile_model(network, "CPU"))) == len(expected)


def test_a_network_without_weights(vendor, tmp_path):
    given = openvino.opset13.parameter([2], numpy.float32)
    openvino.save_model(openvino.Model([openvino.opset13.relu(given)], [given]), tmp_path / "relu.xml")
    package, key, _ = pack(vendor, tmp_path, {"relu.xml": (tmp_path / "relu.xml").read_bytes()})
    with opened(vendor, package, key) as model:
        run = compile_model(model, "relu.xml")
    assert run(numpy.array([-1, 1], "f4"))[0].tolist() == [0, 1]


def test_a_network_outlives_the_model_and_each_object_that_led_to_it(model, expected):
    network = read_model(model, "rec.xml")
    compiled = openvino.Core().compile_model(network, "CPU")
    request = compiled.create_infer_request()
    model.close()
    del network, compiled
    gc.collect()
    filling = [numpy.ones(1 << 20, "u1") for _ in range(32)]  # takes freed memory
    assert request.infer(picture("rec.onnx"))[0].tobytes() == expected
    del filling
    with pytest.raises(ClosedError):
        compile_model(model, "rec.xml")


@pytest.mark.parametrize(
    "config",
    [
        {"CACHE_DIR": "cache"},
        {openvino.properties.cache_dir: Path("cache")},
        {"DEVICE_PROPERTIES": {"CPU": {"CACHE_DIR": "cache"}}},
        {"DEVICE_PROPERTIES": "{CPU:{CACHE_DIR:cache}}"},
        {"DEVICE_PROPERTIES": "{CPU:{CACHE_DIR:cache}}", "CACHE_DIR": ""},
        dict([openvino.properties.cache_dir("cache")]),
        dict([openvino.properties.device.properties({"CPU": {"CACHE_DIR": "cache"}})]),
    ],
)
@pytest.mark.parametrize("device", ["CPU", "AUTO"])
def test_a_cache_is_refused(model, config, device, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refused:
        compile_model(model, "rec.xml", device, config)
    assert refused.value.reason == Reason.PLAINTEXT_CACHE
    assert not list(tmp_path.iterdir())


def test_a_cache_of_the_core_is_refused(model, expected, tmp_path):
    core = openvino.Core()
    core.set_property({"CACHE_DIR": str(tmp_path)})
    for make in (read_model, compile_model):
        with pytest.raises(UsageError) as refused:
            make(model, "rec.xml", core=core)
        assert refused.value.reason == Reason.PLAINTEXT_CACHE
    core.set_property({"CACHE_DIR": ""})
    assert output(compile_model(model, "rec.xml", core=core, config={"NUM_STREAMS": "1", "CACHE_DIR": ""})) == expected
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["CPU", "AUTO", "AUTO:CPU", "MULTI:CPU", "HETERO:CPU", "BATCH:CPU"])
@pytest.mark.parametrize("of", ["CPU", "HETERO"])
def test_a_cache_of_one_device_is_refused_for_those_that_stand_for_it(model, device, of, tmp_path):
    core = openvino.Core()
    core.set_property(of, {"CACHE_DIR": str(tmp_path)})
    for make in (read_model, partial(compile_model, device_name=device)):
        with pytest.raises(UsageError) as refused:
            make(model, "rec.xml", core=core)
        assert refused.value.reason == Reason.PLAINTEXT_CACHE
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["CPU", "AUTO:CPU", "MULTI:CPU", "HETERO:CPU", "BATCH:CPU"])
@pytest.mark.parametrize("of", ["CPU", "HETERO"])
def test_a_cache_that_the_core_does_not_tell_of_is_not_used(model, device, of, tmp_path, monkeypatch):
    monkeypatch.setattr(integrations.openvino, "_set", lambda _core: False)
    core = openvino.Core()
    core.set_property(of, {"CACHE_DIR": str(tmp_path)})
    compile_model(model, "rec.xml", device, core=core)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TRACING)
def test_an_environment_that_has_the_network_written_is_refused(model, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, "false")
    compile_model(model, "rec.xml")
    monkeypatch.setenv(name, "true")
    for make in (read_model, compile_model):
        with pytest.raises(UsageError) as refused:
            make(model, "rec.xml")
        assert refused.value.reason == Reason.PLAINTEXT_CACHE
        assert name in refused.value.what
    assert not list(tmp_path.iterdir())


WRITES = """
import numpy, openvino
from openvino import opset13
given = opset13.parameter([4096], numpy.float32)
network = openvino.Model([opset13.add(given, numpy.arange(4096, dtype="f4"))], [given])
openvino.Core().compile_model(network, "CPU")
"""


def test_what_an_environment_has_written_holds_the_weights(tmp_path):
    """Why it is refused. Where this fails, OpenVINO has become better."""
    environment = os.environ | {"OV_ENABLE_SERIALIZE_TRACING": "true"}
    subprocess.run([sys.executable, "-c", WRITES], cwd=tmp_path, env=environment, check=True, timeout=100)
    weights = numpy.arange(4096, dtype="f4").tobytes()
    assert any(weights in path.read_bytes() for path in tmp_path.glob("*.bin"))


def test_openvinos_own_encryption_leaves_weights_in_plaintext(made, tmp_path):
    """Why a cache is refused, encrypted or not. Where this fails, OpenVINO has become better: encrypt and allow it."""
    callbacks = [lambda content: bytes(byte ^ 90 for byte in content)] * 2
    config = {"CACHE_DIR": str(tmp_path), "CACHE_ENCRYPTION_CALLBACKS": callbacks, "CACHE_MODE": "OPTIMIZE_SPEED"}
    openvino.Core().compile_model(made.files / "rec.xml", "CPU", config)
    cached = b"".join(path.read_bytes() for path in tmp_path.rglob("*.*"))
    weights = (made.files / "rec.bin").read_bytes()
    assert any(weights[start : start + 64] in cached for start in range(0, len(weights), 1 << 20))


def test_a_compiled_network_is_metered(model, expected):
    spent: list[int] = []
    model.spend = spent.append
    run = metered(compile_model(model, "rec.xml"), model)
    assert run([picture("rec.onnx")])[0].tobytes() == expected
    assert run({0: picture("rec.onnx")})[0].tobytes() == expected
    assert spent == [2, 2]
