"""ONNX Runtime over a package, beside ONNX Runtime over files: the same bytes come out."""

from __future__ import annotations

import gc
import resource
from pathlib import Path, PurePosixPath
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from hwlicense.core.errors import ClosedError, DamagedError, Reason, StorageError, UsageError
from hwlicense.device.memory import protection
from hwlicense.integrations import onnxruntime as onnxruntime_integration
from hwlicense.integrations.onnxruntime import WRITING, session
from tests.frameworks.conftest import NETWORKS, picture, with_initializers
from tests.packages import opened, pack

CPU = ["CPUExecutionProvider"]


def plain(path: Path, given: numpy.ndarray) -> numpy.ndarray:
    return run(onnxruntime.InferenceSession(path, providers=CPU), given)


def run(of: onnxruntime.InferenceSession, given: numpy.ndarray) -> numpy.ndarray:
    found: numpy.ndarray = of.run(None, {of.get_inputs()[0].name: given})[0]
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_the_output_is_that_of_the_plain_file(model, made, name):
    given = picture(name)
    made_of = session(model, name)
    assert run(made_of, given).tobytes() == plain(made.files / name, given).tobytes()
    assert run(made_of, given).std() > 0


@pytest.fixture
def bare(model) -> int:  # noqa: ARG001  # it is open
    """Bytes that are held of an open model of which nothing was read: its keys."""
    gc.collect()
    return protection().held


def test_nothing_of_the_model_is_kept_twice(model, bare):
    files = len(list(Path("/proc/self/fd").iterdir()))
    made_of = session(model, "rec.onnx")
    assert protection().held == bare
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    assert made_of.get_providers() == CPU


def test_weights_in_other_members_are_found_used_without_a_copy_and_wiped_with_the_session(model, made, bare):
    made_of = session(model, "apart/cls.onnx")
    assert protection().held == bare + model.size("apart/cls.weights")
    given = picture()
    expected = plain(made.files / "apart/cls.onnx", given).tobytes()
    assert run(made_of, given).tobytes() == expected
    model.close()
    assert run(made_of, given).tobytes() == expected
    del made_of
    gc.collect()
    assert protection().held == 0


def test_weights_in_other_members_are_read_where_the_session_reads_them(model):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    made_of = session(model, "apart/cls.onnx", sess_options=options)
    given = picture()
    before = run(made_of, given)
    lent = model.read("apart/cls.weights").obj
    kept = bytes(lent)
    numpy.frombuffer(lent, "u1")[:] = 0
    assert (run(made_of, given) != before).any()  # so they were not copied
    numpy.frombuffer(lent, "u1")[:] = numpy.frombuffer(kept, "u1")
    assert (run(made_of, given) == before).all()


def test_the_runtimes_own_format(model, made):
    given = picture()
    assert run(session(model, "cls.ort"), given).tobytes() == plain(made.files / "cls.ort", given).tobytes()


def test_options_serve_one_model_with_weights_apart_and_any_number_of_others(model, bare):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    first = session(model, "apart/cls.onnx", sess_options=options)
    with pytest.raises(UsageError) as refused:
        session(model, "apart/cls.onnx", sess_options=options)
    assert refused.value.reason == Reason.USAGE
    del first
    gc.collect()
    session(model, "cls.onnx", sess_options=options)
    assert protection().held == bare + model.size("apart/cls.weights")  # the options still point to it


@pytest.mark.parametrize("key", WRITING)
def test_options_that_would_write_files_are_refused(model, key):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(key, "1")
    refused_as_a_cache(model, key, sess_options=options)


def test_options_that_say_no_to_that_are_given_on(model):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("ep.context_enable", "0")
    session(model, "cls.onnx", sess_options=options)


def test_an_optimized_model_is_not_written(model, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    refused_as_a_cache(model, "optimized_model_filepath", sess_options=options)
    assert not list(tmp_path.iterdir())


def test_a_profile_is_not_written(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    refused_as_a_cache(model, "enable_profiling", sess_options=options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("provider", "option", "value"),
    [
        ("TensorrtExecutionProvider", "trt_engine_cache_enable", True),
        ("TensorrtExecutionProvider", "trt_dump_subgraphs", 1),
        ("OpenVINOExecutionProvider", "cache_dir", "/tmp/cache"),  # noqa: S108  # never made
        ("CoreMLExecutionProvider", "ModelCacheDirectory", "/tmp/cache"),  # noqa: S108
        ("MIGraphXExecutionProvider", "migraphx_save_compiled_model", "True"),
        ("TensorrtExecutionProvider", "trt_timing_cache_enable", True),
        ("TensorrtExecutionProvider", "trt_dump_ep_context_model", 1),
        ("TensorrtExecutionProvider", "trt_ep_context_file_path", "context.onnx"),
        ("NvTensorRTRTXExecutionProvider", "nv_runtime_cache_path", "/tmp/cache"),  # noqa: S108
        ("QNNExecutionProvider", "qnn_context_cache_enable", "1"),
        ("QNNExecutionProvider", "qnn_saver_path", "saver"),
        ("QNNExecutionProvider", "profiling_file_path", "profile.csv"),
        ("QNNExecutionProvider", "profiling_level", "detailed"),
    ],
)
def test_caches_of_execution_providers_are_refused(model, provider, option, value):
    refused_as_a_cache(model, option, providers=[(provider, {option: value}), *CPU])


def test_options_of_execution_providers_that_write_nothing_are_given_on(model):
    given = {
        "arena_extend_strategy": "kNextPowerOfTwo", "cache_dir": "", "trt_engine_cache_enable": "0",
        "trt_profile_min_shapes": "x:1x3x48x192", "trt_profile_opt_shapes": "x:3x3x48x192",
        "trt_profile_max_shapes": "x:8x3x48x192", "nv_profile_min_shapes": "x:1x3x48x192",
        "trt_context_memory_sharing_enable": "1", "qnn_context_priority": "high",
    }  # fmt: skip
    assert session(model, "cls.onnx", providers=[("CPUExecutionProvider", given)]).get_providers() == CPU


def refused_as_a_cache(model, said: str, **options) -> None:
    with pytest.raises(UsageError) as refused:
        session(model, "cls.onnx", **options)
    assert refused.value.reason == Reason.PLAINTEXT_CACHE
    assert said in refused.value.what


def test_a_session_is_never_made_anew_from_a_path_that_is_gone(model):
    made_of = session(model, "cls.onnx")
    with pytest.raises(UsageError):
        made_of.set_providers(CPU)
    with pytest.raises(UsageError):
        made_of.enable_fallback()


def test_what_is_missing(model):
    with pytest.raises(UsageError) as refused:
        session(model, "other.onnx")
    assert refused.value.reason == Reason.MEMBER_ABSENT
    model.close()
    with pytest.raises(ClosedError):
        session(model, "cls.onnx")


def test_a_location_that_no_member_has_is_named(vendor, made, tmp_path):
    alone = {"cls.onnx": (made.files / "apart/cls.onnx").read_bytes()}
    package, key, _ = pack(vendor, tmp_path, alone)
    with opened(vendor, package, key) as other, pytest.raises(UsageError) as refused:
        session(other, "cls.onnx")
    assert refused.value.reason == Reason.MEMBER_ABSENT
    assert "'cls.onnx' has weights in 'cls.weights'" in refused.value.what


@pytest.mark.parametrize("name", ["junk.ort", "empty.onnx", "operator.onnx"])
def test_a_member_that_the_runtime_cannot_load_is_named(vendor, tmp_path, name):
    ends = [onnx.helper.make_tensor_value_info(end, 1, [4]) for end in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Unheard", ["x"], ["y"])], "net", ends[:1], ends[1:])
    unheard = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    members = {"junk.ort": b"none of these", "empty.onnx": b"", "operator.onnx": unheard.SerializeToString()}
    package, key, _ = pack(vendor, tmp_path, members)
    with opened(vendor, package, key) as model, pytest.raises(DamagedError) as refused:
        session(model, name)
    assert refused.value.reason == Reason.MEMBER_MALFORMED
    assert repr(name) in refused.value.what
    assert ("Unheard" in refused.value.what) == (name == "operator.onnx")


def test_other_flaws_are_named(vendor, tmp_path):
    """Whatever exception the runtime has for them."""
    ends = [onnx.helper.make_tensor_value_info(end, 1, [4]) for end in "xy"]
    short = onnx.TensorProto(name="w", data_type=1, dims=[4], raw_data=b"abc")
    halves = [onnx.helper.make_tensor_value_info(end, onnx.TensorProto.BFLOAT16, [4]) for end in "xy"]
    node = onnx.helper.make_node
    graphs = {
        "short.onnx": onnx.helper.make_graph([node("Add", ["x", "w"], ["y"])], "net", ends[:1], ends[1:], [short]),
        "kernel.onnx": onnx.helper.make_graph([node("Softmax", ["x"], ["y"])], "net", halves[:1], halves[1:]),
    }
    opsets = [onnx.helper.make_opsetid("", 17)]
    members = {
        name: onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
        for name, graph in graphs.items()
    }
    package, key, _ = pack(vendor, tmp_path, members)
    with opened(vendor, package, key) as model:
        for name in members:
            with pytest.raises(DamagedError, match=name) as refused:
                session(model, name)
            assert refused.value.reason == Reason.MEMBER_MALFORMED
            assert "ONNXRuntimeError" not in refused.value.what


@pytest.mark.parametrize(("number", "words"), [(24, "Too many open files"), (12, "no 9 bytes of memory")])
def test_what_the_system_does_not_give_is_no_flaw_of_the_member(number, words):
    failed = runtime.Fail(f"[ONNXRuntimeError] : 1 : FAIL : system error number {number}")
    found = onnxruntime_integration._meaning(failed, "net.onnx", 9, others=False)
    assert isinstance(found, StorageError)
    assert words in found.what


def test_what_another_provider_says_is_left_to_it():
    for said in ("CUDA failure 2", "Failed to allocate memory for requested buffer of size 9"):
        failed = runtime.Fail(f"[ONNXRuntimeError] : 1 : FAIL : {said}")
        assert onnxruntime_integration._meaning(failed, "net.onnx", 9, others=True) is None


@pytest.mark.parametrize(
    "said",
    ["std::bad_alloc", "PosixThread::PosixThread(...) pthread_create failed, error code: 11", "Failed to allocate 9"],
)
def test_too_little_memory_is_told_by_what_the_runtime_says(said):
    found = onnxruntime_integration._meaning(RuntimeError(said), "net.onnx", 9, others=False)
    assert isinstance(found, StorageError)


def test_weights_apart_that_are_too_short_are_named(vendor, made, tmp_path):
    network, weights = [(made.files / "apart" / name).read_bytes() for name in ("cls.onnx", "cls.weights")]
    package, key, _ = pack(vendor, tmp_path, {"cls.onnx": network, "cls.weights": weights[:-5000]})
    with opened(vendor, package, key) as model, pytest.raises(DamagedError, match="out of bounds") as refused:
        session(model, "cls.onnx")
    assert refused.value.reason == Reason.MEMBER_MALFORMED


@pytest.mark.parametrize("apart", [False, True])
def test_too_little_memory_is_no_damage(vendor, tmp_path, apart):
    size = 16 << 20
    ends = [onnx.helper.make_tensor_value_info(end, 1, [size]) for end in "xy"]
    weights = onnx.numpy_helper.from_array(numpy.ones(size, "f4"), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], ["y"])], "net", ends[:1], ends[1:], [weights]
    )
    network = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    (tmp_path / "files").mkdir()
    onnx.save(network, tmp_path / "files/net.onnx", save_as_external_data=apart, location="net.weights")
    package, key, _ = pack(vendor, tmp_path, {})

    refused, limits = 0, resource.getrlimit(resource.RLIMIT_AS)
    with opened(vendor, package, key) as model:
        for room in range(8 << 20, 16 * size, 5 << 20):
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + room, limits[1]))
            try:
                session(model, "net.onnx")
            except StorageError:
                refused += 1
            finally:
                resource.setrlimit(resource.RLIMIT_AS, limits)
    assert refused > 1


def test_the_format_is_told_by_the_content_whatever_the_options_served_before(model, vendor, made, tmp_path):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.load_model_format", "ORT")
    session(model, "cls.onnx", sess_options=options)
    session(model, "cls.ort", sess_options=options)
    session(model, "cls.onnx", sess_options=options)
    package, key, _ = pack(vendor, tmp_path, {"cls": (made.files / "cls.ort").read_bytes()})
    with opened(vendor, package, key) as other:
        session(other, "cls", sess_options=options)


@pytest.mark.parametrize("location", ["../w.bin", "../../w.bin", "/w.bin"])
def test_a_location_that_leads_elsewhere_is_shown_as_it_is_written(vendor, made, tmp_path, location):
    network = onnx.load(made.files / "apart/cls.onnx", load_external_data=False)
    for tensor in network.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    package, key, _ = pack(vendor, tmp_path, {"a/cls.onnx": network.SerializeToString()})
    with opened(vendor, package, key) as model, pytest.raises(UsageError) as refused:
        session(model, "a/cls.onnx")
    assert refused.value.reason == Reason.MEMBER_ABSENT
    assert f"'a/cls.onnx' has weights in {location!r}" in refused.value.what


def test_options_of_providers_apart_are_given_on_or_refused_alike(model):
    assert session(model, "cls.onnx", providers=CPU, provider_options=[{"use_arena": "1"}]).get_providers() == CPU
    tensorrt = {"providers": ["TensorrtExecutionProvider", *CPU], "provider_options": [{"trt_dump_subgraphs": 1}, {}]}
    refused_as_a_cache(model, "TensorrtExecutionProvider trt_dump_subgraphs", **tensorrt)
    with pytest.raises(ValueError, match="provider_options"):
        session(model, "cls.onnx", providers=CPU, provider_options=[{}, {}])


def test_a_path_of_a_package_is_no_model():
    paths: list[Any] = ["base.hwpkg", Path("base.hwpkg"), None, print]
    for path in paths:
        with pytest.raises(UsageError) as refused:
            session(path, "cls.onnx")
        assert (refused.value.reason, "hwlicense.open" in refused.value.hint) == (Reason.USAGE, True)


def test_members_may_be_named_by_paths(model):
    given = picture()
    for name in ("apart/cls.onnx", "cls.ort"):
        named = run(session(model, PurePosixPath(name)), given)
        assert named.tobytes() == run(session(model, name), given).tobytes()


def test_locations_with_folders_and_long_names(made, vendor, tmp_path):
    network = with_initializers(onnx.load(made.files / "cls.onnx"))
    location = f"{'w' * 140}/{'x' * 100}.bin"
    files = tmp_path / "files"
    (files / "net" / location).parent.mkdir(parents=True)
    onnx.save(network, files / "net/cls.onnx", save_as_external_data=True, location=location, size_threshold=100)
    package, key, _ = pack(vendor, tmp_path, {})
    given = picture()
    with opened(vendor, package, key) as model:
        assert run(session(model, "net/cls.onnx"), given).tobytes() == plain(files / "net/cls.onnx", given).tobytes()


def test_a_network_that_the_runtime_refuses_is_refused_once_and_leaves_nothing(vendor, tmp_path, capfd):
    package, key, _ = pack(vendor, tmp_path, {"bad.onnx": b"none of these"})
    with opened(vendor, package, key) as model:
        gc.collect()  # of tests before
        files, held = len(list(Path("/proc/self/fd").iterdir())), protection().held
        with pytest.raises(DamagedError, match="Protobuf parsing failed") as refused:
            session(model, "bad.onnx")
        assert refused.value.reason == Reason.MEMBER_MALFORMED
        assert "'bad.onnx'" in refused.value.what
        assert "/proc/" not in refused.value.what
        assert type(refused.value.__cause__).__module__.startswith("onnxruntime")
        assert capfd.readouterr().out == ""  # the runtime's fallback would print, and try the path again
        del refused
        gc.collect()
        assert (len(list(Path("/proc/self/fd").iterdir())), protection().held) == (files, held)


def test_a_provider_that_does_not_exist_is_refused_not_replaced(model, capfd):
    with pytest.warns(UserWarning, match="NoSuch"), pytest.raises(RuntimeError, match="NoSuch"):
        session(model, "cls.onnx", providers=["NoSuch"])
    assert capfd.readouterr().out == ""


def test_a_provider_that_is_not_here_leaves_the_next(model):
    with pytest.warns(UserWarning, match="CUDA"):
        made_of = session(model, "cls.onnx", providers=["CUDAExecutionProvider", *CPU])
    assert made_of.get_providers() == CPU


def test_no_providers_are_the_default(model):
    assert session(model, "cls.onnx", providers=None).get_providers() == CPU
