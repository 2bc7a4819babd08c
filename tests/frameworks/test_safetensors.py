"""safetensors over a package, beside the library over files."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import struct
import sys
import threading
from pathlib import PurePosixPath

import ml_dtypes
import numpy
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from hwlicense.core.errors import ClosedError, DamagedError, Reason, StorageError, UsageError
from hwlicense.device.memory import protection
from hwlicense.integrations.safetensors import TORCH, Tensors, load
from tests.frameworks.conftest import CHUNK
from tests.packages import in_child, opened, pack

WEIGHTS = "cls.safetensors"
LARGE = numpy.random.default_rng(3).random((256, 5, 257), dtype="f4")  # 1,316 KB: 21 chunks


def written(*tensors: tuple[str, str, list[int], bytes], **more) -> bytes:
    """A file by the format's description, in which everything may be wrong."""
    header, offset = {}, 0
    for name, kind, shape, content in tensors:
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + len(content)]}
        offset += len(content)
    text = json.dumps(header | more).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(tensor[3] for tensor in tensors)


@pytest.fixture(scope="module")
def large(vendor, tmp_path_factory):
    content = written(
        ("before", "U8", [3], b"abc"), ("large", "F32", [256, 5, 257], LARGE.tobytes()),
        ("scalar", "I64", [], b"\7" * 8), ("none", "F16", [0, 4], b""), ("after", "I8", [2], b"\1\2"),
    )  # fmt: skip
    return pack(vendor, tmp_path_factory.mktemp("large"), {"a.safetensors": content}, chunk_size=CHUNK)


@pytest.fixture
def big(vendor, large):
    with opened(vendor, large[0], large[1]) as model:
        yield model


def test_every_tensor_is_that_of_the_plain_file(model, made):
    with Tensors(model, WEIGHTS) as tensors, safetensors.safe_open(made.files / WEIGHTS, "np") as plain:
        assert sorted(tensors.keys()) == sorted(plain.keys())
        assert len(tensors.keys()) > 200
        assert tensors.metadata() == plain.metadata() == {"from": "PP-OCR"}
        for key in plain.keys():  # noqa: SIM118  # it is no mapping
            ours, theirs = tensors.get_tensor(key), plain.get_tensor(key)
            assert (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())
            assert tensors.get_slice(key).get_shape() == plain.get_slice(key).get_shape()
            assert tensors.get_slice(key).get_dtype() == plain.get_slice(key).get_dtype()
        whole = load(model, WEIGHTS)
        assert {key: whole[key].tobytes() for key in whole} == {
            key: plain.get_tensor(key).tobytes()
            for key in plain.keys()  # noqa: SIM118
        }


def test_one_tensor_costs_the_chunks_that_it_lies_in(big, monkeypatch):
    read = []
    sealed = big._file.sealed

    def counted(chunk, buffer):
        read.append(chunk.key)
        return sealed(chunk, buffer)

    monkeypatch.setattr(big._file, "sealed", counted)
    with Tensors(big, "a.safetensors") as tensors:
        assert tensors.get_tensor("before").tobytes() == b"abc"
        assert read == [0]
        assert (tensors.get_slice("large")[100:110] == LARGE[100:110]).all()
        assert len(read) <= 3
        assert tensors.get_tensor("after").tobytes() == b"\1\2"
        assert len(read) <= 4
        assert (tensors.get_tensor("large") == LARGE).all()
        assert sorted(set(read)) == list(range(21))


def test_a_whole_file_is_one_buffer_that_others_share(big):
    before = protection().held
    whole = load(big, "a.safetensors")
    assert protection().held == before + big.size("a.safetensors")
    assert numpy.shares_memory(whole["large"], numpy.frombuffer(big.read("a.safetensors"), "u1"))
    assert not whole["large"].flags.writeable
    assert (whole["large"] == LARGE).all()
    assert whole["scalar"].shape == ()
    assert whole["none"].shape == (0, 4)


def test_tensors_outlive_the_model_and_are_zeroed_with_their_last_holder(big):
    with Tensors(big, "a.safetensors") as tensors:
        part = tensors.get_slice("large")[3:9, :, 1]
        one = tensors.get_tensor("large")
    whole = load(big, "a.safetensors")["large"]
    big.close()
    for array, expected in ((part, LARGE[3:9, :, 1]), (one, LARGE), (whole, LARGE)):
        assert (array == expected).all()
    del part, one, whole, array
    gc.collect()
    assert protection().held == 0


def test_nothing_more_is_read_of_a_closed_model(big):
    with Tensors(big, "a.safetensors") as tensors:
        big.close()
        with pytest.raises(ClosedError):
            tensors.get_tensor("large")


INDEX = st.one_of(st.integers(-7, 6), st.slices(7))


@given(
    index=st.one_of(
        INDEX, st.tuples(INDEX, st.one_of(st.integers(-5, 4), st.slices(5))), st.sampled_from([..., [1, 2], ()])
    )
)
def test_slices_are_as_numpy_gives_them(small_tensors, index):
    array = numpy.arange(7 * 5 * 2, dtype="i2").reshape(7, 5, 2)
    found = small_tensors.get_slice("t")[index]
    assert found.shape == array[index].shape
    assert (found == array[index]).all()


@pytest.fixture(scope="module")
def small_tensors(vendor, tmp_path_factory):
    content = written(("t", "I16", [7, 5, 2], numpy.arange(70, dtype="i2").tobytes()))
    package, key, _ = pack(vendor, tmp_path_factory.mktemp("small"), {"t": content}, chunk_size=4096)
    with opened(vendor, package, key) as model, Tensors(model, "t") as tensors:
        yield tensors


@pytest.mark.parametrize("index", [7, -8, (0, 5)])
def test_an_index_beyond_the_end_is_an_index_error(small_tensors, index):
    with pytest.raises(IndexError, match=f"index {index} .*'t'.* 7" if isinstance(index, int) else "5"):
        small_tensors.get_slice("t")[index]


def test_scalars_and_all_names_and_tensors_are_as_the_library_gives_them(vendor, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    given = {"b": LARGE[0], "s": numpy.array(3.5), "a": numpy.zeros((0, 2), "i2"), "n": numpy.array(7)}
    safetensors.numpy.save_file(given, files / "t")
    package, key, _ = pack(vendor, tmp_path, {})
    with (
        opened(vendor, package, key) as model,
        Tensors(model, "t") as ours,
        safetensors.safe_open(files / "t", "np") as t,
    ):
        assert ours.offset_keys() == t.offset_keys()
        found = ours.get_tensors()
        assert list(found) == ours.keys()
        for name in t.keys():  # noqa: SIM118  # it is no mapping
            plain = t.get_tensor(name)
            for one in (found[name], ours.get_slice(name)[()], ours.get_slice(name)[...]):
                assert (one.dtype, one.shape, one.tobytes()) == (plain.dtype, plain.shape, plain.tobytes())
    for read in (lambda: ours.get_tensor("b"), ours.get_tensors, lambda: ours.get_slice("b")[0]):
        with pytest.raises(ClosedError, match="'t' were closed") as refused:
            read()
        assert refused.value.reason == Reason.MODEL_CLOSED


@pytest.mark.parametrize("kind", TORCH)
def test_every_type(kind, vendor, tmp_path):
    name = TORCH[kind]
    dtype = numpy.dtype(getattr(ml_dtypes, name, None) or name)
    content = bytes([0, 1, 1, 0, 0, 1, 1, 1]) * dtype.itemsize
    shape = [2, 4 * 8 // 8]
    package, key, _ = pack(vendor, tmp_path, {"t": written(("t", kind, shape, content))})
    with opened(vendor, package, key) as model, Tensors(model, "t") as tensors:
        for found in (tensors.get_tensor("t"), load(model, "t")["t"]):
            assert (found.dtype, found.shape, found.tobytes()) == (dtype, (2, 4), content)


def test_types_that_numpy_needs_a_library_for(vendor, tmp_path, monkeypatch):
    package, key, _ = pack(vendor, tmp_path, {"t": written(("t", "BF16", [2], b"1234"))})
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with opened(vendor, package, key) as model, Tensors(model, "t") as tensors, pytest.raises(UsageError) as refused:
        tensors.get_tensor("t")
    assert refused.value.reason == Reason.EXTRA_MISSING
    assert refused.value.hint == 'pip install "hwlicense[safetensors]"'


def test_types_of_less_than_a_byte_are_refused_and_leave_the_others_readable(vendor, tmp_path):
    package, key, _ = pack(
        vendor, tmp_path, {"t": written(("packed", "F4", [8], b"1234"), ("after", "U8", [2], b"56"))}
    )
    with opened(vendor, package, key) as model, Tensors(model, "t") as tensors:
        assert tensors.get_tensor("after").tobytes() == b"56"
        assert tensors.get_slice("packed").get_dtype() == "F4"
        for read in (lambda: tensors.get_tensor("packed"), lambda: load(model, "t")):
            with pytest.raises(UsageError) as refused:
                read()
            assert refused.value.reason == Reason.EXTRA_UNSUPPORTED


def test_wrong_names(big):
    with Tensors(big, "a.safetensors") as tensors:
        for ask in (tensors.get_tensor, tensors.get_slice):
            with pytest.raises(UsageError) as refused:
                ask("other")
            assert refused.value.reason == Reason.TENSOR_ABSENT
    with pytest.raises(UsageError) as refused:
        Tensors(big, "a.safetensors", "jax")
    assert refused.value.reason == Reason.USAGE
    assert (load(big, PurePosixPath("a.safetensors"))["large"] == LARGE).all()


SOUND = written(("a", "U8", [4], b"1234"), ("b", "U8", [4], b"5678"))
MALFORMED = {
    "nothing": b"",
    "short": SOUND[:7],
    "cut in the header": SOUND[:40],
    "cut in a tensor": SOUND[:-1],
    "more at the end": SOUND + b"9",
    "a header longer than the file": struct.pack("<Q", 1 << 20) + SOUND[8:],
    "a header longer than any": struct.pack("<Q", 1 << 63) + SOUND[8:],
    "no JSON": struct.pack("<Q", 4) + b"{a: ",
    "overlap": written(("a", "U8", [4], b"1234"), b={"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}) + b"56",
    "hole": written(("a", "U8", [4], b"1234"), b={"dtype": "U8", "shape": [4], "data_offsets": [5, 9]}) + b"56789",
    "shape and size differ": written(("a", "U8", [5], b"1234")),
    "a shape that overflows": written(("a", "U8", [1 << 62, 8], b"1234")),
    "an empty shape that overflows": written(("a", "F32", [0, 1 << 40, 1 << 40, 1 << 40], b"")),
    "an empty shape that overflows in bytes": written(("a", "F64", [0, 1 << 61], b"")),
    "more axes than an array may have": written(("a", "U8", [1] * 33, b"1")),
    "unknown type": written(("a", "Q9", [4], b"1234")),
    "backwards": written(a={"dtype": "U8", "shape": [0], "data_offsets": [4, 0]}),
}


@pytest.mark.parametrize("way", MALFORMED)
def test_malformed_files_are_refused(way, vendor, tmp_path):
    package, key, _ = pack(vendor, tmp_path, {"t": MALFORMED[way]})
    with opened(vendor, package, key) as model:
        for read in (Tensors, load):
            with pytest.raises(DamagedError) as refused:
                read(model, "t")
            assert refused.value.reason == Reason.MEMBER_MALFORMED


@pytest.mark.parametrize(("limit", "left"), [("RLIMIT_NOFILE", 0), ("RLIMIT_NOFILE", 1), ("RLIMIT_FSIZE", 100)])
def test_a_process_that_may_have_no_file_is_told(big, limit, left):
    """Either of them: the parser opens the one in memory again."""

    def child() -> None:
        gc.collect()  # what tests before have left would give descriptors back in the middle
        gc.disable()
        kind = getattr(resource, limit)
        resource.setrlimit(kind, (64 if limit == "RLIMIT_NOFILE" else left, resource.getrlimit(kind)[1]))
        kept: list[int] = []
        for read in (Tensors, load):
            if limit == "RLIMIT_NOFILE":
                with contextlib.suppress(OSError):
                    while True:
                        kept.append(os.open("/", os.O_RDONLY))
                for _ in range(left):
                    os.close(kept.pop())
            with pytest.raises(StorageError, match="too large" if not kept else "Too many open files") as refused:
                read(big, "a.safetensors")
            assert refused.value.reason == Reason.STORAGE
            assert "ulimit" in refused.value.hint

    in_child(child)


@pytest.mark.parametrize("shape", [[1] * 32, [0, 1 << 58], [1 << 58, 0]])
def test_odd_shapes_that_an_array_may_have(shape, vendor, tmp_path):
    content = written(("a", "F64", shape, b"12345678" * (0 not in shape)))
    package, key, _ = pack(vendor, tmp_path, {"t": content})
    with opened(vendor, package, key) as model, Tensors(model, "t") as tensors:
        assert load(model, "t")["a"].shape == tensors.get_tensor("a").shape == tuple(shape)


def test_threads_share_it(big):
    with Tensors(big, "a.safetensors") as tensors:
        wrong: list[int] = []

        def read(start: int) -> None:
            wrong.extend(row for row in range(start, 256, 4) if (tensors.get_slice("large")[row] != LARGE[row]).any())

        threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert wrong == []


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")  # what is tested here
def test_a_fork_while_another_thread_reads(big, monkeypatch):
    with Tensors(big, "a.safetensors") as tensors:
        reading, forked = threading.Event(), threading.Event()
        opens = tensors._file._open_chunks

        def slow(*arguments) -> None:
            reading.set()
            forked.wait(60)
            opens(*arguments)

        monkeypatch.setattr(tensors._file, "_open_chunks", slow)
        thread = threading.Thread(target=tensors.get_tensor, args=("large",))
        thread.start()
        reading.wait(60)

        def child() -> None:
            signal.alarm(60)  # one that waits for the thread, which is not there, ends by that
            tensors._file._open_chunks = opens
            assert (tensors.get_tensor("large") == LARGE).all()

        in_child(child)
        forked.set()
        thread.join()
