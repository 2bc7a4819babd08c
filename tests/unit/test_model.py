"""An open model: reading, streaming, paths, closing, threads, forks."""

from __future__ import annotations

import gc
import io
import os
import resource
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hwlicense
from hwlicense.core.errors import (
    AbsentError,
    ClosedError,
    DamagedError,
    HwlicenseError,
    Reason,
    StorageError,
    UsageError,
    naming,
    unforeseen,
)
from hwlicense.core.keys import Content
from hwlicense.core.secret import Secret
from hwlicense.device.keyring import Keyring
from hwlicense.device.memory import protection
from hwlicense.device.model import Model
from hwlicense.device.reading import PackageFile
from hwlicense.threads import THREADS
from tests.packages import in_child, nothing_enclosed, opened, ordinary_user, pack, reachable

CHUNK = 4096
LINES = b"".join(b"line %d of many\n" % i * (i % 7) for i in range(1000))
MEMBERS = {
    "big": os.urandom(40 * CHUNK + 123),
    "one-chunk": os.urandom(CHUNK),
    "lines": LINES,
    "empty": b"",
    "folder/small": b"small",
}


@pytest.fixture(scope="module")
def made(vendor, tmp_path_factory):
    return pack(vendor, tmp_path_factory.mktemp("model"), MEMBERS, chunk_size=CHUNK)


@pytest.fixture(autouse=True)
def threads_for_little(monkeypatch):
    monkeypatch.setattr("hwlicense.threads.THREADED", 8 * CHUNK)
    monkeypatch.setattr("hwlicense.device.reading.RUN", CHUNK)


@pytest.fixture
def model(vendor, made):
    with opened(vendor, made[0], made[1]) as model:
        yield model
    gc.collect()


def test_who_it_is(model):
    assert (model.name, model.version, model.closed) == ("reader", "1.0", False)
    assert model.names == tuple(sorted(MEMBERS))
    assert repr(model) == "<Model 'reader' '1.0'>"


def test_reading_gives_one_read_only_buffer(model):
    first, second = model.read("big"), model.read("big")
    assert bytes(first) == MEMBERS["big"]
    assert first.obj is second.obj
    assert first.readonly
    assert (first.format, first.ndim, first.contiguous) == ("B", 1, True)
    with pytest.raises(TypeError):
        first[0] = 0
    weights = numpy.frombuffer(model.read("one-chunk"), dtype="<f4")
    assert not weights.flags.writeable
    assert weights.tobytes() == MEMBERS["one-chunk"]
    assert bytes(model.read("empty")) == b""


def test_reading_into_a_buffer_of_the_callers(model):
    held = protection().held
    for name, content in MEMBERS.items():
        buffer = bytearray(len(content))
        model.readinto(name, buffer)
        assert buffer == content
    numbers = numpy.empty(CHUNK // 4, "<f4")
    model.readinto("one-chunk", numbers)
    assert numbers.tobytes() == MEMBERS["one-chunk"]
    assert protection().held == held
    for size in (CHUNK - 1, CHUNK + 1, 0):
        with pytest.raises(UsageError) as refused:
            model.readinto("one-chunk", bytearray(size))
        assert refused.value.reason == Reason.USAGE
    model.close()
    with pytest.raises(ClosedError):
        model.readinto("one-chunk", numbers)


@pytest.mark.parametrize("back", [False, True])
def test_keys_that_are_lost_while_the_enclosure_is_copied_give_no_zeros(vendor, made, monkeypatch, back):
    """Presence takes them, and gives them back, whoever is at work."""
    content, copy = Content(made[1], Secret(bytearray(b"seed"))), Keyring.enclosure

    def lost_meanwhile(keys: Keyring) -> memoryview:
        monkeypatch.setattr(Keyring, "enclosure", copy)
        own.lose_keys(AbsentError(Reason.DONGLE_ABSENT, "The dongle was pulled.", "Plug it in."))
        copied = copy(keys)
        if back:
            own.regain_keys(own._keyring(content))
        return copied

    monkeypatch.setattr(Keyring, "enclosure", lost_meanwhile)
    with PackageFile(made[0], vendor.public) as file, Model(file, content) as own:
        if back:
            assert bytes(own.enclosure) == b"seed"
        else:
            with pytest.raises(AbsentError) as lost:
                _ = own.enclosure
            assert lost.value.reason == Reason.DONGLE_ABSENT
            del lost
    gc.collect()  # what the error's traceback holds


def test_memory_is_given_back_with_the_last_buffer_open_or_closed(model):
    before = protection().held
    first, second = model.read("big"), model.read("big")
    assert protection().held == before + len(MEMBERS["big"])
    del first
    assert protection().held == before + len(MEMBERS["big"])
    del second
    assert protection().held == before
    weights = numpy.frombuffer(model.read("big"), dtype="u1")
    model.close()
    assert weights.tobytes() == MEMBERS["big"]  # lent: it outlives the model
    del weights
    assert protection().held == 0


def test_closing_wipes_the_keys_and_everything_raises(model):
    keys = model._keys.memory.view
    path, reader = model.path("big"), model.open("big")
    reader.read(10)
    cached = reader._memory.view
    descriptor = model._file._file.fd
    model.close()
    model.close()
    assert not any(bytes(keys))
    assert not any(bytes(cached))
    assert not Path(path).exists()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    calls = [
        lambda: model.names,
        lambda: model.size("big"),
        lambda: model.read("big"),
        lambda: model.read("empty"),
        lambda: model.path("big"),
        lambda: model.open("big"),
        lambda: model.read("absent"),
        lambda: reader.read(1),
        lambda: reader.readinto(bytearray(1)),
        reader.peek,
        model.__enter__,
    ]
    for call in calls:
        with pytest.raises(ClosedError) as refused:
            call()
        assert refused.value.reason == Reason.MODEL_CLOSED
    assert model.closed
    assert protection().held == 0


def test_a_model_that_nobody_closes_is_closed_when_collected(vendor, made):
    model = Model(PackageFile(made[0], vendor.public), nothing_enclosed(made[1]))
    assert bytes(model.read("folder/small")) == b"small"
    assert protection().held
    del model
    gc.collect()
    assert protection().held == 0


def test_an_application_learns_how_well_its_model_is_protected(model):
    before = model.protection
    buffer = model.read("big")
    assert model.protection == protection()
    assert (model.protection.held - before.held, model.protection.dumpable) == (len(buffer), False)


def test_a_member_that_is_not_there(model):
    for call in (model.size, model.read, model.open, model.path):
        with pytest.raises(UsageError) as refused:
            call("../big")
        assert refused.value.reason == Reason.MEMBER_ABSENT


def test_a_path_is_sealed_memory_and_stays_the_same(model):
    path = model.path("big")
    assert path == model.path("big") != model.path("one-chunk")
    assert path.startswith("/proc/self/fd/")
    assert Path(path).read_bytes() == MEMBERS["big"]
    assert str(Path(path).readlink()).startswith("/memfd:hwlicense")
    with pytest.raises(PermissionError):
        Path(path).write_bytes(b"")


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["read", "read1", "readinto", "readline"]), st.integers(-1, 3 * CHUNK)),
        st.tuples(st.just("seek"), st.integers(0, 42 * CHUNK), st.just(0)),
        st.tuples(st.just("seek"), st.integers(-2 * CHUNK, 2 * CHUNK), st.sampled_from([1, 2])),
        st.tuples(st.sampled_from(["tell", "peek"])),
    ),
    max_size=30,
)


def test_seeking_refuses_what_files_refuse(model):
    with model.open("big") as file, io.BytesIO(MEMBERS["big"]) as oracle:
        for each in (file, oracle):
            with pytest.raises(ValueError, match=r"invalid whence \(9, should be 0, 1 or 2\)"):
                each.seek(0, 9)
        assert file.tell() == 0


@settings(max_examples=150)
@given(name=st.sampled_from(sorted(MEMBERS)), operations=OPERATIONS)
def test_a_member_reads_as_a_file_does(vendor, made, name, operations):
    with opened(vendor, made[0], made[1]) as model, model.open(name) as file:
        oracle = io.BytesIO(MEMBERS[name])
        for operation, *arguments in operations:
            if operation == "readinto":
                got, expected = bytearray(max(0, arguments[0])), bytearray(max(0, arguments[0]))
                assert (file.readinto(got), got) == (oracle.readinto(expected), expected)
            elif operation == "peek":
                found = file.peek()
                assert MEMBERS[name][oracle.tell() :].startswith(found)
                assert bool(found) == (oracle.tell() < len(MEMBERS[name]))
            elif operation == "read1":  # may give less, but nothing else
                found = file.read1(*arguments)
                assert found == oracle.read(len(found))
                assert found or arguments == [0] or oracle.read(1) == b""
            elif (
                operation == "seek"
                and arguments[1]
                and oracle.tell() * (arguments[1] == 1) + arguments[0] + len(MEMBERS[name]) * (arguments[1] == 2) < 0
            ):
                with pytest.raises(ValueError, match="negative"):
                    file.seek(*arguments)
            else:
                assert getattr(file, operation)(*arguments) == getattr(oracle, operation)(*arguments)
            assert file.tell() == oracle.tell()


def test_large_reads_go_straight_into_the_buffer(model):
    """Whole chunks are decrypted where they are wanted; what a small read left in the cache serves as before."""
    content = MEMBERS["big"]
    for start, size in ((0, len(content)), (CHUNK, 3 * CHUNK), (CHUNK - 1, 20 * CHUNK), (39 * CHUNK, 5 * CHUNK)):
        file, buffer, before = model.open("big"), bytearray(size), protection().held
        file.seek(start)
        got = file.readinto(buffer)
        assert buffer[:got] == content[start : start + size]
        assert file.tell() == start + got == min(start + size, len(content))
        assert protection().held - before in {0, 41 * CHUNK}  # the cache, where an end of a chunk was wanted
        file.seek(start)
        assert file.read(10) == content[start:][:10]
        file.seek(start)
        assert file.readinto(buffer) == got
        assert buffer[:got] == content[start : start + size]
        file.close()


def test_lines_and_other_readers(model):
    with model.open("lines") as file:
        assert list(file) == LINES.splitlines(keepends=True)
        assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)
    with io.TextIOWrapper(model.open("lines")) as text:
        assert text.read() == LINES.decode()
    with io.BufferedReader(model.open("big")) as buffered:
        assert buffered.read() == MEMBERS["big"]
    with pytest.raises(ValueError, match="closed"):
        file.read()


def test_a_stream_holds_little_memory(vendor, tmp_path):
    content = os.urandom(24 << 20)
    package, key, _ = pack(vendor, tmp_path, {"big": content}, chunk_size=1 << 20)
    with opened(vendor, package, key) as model:
        before = protection().held
        file, buffer, done = model.open("big"), bytearray(1 << 16), 0
        while got := file.readinto(buffer):
            assert buffer[:got] == content[done : done + got]
            done += got
            assert protection().held - before <= 4 << 20
        assert done == len(content)


def test_reading_takes_little_memory_besides(vendor, tmp_path):
    package, key, _ = pack(vendor, tmp_path, {"big": bytes(24 << 20)}, chunk_size=1 << 20)
    with opened(vendor, package, key) as model:
        tracemalloc.start()
        model.read("big")
        beside = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert beside < THREADS * (2 << 20) + (1 << 20)  # for ciphertext; what is read lies in a mapping of its own


def test_many_threads_get_one_buffer(model):
    start, found = threading.Barrier(8), []

    def read() -> None:
        start.wait()
        found.append(model.read("big"))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(view.obj) for view in found}) == 1
    assert bytes(found[0]) == MEMBERS["big"]


def test_reading_where_the_system_allows_no_more_threads(vendor, made, monkeypatch):
    package, key, _ = made
    reachable(package)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))  # so that it asks for three

    def child() -> None:
        ordinary_user()
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        with pytest.raises(RuntimeError, match="can't start new thread"):
            ThreadPoolExecutor().submit(int)
        with opened(vendor, package, key) as model:
            assert bytes(model.read("big")) == MEMBERS["big"]
            assert Path(model.path("big")).read_bytes() == MEMBERS["big"]

    in_child(child)


def test_reading_where_the_system_allows_one_more_thread(model, monkeypatch):
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def start_one(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.setattr(threading.Thread, "start", start_one)
    assert bytes(model.read("big")) == MEMBERS["big"]
    assert len(started) == 1
    assert not started[0].is_alive()


def test_threads_that_read_while_another_closes(vendor, made):
    for round_ in range(15):
        model = Model(PackageFile(made[0], vendor.public), nothing_enclosed(made[1]))
        keys = model._keys.memory.view
        wrong: list[str] = []

        def read(model=model, wrong=wrong) -> None:
            file = model.open("big")
            try:
                while True:
                    if bytes(model.read("big")) != MEMBERS["big"] or file.seek(0) or file.read() != MEMBERS["big"]:
                        wrong.append("bytes")
            except ClosedError:
                pass
            except HwlicenseError as error:
                wrong.append(error.reason)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.002 * round_)
        model.close()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert not any(bytes(keys))
        assert protection().held == 0


def test_forked_children_read_and_close_on_their_own(model):
    path, file = model.path("big"), model.open("big")
    file.seek(5)
    file.read(10)
    lent = model.read("one-chunk")

    def child() -> None:
        assert file.read(100) == MEMBERS["big"][15:115]
        assert Path(path).read_bytes() == MEMBERS["big"]
        assert bytes(model.read("big")) == MEMBERS["big"]
        assert bytes(lent) == MEMBERS["one-chunk"]
        model.close()
        assert bytes(lent) == MEMBERS["one-chunk"]

    in_child(child)
    in_child(child)
    assert file.read(100) == MEMBERS["big"][15:115]
    assert bytes(model.read("big")) == MEMBERS["big"]
    assert Path(path).read_bytes() == MEMBERS["big"]


def test_a_fork_within_a_call_still_wipes(model):
    """As a signal handler forks: the child comes out of a call that the parent began."""

    def child() -> None:
        keys = model._keys.memory.view
        with model._using():  # a call of its own, within the handler
            model.close()
        assert any(bytes(keys))  # the interrupted call still works with them
        leaving.close()
        assert not any(bytes(keys))
        assert protection().held == 0

    def call():
        with model._using():
            yield

    leaving = call()
    next(leaving)
    in_child(child)
    leaving.close()
    assert bytes(model.read("big")) == MEMBERS["big"]
    keys = model._keys.memory.view
    model.close()
    assert not any(bytes(keys))


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")  # what is tested here
def test_a_fork_while_other_threads_read(model):
    stop = threading.Event()
    wrong: list[int] = []
    file = model.open("big")

    def read() -> None:
        while not stop.is_set():
            file.seek(0)
            wrong.extend([1] if bytes(model.read("big")) != MEMBERS["big"] or len(file.read(9)) > 9 else [])

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()

    def child() -> None:
        assert bytes(model.read("big")) == MEMBERS["big"]
        assert len(file.read(5)) <= 5
        keys = model._keys.memory.view
        model.close()
        assert not any(bytes(keys))

    for _ in range(20):
        in_child(child)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_package_may_be_replaced_and_must_not_be_cut(vendor, tmp_path):
    package, key, _ = pack(vendor, tmp_path, {"big": MEMBERS["big"], "end": b"end" * CHUNK}, chunk_size=CHUNK)
    with opened(vendor, package, key) as model:
        (tmp_path / "other").write_bytes(b"other")
        (tmp_path / "other").rename(package)
        assert bytes(model.read("big")) == MEMBERS["big"]
    package, key, _ = pack(vendor, tmp_path, {}, chunk_size=CHUNK, force=True)
    with opened(vendor, package, key) as model:
        file = model.open("big")
        assert file.read(10) == MEMBERS["big"][:10]
        os.truncate(package, package.stat().st_size // 2)
        for call in (lambda: model.read("end"), lambda: model.path("end"), file.read, lambda: model.open("end").read()):
            with pytest.raises(DamagedError) as refused:
                call()
            assert refused.value.reason == Reason.PACKAGE_DAMAGED
        before = protection().held
        file.seek(5)
        assert file.read(10) == MEMBERS["big"][5:15]  # the failure spoilt nothing
        assert protection().held == before


def test_no_file_left_for_a_path_or_a_stream(model):
    """The process has every file open that it may; a stream needs none."""

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        with pytest.raises(StorageError, match="Too many open files") as refused:
            model.path("big")
        assert refused.value.reason == Reason.STORAGE
        assert model.open("big").read(10) == MEMBERS["big"][:10]

    in_child(child)


def test_a_failing_disk(model, monkeypatch):
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    for call in (lambda: model.read("big"), lambda: model.open("big").read(1), lambda: model.path("big")):
        with pytest.raises(StorageError) as refused:
            call()
        assert refused.value.reason == Reason.STORAGE
        assert refused.value.hint


def test_an_ordinary_user_reads_and_follows_paths(vendor, made):
    """Not dumpable, /proc/self belongs to root: its fd must still lead an ordinary user to his own files."""
    package, key, _ = made
    reachable(package)

    def child() -> None:
        ordinary_user()
        assert protection().dumpable
        with opened(vendor, package, key) as model:
            assert os.stat("/proc/self/fd").st_uid == 0  # noqa: PTH116
            path = model.path("big")
            assert Path(path).read_bytes() == MEMBERS["big"]
            assert numpy.fromfile(path, dtype="u1").tobytes() == MEMBERS["big"]
            assert bytes(model.read("big")) == MEMBERS["big"]
            in_child(lambda: Path(path).read_bytes() == MEMBERS["big"] or 1 / 0)
        assert not protection().dumpable

    in_child(child)


def test_an_error_that_is_kept_spoils_no_later_read(vendor, tmp_path):
    """Its traceback holds what was being read into."""
    package, key, _ = pack(vendor, tmp_path, {"member": bytes(CHUNK + 1)}, chunk_size=CHUNK)
    with opened(vendor, package, key) as model:
        os.truncate(package, package.stat().st_size - 1)
        file = model.open("member")
        file.seek(CHUNK)
        with pytest.raises(DamagedError) as kept:
            file.read(1)
        file.seek(0)
        assert file.read(1) == b"\0"
        assert kept.value.reason == Reason.PACKAGE_DAMAGED


def test_a_reader_of_a_small_member_takes_what_that_has(vendor, tmp_path):
    package, key, _ = pack(vendor, tmp_path, {"small": b"small"})
    with opened(vendor, package, key) as model:
        gc.collect()
        before = protection().held
        with model.open("small") as file:
            assert file.read(2) == b"sm"
            assert protection().held == before + len(b"small")


def test_a_reader_that_is_closed_while_a_thread_waits_for_it_decrypts_nothing_more(vendor, made):
    with opened(vendor, made[0], made[1]) as model, ThreadPoolExecutor(1) as pool:
        for call in ("read", "read1", "peek", "readline"):
            reader = model.open("big")
            with reader._lock:
                waiting = pool.submit(getattr(reader, call), 10)
                time.sleep(0.05)
                reader.close()
            with pytest.raises(ValueError, match="closed file"):
                waiting.result()
            assert reader._memory is None


def test_members_may_be_named_by_paths(model):
    assert model.size("./big") == model.size("x/../big") == model.size("big")
    name = PurePosixPath("big")
    assert model.size(name) == len(MEMBERS["big"])
    assert model.read(name).obj is model.read("big").obj  # one buffer, however it is named
    assert model.path(name) == model.path("big")
    assert model.open(name).read() == MEMBERS["big"]
    model.readinto(name, buffer := bytearray(model.size("big")))
    assert buffer == MEMBERS["big"]
    with pytest.raises(UsageError, match="no member 'other'") as refused:
        model.read(PurePosixPath("other"))
    assert refused.value.reason == Reason.MEMBER_ABSENT


def test_too_little_memory_is_said_wherever_it_ends(vendor, tmp_path):
    size, step = 24 << 20, 8 << 20
    package, key, _ = pack(vendor, tmp_path, {"w": bytes(size)}, chunk_size=step)
    out = bytearray(size)
    with opened(vendor, package, key) as model:
        calls = [
            lambda: model.read("w"),
            lambda: model.path("w"),
            lambda: model.open("w").read(),
            lambda: model.open("w").readinto(bytearray(1)),
            lambda: model.readinto("w", out),
        ]
        refused = set()

        def child() -> None:
            for number, call in enumerate(calls):
                for room in range(1 << 20, 64 << 20, 4 << 20):
                    gc.collect()
                    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
                    try:
                        call()
                    except StorageError:
                        refused.add(number)
                    finally:
                        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            assert refused

        in_child(child)


def test_too_little_memory_to_open_is_said_too(monkeypatch, tmp_path):
    def opening(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("hwlicense.device.reading.PackageFile.__init__", opening)
    monkeypatch.setattr("hwlicense.device.selecting.vendor", lambda _: None)
    with pytest.raises(StorageError) as refused:
        hwlicense.open(tmp_path / "x.hwpkg", vendor="", home=tmp_path)
    assert refused.value.reason == unforeseen(MemoryError()).reason == Reason.STORAGE


def test_an_error_says_which_package_it_is_about(vendor, tmp_path):
    package, key, _ = pack(vendor, tmp_path, {"w": bytes(5000)})
    content = bytearray(package.read_bytes())
    content[-1] ^= 1
    package.write_bytes(content)
    with opened(vendor, package, key) as model, pytest.raises(DamagedError) as refused:
        model.read("w")
    assert refused.value.what == str(refused.value)
    assert refused.value.what.startswith(f"{package}: Chunk 0 of the package was changed")
    package.write_bytes(content[:-1])
    with pytest.raises(DamagedError, match=str(package)):
        PackageFile(package, vendor.public)


def test_an_error_about_another_file_is_not_said_to_be_about_this_one():
    with pytest.raises(StorageError, match=r"^held/tpm: No space") as refused, naming("l.hwlic"):
        raise StorageError(Reason.STORAGE, "held/tpm: No space left on device.")
    assert refused.value.what == "held/tpm: No space left on device."
