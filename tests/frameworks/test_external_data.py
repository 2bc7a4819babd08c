"""Networks whose weights lie in files of their own: found wherever they are, and never looked for on a disk."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import numpy
import onnx
import openvino
import pytest
from onnx import TensorProto, helper
from openvino import opset13

from hwlicense.core.errors import Reason, UsageError
from hwlicense.integrations.external_data import WITHIN, locations
from hwlicense.integrations.onnxruntime import session
from hwlicense.integrations.openvino import compile_model, read_model
from tests.packages import opened, pack

HERE = numpy.arange(4, dtype="f4")
GIVEN = {"location": numpy.ones(4, "f4")}


def apart(location: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def network(*weights: TensorProto) -> onnx.ModelProto:
    """It adds to its input, which has the very name of what is looked for."""
    ends = [helper.make_tensor_value_info(name, 1, [4]) for name in ("location", "y")]
    node = helper.make_node("Add", ["location", "w"] if weights else ["location", "location"], ["y"])
    graph = helper.make_graph([node], "net", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def value_first(raw: bytes, location: str) -> bytes:
    """The same, as a serializer may write it as well."""
    key, value = b"\x0a\x08location", b"\x12" + bytes([len(location)]) + location.encode()
    assert raw.count(key + value) == 1
    return raw.replace(key + value, value + key)


def test_a_tensor_of_that_name_is_none(vendor, tmp_path):
    raw = network().SerializeToString()
    assert locations(memoryview(raw)) == []
    package, key, _ = pack(vendor, tmp_path, {"net.onnx": raw})
    with opened(vendor, package, key) as model:
        assert session(model, "net.onnx").run(None, GIVEN)[0].tolist() == [2, 2, 2, 2]
        assert compile_model(model, "net.onnx")(GIVEN)[0].tolist() == [2, 2, 2, 2]


def test_they_are_found_wherever_a_tensor_may_be():
    inner = network(apart("a/initializer"))
    node = helper.make_node("Any", [], ["y"], t=apart("t"), ts=[apart("ts")], g=inner.graph, gs=[inner.graph])
    node.attribute[0].sparse_tensor.values.CopyFrom(apart("values"))
    node.attribute[0].sparse_tensors.add().indices.CopyFrom(apart("indices"))
    made = network(apart("w"))
    made.graph.sparse_initializer.add().values.CopyFrom(apart("sparse"))
    made.functions.add().node.append(node)
    made.functions[0].attribute_proto.append(onnx.AttributeProto(name="d", t=apart("default")))
    made.training_info.add().algorithm.initializer.append(apart("training"))
    expected = {"w", "a/initializer", "t", "ts", "values", "indices", "sparse", "default", "training"}
    assert set(locations(memoryview(made.SerializeToString()))) == expected


def test_no_field_of_the_format_that_holds_tensors_is_left_out():
    """Where this fails, onnx.proto has grown a place for them."""
    messages = onnx.onnx_ml_pb2.DESCRIPTOR.message_types_by_name.values()
    holders = {"TensorProto"}
    for _ in messages:
        holders |= {one.name for one in messages if any(held(field) in holders for field in one.fields)}
    expected = {(one.name, field.number) for one in messages for field in one.fields if held(field) in holders}
    names = {name.removesuffix("Proto").lower(): name for name in holders}
    names |= {"training": "TrainingInfoProto", "sparse": "SparseTensorProto"}
    assert {(names[kind], number) for kind in WITHIN if kind != "tensor" for number in WITHIN[kind]} == expected


def held(field) -> str:
    return str(field.message_type.name) if field.message_type else ""


@pytest.mark.parametrize("cut", range(0, 110, 7))
def test_what_is_cut_or_is_no_network(cut):
    raw = network(apart("w.bin")).SerializeToString()
    assert set(locations(memoryview(raw[:cut]))) <= {"w.bin"}
    assert locations(memoryview(raw[:cut] + b"\x80" * 20 + b"location")) in ([], ["w.bin"])
    assert locations(memoryview(b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7flocation")) == []


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """The working folder has a file of the same name, which is not the vendor's."""
    folder = tmp_path / "disk"
    folder.mkdir()
    (folder / "w.bin").write_bytes(numpy.full(4, 7, "f4").tobytes())
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.usefixtures("beside")
def test_onnx_runtime_takes_the_member_however_it_is_named(vendor, tmp_path):
    raw = network(apart("w.bin")).SerializeToString()
    members = {"a.onnx": raw, "b.onnx": value_first(raw, "w.bin"), "w.bin": HERE.tobytes()}
    package, key, _ = pack(vendor, tmp_path, members)
    with opened(vendor, package, key) as model:
        for name in ("a.onnx", "b.onnx"):
            assert session(model, name).run(None, GIVEN)[0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("way", ["plain", "value first", "absolute", "address"])
def test_nothing_is_read_from_a_disk(vendor, tmp_path, beside, way):
    places = {"absolute": str(beside / "w.bin"), "address": "*/_ORT_MEM_ADDR_/*"}
    location = places.get(way, "w.bin")
    raw = network(apart(location)).SerializeToString()
    raw = value_first(raw, location) if way == "value first" else raw
    package, key, _ = pack(vendor, tmp_path, {"net.onnx": raw, "net.bin": raw})
    with opened(vendor, package, key) as model:
        with pytest.raises(UsageError) as absent:
            session(model, "net.onnx")
        assert absent.value.reason == Reason.MEMBER_ABSENT
        for weights in (None, "net.bin"):
            with pytest.raises(UsageError) as refused:
                read_model(model, "net.onnx", weights=weights)
            assert refused.value.reason == Reason.EXTRA_UNSUPPORTED
            assert repr(location) in refused.value.what


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("location", ["w.bin", "../disk/w.bin", "./w.bin"])
def test_openvino_takes_no_file_of_the_working_folder_for_a_member(vendor, tmp_path, location):
    """It looks for the weights of any network in memory there, of one in a folder of the package too."""
    raw = network(apart(location)).SerializeToString()
    members = {"ext/net.onnx": raw, "ext/w.bin": HERE.tobytes()}
    package, key, _ = pack(vendor, tmp_path, members)
    with opened(vendor, package, key) as model:
        for make in (read_model, compile_model):
            with pytest.raises(UsageError) as refused:
                make(model, "ext/net.onnx")
            assert refused.value.reason == Reason.EXTRA_UNSUPPORTED
            assert repr("ext/net.onnx") in refused.value.what
            assert repr(location) in refused.value.what
            assert "ONNX Runtime" in refused.value.hint
    if location == "w.bin":  # why it is refused: OpenVINO says nothing, and takes what lies there
        core = openvino.Core()
        assert core.compile_model(core.read_model(raw, b""), "CPU")(GIVEN)[0].tolist() == [8, 8, 8, 8]


@pytest.mark.usefixtures("beside")
def test_openvinos_own_format_names_no_files(vendor, tmp_path):
    """Weights are what is given to it: places that the XML may name lead nowhere."""
    given = opset13.parameter([4], numpy.float32, name="x")
    openvino.save_model(openvino.Model([opset13.add(given, HERE)], [given]), "w.xml", compress_to_fp16=False)
    entity = b'<?xml version="1.0"?><!DOCTYPE net [<!ENTITY w SYSTEM "w.bin">]>'
    raw = Path("w.xml").read_bytes().replace(b'<?xml version="1.0"?>', entity)
    raw = raw.replace(b"<data element_type", b'<data location="w.bin" path="w.bin" element_type')
    raw = raw.replace(b"<rt_info>", b'<rt_info><__weights_path value="w.bin" />')
    package, key, _ = pack(
        vendor, tmp_path, {"w.xml": raw, "apart/w.xml": raw, "apart/w.bin": GIVEN["location"].tobytes()}
    )
    with opened(vendor, package, key) as model:
        with pytest.raises(RuntimeError, match="weights"):
            compile_model(model, "w.xml")
        assert compile_model(model, "apart/w.xml")([HERE])[0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("bits", [0, 1 << 32, 1 << 34])
def test_bits_of_a_tag_that_parsers_drop_hide_nothing(bits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("w.weights").write_bytes(HERE.tobytes())
    weights = apart("w.weights")
    entry = weights.external_data.pop().SerializeToString()
    tag = 13 << 3 | 2 | bits
    longer = bytes(tag >> shift & 127 | (128 if shift < 28 else 0) for shift in range(0, 35, 7))
    tensor = weights.SerializeToString() + longer + bytes([len(entry)]) + entry
    made = network(weights)
    made.graph.ClearField("initializer")
    more = b"\x2a" + bytes([len(tensor)]) + tensor  # parsers merge it with the graph before
    raw = made.SerializeToString() + b"\x3a" + bytes([len(more)]) + more
    assert openvino.Core().read_model(raw, b"").inputs  # it reads the file
    assert locations(memoryview(raw)) == ["w.weights"]


@pytest.mark.parametrize(
    "filling",
    [
        b"\x08" + b"\xff" * 1_000_000 + b"\x01",
        b"\x3a\x00" * 400_000,
        b"\x3a\x02\x0a\x00" * 200_000,
        b"location" * 100_000,
    ],
)
def test_what_is_made_to_take_long_does_not(filling):
    raw = filling + network(apart("w.weights")).SerializeToString()
    tracemalloc.start()
    start = time.process_time()
    found = locations(memoryview(raw))
    assert time.process_time() - start < 5
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert found in ([], ["w.weights"])
