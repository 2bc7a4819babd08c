"""Memory for keys and plaintext: when it is zeroed, and what it keeps others from."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import resource
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwlicense.core.errors import Reason, StorageError
from hwlicense.device import memory
from hwlicense.device.memory import HUGE_PAGE, Memory, SealedFile, lend, protection
from tests.packages import in_child


class Watched(Memory):
    """Notes whether it was all zeros when its wipe ended."""

    seen: list[bool]

    def wipe(self) -> None:
        super().wipe()
        self.seen.append(not any(bytes(self.view)))


@given(st.sampled_from([1, 4095, 4096, 4097, HUGE_PAGE - 1, HUGE_PAGE, HUGE_PAGE + 1, 3 * HUGE_PAGE + 5]))
def test_wiping_zeroes_every_byte(size):
    one = Memory(size)
    one.view[:] = b"\xaa" * size
    kept = one.view[:]
    one.wipe()
    one.wipe()
    assert not any(bytes(kept))


def test_lent_memory_is_zeroed_when_the_last_buffer_is_gone():
    one = Watched(100_000)
    one.view[:] = b"x" * 100_000
    seen: list[bool] = []
    one.seen = seen
    alive = weakref.ref(one)
    array = lend(one)
    del one
    view = memoryview(array).cast("B").toreadonly()
    del array
    weights = numpy.frombuffer(view, dtype="u1")
    del view
    part = weights[10:20].reshape(2, 5)
    del weights
    gc.collect()
    assert seen == []
    assert bytes(part) == b"x" * 10  # the last user still sees plaintext, not zeros
    del part
    assert seen == [True]
    assert alive() is None


def test_lent_memory_is_not_zeroed_at_exit_under_a_thread_that_computes():
    code = """
import ctypes, sys
from hwlicense.device.memory import Memory, lend
one = Memory(65); one.view[:64] = b"x" * 64
view = memoryview(lend(one)); del one
ctypes.pythonapi.Py_IncRef(ctypes.py_object(view))  # as native code holds it
libc = ctypes.CDLL(None)  # what runs last of all, when the interpreter is gone: dprintf(exit status, buffer)
libc.on_exit(ctypes.cast(libc.dprintf, ctypes.c_void_p), ctypes.c_void_p(ctypes.addressof(view.obj)))
sys.exit(1)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert ended.stdout == b"x" * 64


NEVER_DUMPABLE_AGAIN = """
import os, subprocess, sys
from hwlicense.device.memory import Memory, SealedFile, forbid_dumps, protection
said = [protection().dumpable]
if sys.argv[1] == "memory":
    Memory(10).wipe()
elif sys.argv[1] == "file":
    SealedFile(10, bytes).close()
else:
    forbid_dumps()
    forbid_dumps()
said.append(protection().dumpable)
child = os.fork()
if not child:
    os._exit(protection().dumpable)
said.append(bool(os.waitpid(child, 0)[1]))
print(*said, flush=True)
other = "from hwlicense.device.memory import protection; print(protection().dumpable)"
os.execv(sys.executable, [sys.executable, "-c", other])
"""


@pytest.mark.parametrize("what", ["memory", "file", "forbid_dumps"])
def test_a_process_that_had_something_to_hide_is_never_dumpable_again(what):
    said = subprocess.check_output([sys.executable, "-c", NEVER_DUMPABLE_AGAIN, what], text=True)
    # Before, after, in a forked child; and in another program, which has none of this memory.
    assert said.split() == ["True", "False", "False", "True"]


def open_files() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def flags_of(address: int) -> set[str]:
    """The kernel's flags of the mapping at `address`."""
    inside = False
    with Path("/proc/self/smaps").open() as lines:
        for line in lines:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                low, high = (int(part, 16) for part in first.split("-"))
                inside = low <= address < high
            elif inside and first == "VmFlags:":
                return set(line.split()[1:])
    raise AssertionError("not mapped")


def test_mappings_are_left_out_of_dumps_and_locked():
    one = Memory(3 * HUGE_PAGE)
    assert flags_of(one._address) >= {"dd", "lo", "hg"}
    held = protection()
    assert (held.held, held.locked) == (3 * HUGE_PAGE, 3 * HUGE_PAGE)
    one.wipe()


def test_what_cannot_be_locked_is_reported():
    code = """
import os, resource
from hwlicense.device.memory import Memory, protection
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
if os.getuid() == 0: os.setuid(65534)
small, large = Memory(4096), Memory(1 << 20)
large.view[:] = bytes(1 << 20)
print(protection().held, protection().locked, protection().dumpable)
"""
    assert subprocess.check_output([sys.executable, "-c", code]).split() == [b"1052672", b"4096", b"False"]


def test_a_sealed_file_cannot_be_changed_and_is_exact():
    file = SealedFile(5000, lambda view: view.__setitem__(slice(None), b"y" * 5000))
    assert Path(file.path).read_bytes() == b"y" * 5000
    for change in (
        lambda: os.pwrite(file.fd, b"z", 0),
        lambda: os.ftruncate(file.fd, 4999),
        lambda: os.ftruncate(file.fd, 5001),
        lambda: mmap.mmap(file.fd, 5000, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        lambda: fcntl.fcntl(file.fd, fcntl.F_ADD_SEALS, 0),
    ):
        with pytest.raises(PermissionError):
            change()
    assert fcntl.fcntl(file.fd, fcntl.F_GET_SEALS) & 0xF == 0xF
    assert os.get_inheritable(file.fd) is False
    assert protection().locked == 5000
    file.close()
    file.close()
    assert not Path(file.path).exists()
    assert protection().held == 0


def test_an_empty_sealed_file():
    file = SealedFile(0, lambda _: pytest.fail("nothing is to be filled"))
    assert Path(file.path).read_bytes() == b""
    file.close()


def test_a_failed_filling_leaves_no_file():
    before = open_files()

    def fail(view: memoryview) -> None:
        part = view[1:]  # the traceback keeps it  # noqa: F841
        raise KeyError("x")

    with pytest.raises(KeyError):
        SealedFile(10, fail)
    assert open_files() == before
    assert protection().held == 0


def test_a_sealed_file_has_all_its_pages_before_it_is_filled(monkeypatch):
    """Where memory is short, writing to a page that the file lacks kills the process (SIGBUS)."""
    seen: list[int] = []
    make = memory.memory_file

    def watched() -> int:
        seen.append(make())
        return seen[0]

    monkeypatch.setattr(memory, "memory_file", watched)
    size = 3 * HUGE_PAGE + 1
    SealedFile(size, lambda _: seen.append(os.fstat(seen[0]).st_blocks * 512)).close()
    assert seen[1] >= size

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="no 10 bytes of memory left"):
        SealedFile(10, lambda _: pytest.fail("there are no pages to fill"))


@pytest.mark.parametrize(
    ("limit", "value", "what"),
    [(resource.RLIMIT_NOFILE, 0, "Too many open files"), (resource.RLIMIT_FSIZE, 4096, "File too large")],
)
def test_a_limit_that_is_not_of_memory_is_named(limit, value, what):
    def child() -> None:
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
        with pytest.raises(StorageError, match=what) as refused:
            SealedFile(4097, bytes)
        assert refused.value.reason == Reason.STORAGE
        assert "ulimit" in refused.value.hint
        assert protection().held == 0

    in_child(child)


def test_no_memory_left_is_an_error_of_the_tree():
    for make in (lambda: Memory(1 << 60), lambda: SealedFile(1 << 62, bytes)):
        with pytest.raises(StorageError) as refused:
            make()
        assert refused.value.reason == Reason.STORAGE
    gc.collect()
    assert protection().held == 0


def test_a_forked_child_wipes_its_own_copy_alone():
    one = Memory(3 * HUGE_PAGE)
    one.view[:] = b"x" * len(one.view)
    child = os.fork()
    if child == 0:
        good = protection().locked == 0 and bytes(one.view[:3]) == b"xxx" and not protection().dumpable
        one.wipe()
        os._exit(0 if good and protection().held == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bytes(one.view) == b"x" * len(one.view)
    assert not protection().dumpable
    one.wipe()


def test_a_fork_while_another_thread_holds_the_lock():
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with memory._guard:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    child = os.fork()
    if child == 0:
        Memory(1).wipe()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    done.set()
    thread.join()


# ---- memory for keys ---------------------------------------------------------------------------------------


def test_keys_lie_where_the_kernel_maps_nothing():
    one = Memory(5000, secret=True)
    lines = Path("/proc/self/maps").read_text().splitlines()
    assert "/secretmem" in next(line for line in lines if f"{one._address:x}-" in line)
    assert flags_of(one._address) >= {"dd", "lo"}
    assert (protection().secret, protection().locked, protection().held) == (5000, 5000, 5000)
    one.view[:] = b"k" * 5000
    one.wipe()
    one.wipe()
    assert not any(bytes(one.view))
    assert protection().secret == protection().held == 0


def test_without_such_memory_keys_lie_in_ordinary_memory(monkeypatch):
    monkeypatch.setattr(memory, "_MEMFD_SECRET", 10_000)  # no kernel knows this one
    one = Memory(5000, secret=True)
    assert (protection().secret, protection().held) == (0, 5000)
    assert flags_of(one._address) >= {"dd", "lo"}
    one.wipe()


def test_a_limit_of_locked_memory_leaves_keys_in_ordinary_memory():
    code = """
import os, resource
from hwlicense.device.memory import Memory, protection
resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))
if os.getuid() == 0: os.setuid(65534)
keys = [Memory(4096, secret=True), Memory(8192, secret=True)]
print(protection().secret, protection().locked, protection().held)
"""
    assert subprocess.check_output([sys.executable, "-c", code]).split() == [b"4096", b"4096", b"12288"]


@pytest.mark.parametrize("secret", [True, False])
def test_neither_a_child_nor_its_parent_wipes_the_others_keys(secret):
    one = Memory(100, secret=secret)
    one.view[:] = b"k" * 100
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reading, 1)  # the parent has wiped its own by now
        own = bytes(one.view) == b"k" * 100 and one.secret == secret and protection().locked == 100 * secret
        one.wipe()
        os._exit(0 if own and not any(bytes(one.view)) else 1)
    second = os.fork()
    if second == 0:
        one.wipe()
        os._exit(0)
    assert os.waitpid(second, 0)[1] == 0
    assert bytes(one.view) == b"k" * 100
    one.wipe()
    os.write(writing, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert protection().held == 0  # nothing is left of the copies either


def test_threads_that_fork_at_once_keep_their_keys():
    one = Memory(64, secret=True)
    one.view[:] = b"k" * 64
    failed: list[int] = []

    def fork() -> None:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                os._exit(0 if bytes(one.view) == b"k" * 64 else 1)
            failed.append(os.waitpid(child, 0)[1])

    threads = [threading.Thread(target=fork) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(failed)
    assert len(failed) == 80
    one.wipe()


def test_core_files_are_switched_off_too():
    code = """
import resource
from hwlicense.device.memory import forbid_dumps
before = resource.getrlimit(resource.RLIMIT_CORE)[1]
forbid_dumps()
print(resource.getrlimit(resource.RLIMIT_CORE) == (0, before))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "True\n"


def test_pages_are_zeroed_before_they_may_be_swapped_out(monkeypatch):
    one, unlocked = Memory(3 * HUGE_PAGE + 1), []
    one.view[:] = b"x" * len(one.view)

    class Libc:
        def munlock(self, address, size):
            start = address - one._address
            unlocked.append((start, any(bytes(one.view[start : start + size]))))

    monkeypatch.setattr(memory, "_libc", Libc())
    one.wipe()
    assert unlocked == [(place * HUGE_PAGE, False) for place in range(4)]
