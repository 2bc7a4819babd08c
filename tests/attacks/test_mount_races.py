"""The folder of `exec --at`, exchanged meanwhile: what is decrypted lies in the memory that was mounted, or nowhere."""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from hwlicense.core.errors import HwlicenseError
from hwlicense.device import namespaces
from hwlicense.device.executing import Program
from hwlicense.device.keeping import Mount
from hwlicense.device.tree import Tree
from tests.forging import as_root
from tests.programs import until

MARKER = b"a marker that is in the model" * 100
STARTS = 40

EXCHANGING = """
import ctypes, os, sys
from pathlib import Path
exchange, (one, other, begun) = ctypes.CDLL(None).renameat2, (os.fsencode(path) for path in sys.argv[1:])
assert not exchange(-100, one, -100, other, 2)
Path(os.fsdecode(begun)).touch()
while True:
    exchange(-100, one, -100, other, 2)
"""


class Model:
    """What a program is given of one."""

    names = ("folder/weights.bin",)

    def size(self, _name):
        return len(MARKER)

    def readinto(self, _name, view):
        view[:] = MARKER


@pytest.fixture
def disk(tmp_path):
    """A folder that is not in memory."""
    for above in (tmp_path, "/var/tmp", "."):  # noqa: S108  # the folder made there is one's own
        found = Path(tempfile.mkdtemp(dir=above)).resolve()
        if not in_memory(found):
            yield found
            shutil.rmtree(found)
            return
        found.rmdir()
    pytest.fail("no folder on a disk")


@pytest.fixture
def memory():
    """A folder that is in memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as found:  # the folder made there is one's own
        assert in_memory(found)
        yield Path(found)


def in_memory(path):
    fd = os.open(path, os.O_PATH)
    try:
        return namespaces.in_memory(fd)
    finally:
        os.close(fd)


def mount(path):
    return Mount(path, 1 << 20, 64, executable=False)


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "begun"]


@contextmanager
def exchanged(one, other, begun):
    words = [sys.executable, "-c", EXCHANGING, *map(str, (one, other, begun))]
    with subprocess.Popen(words) as process:
        try:
            until(begun.exists)
            yield
            assert process.poll() is None
        finally:
            process.kill()


@pytest.mark.parametrize("what", ["link", "folder"])
def test_a_folder_that_is_exchanged_meanwhile(disk, what):
    at, other, elsewhere = disk / "at", disk / "other", disk / "elsewhere"
    for folder in (at, elsewhere):
        folder.mkdir(mode=0o700)
    other.symlink_to(elsewhere) if what == "link" else other.mkdir(mode=0o700)
    placed, refused = 0, set()
    with exchanged(at, other, disk / "begun"):
        for _ in range(STARTS):
            try:
                with Tree(["true"], mount(at)) as tree:
                    assert namespaces.in_memory(tree.folder)
                    Program(Model(), tree)  # type: ignore[arg-type]
                    placed += 1
            except HwlicenseError as error:
                refused.add(str(error.reason))
            assert files(disk) == []
    assert refused == {"FILE_ABSENT"}  # it came between, and what it led to was not taken
    assert placed


# ---- each check by itself: the others would take what comes in the place of the folder


def substituted(monkeypatch, path, substitute):
    """Have `path` lead to another folder as soon as the memory is mounted."""
    mounted = namespaces.mount_memory

    def mount_memory(folder, size, count, *, executable):
        done = mounted(folder, size, count, executable=executable)
        path.parent.rename(path.parent.with_name("away"))
        path.parent.symlink_to(substitute.parent)
        return done

    monkeypatch.setattr(namespaces, "mount_memory", mount_memory)


def folder(above, name="at", mode=0o700):
    path = above / name / "at"
    path.mkdir(parents=True)
    path.chmod(mode)
    return path


def refused(path):
    with pytest.raises(HwlicenseError) as caught, Tree(["true"], mount(path)):
        pass
    assert caught.value.reason == "FILE_ABSENT"
    assert caught.value.hint == "Give an empty folder as --at."


def test_the_folder_that_was_covered(monkeypatch, memory):
    """Or one beside it: in memory, one's own, and on the same device."""
    path = folder(memory)
    substituted(monkeypatch, path, folder(memory, "other"))
    refused(path)


def test_a_folder_on_a_disk(monkeypatch, memory, disk):
    path = folder(memory)
    substituted(monkeypatch, path, folder(disk))
    refused(path)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o1777])
def test_a_folder_in_memory_that_others_may_enter(monkeypatch, memory, disk, mode):
    path = folder(disk)
    substituted(monkeypatch, path, folder(memory, mode=mode))
    refused(path)


def test_a_folder_in_memory_of_another_user(monkeypatch, memory, disk):
    path, other = folder(disk), folder(memory)
    if as_root():
        os.chown(other, 65534, 65534)
    else:
        other.chmod(0o755)  # nobody else's can be opened
    substituted(monkeypatch, path, other)
    refused(path)


def test_a_link_in_the_folders_place(monkeypatch, disk):
    path, beside = folder(disk), folder(disk, "other")
    (beside.parent / "at").rename(beside.parent / "real")
    (beside.parent / "at").symlink_to("real")
    substituted(monkeypatch, path, beside)
    refused(path)


def test_what_was_mounted_is_taken(disk):
    path = folder(disk)
    with Tree(["true"], mount(path)) as tree:
        assert namespaces.in_memory(tree.folder)
        assert os.fstat(tree.folder).st_dev != path.stat().st_dev
