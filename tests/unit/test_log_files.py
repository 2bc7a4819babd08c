"""The files of a recording on disks that fail: what was not brought to the disk is never called durable."""

import errno
import os

import pytest

from hwlicense import storage
from hwlicense.core.chain import Link
from hwlicense.core.errors import StorageError
from hwlicense.device import log_files
from hwlicense.device.log_files import LogFiles, path_of


class Disk:
    """fdatasync(2) as Linux does it: where it fails, what it should have written is lost, and it says so once."""

    def __init__(self, monkeypatch) -> None:
        self.calls, self.failing, self._safe = 0, 0, dict[int, int]()
        self._sync = os.fdatasync
        monkeypatch.setattr("hwlicense.device.log_files.os.fdatasync", self)

    def __call__(self, fd):
        self.calls += 1
        status = os.fstat(fd)
        if self.failing:
            self.failing -= 1
            os.ftruncate(fd, self._safe.get(status.st_ino, len(FIRST) + 1))
            raise OSError(errno.EIO, "Input/output error")
        self._sync(fd)
        self._safe[status.st_ino] = status.st_size


class Broken:
    def __call__(self, _folder):
        raise OSError(errno.EIO, "Input/output error")


FIRST = b"line 0"


def made(numbers, *, parts=(), signed=()):
    """Links as a chain makes them, with lines that say their place."""
    links, closed = [], 0
    for number in numbers:
        closed = number + 1 if number in signed else closed
        part = parts.index(number) + 1 if number in parts else 0
        line = b"line %d" % number
        links.append(Link(line, part, number + 1, b"", 7 * (number + 1), closed, None))
    return links


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def begun(folder, sync):
    files = LogFiles(folder, 1, sync)
    files.links += made([0], parts=[0], signed=[0])
    files.write()
    return files


def lines(folder, part=1):
    return path_of(folder, 1, part).read_bytes().splitlines()


@pytest.mark.parametrize(("sync", "calls", "durable"), [("never", 0, 6), ("checkpoint", 1, 5), ("always", 3, 6)])
def test_files_are_brought_to_the_disk_as_often_as_was_asked(tmp_path, disk, sync, calls, durable):
    files = begun(tmp_path, sync)
    for links in (made([1, 2]), made([3, 4], signed=[4]), made([5])):
        files.links += links
        files.write()
    assert (disk.calls, files.number, files.durable) == (calls, 6, durable)
    assert files.total == 42
    files.close()


@pytest.mark.parametrize("sync", ["checkpoint", "always"])
def test_what_a_failed_disk_may_have_lost_is_written_again(tmp_path, disk, sync):
    files = begun(tmp_path, sync)
    files.links += made([1])
    files.write()
    safe, disk.failing = files.durable, 2
    files.links += made([2, 3], signed=[3])
    for _ in range(2):
        with pytest.raises(StorageError, match="Input/output"):
            files.write()
        assert (files.number, files.durable, files.total) == (safe, safe, 7 * safe)
    files.write()
    assert (files.number, files.durable, files.total, files.links) == (4, 4, 28, [])
    assert lines(tmp_path) == [b"line %d" % number for number in range(4)]
    files.close()


def test_a_part_begins_when_the_one_before_is_on_the_disk(tmp_path, disk):
    files, disk.failing = begun(tmp_path, "checkpoint"), 1
    files.links += made([1, 2, 3, 4], parts=[0, 3], signed=[4])
    with pytest.raises(StorageError):
        files.write()
    assert files.durable == 1
    assert not path_of(tmp_path, 1, 2).exists()
    files.write()
    assert (files.durable, files.number) == (5, 5)
    assert lines(tmp_path) == [b"line 0", b"line 1", b"line 2"]
    assert lines(tmp_path, 2) == [b"line 3", b"line 4"]
    files.close()


def test_a_part_whose_folder_cannot_be_synced_begins_when_it_can(tmp_path, monkeypatch):
    files = begun(tmp_path, "checkpoint")
    files.links += made([1, 2], parts=[0, 1], signed=[2])
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_sync", Broken())
        for _ in range(2):
            with pytest.raises(StorageError, match="Input/output"):
                files.write()
    assert files.durable == 1
    files.write()
    assert (files.durable, lines(tmp_path, 2)) == (3, [b"line 1", b"line 2"])
    files.close()


def test_without_a_disk_asked_for_a_part_does_not_wait_for_one(tmp_path, disk):
    files, disk.failing = begun(tmp_path, "never"), 1
    files.links += made([1, 2, 3], parts=[0, 2])
    files.write()
    assert (files.durable, disk.calls) == (4, 0)
    files.close()


def test_what_is_kept_to_be_written_again_is_bounded(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(log_files, "_HELD", 70)
    files = begun(tmp_path, "checkpoint")
    for number in range(1, 100):
        files.links += made([number])
        files.write()
        assert len(files.links) <= 10
    assert disk.calls == 10
    files.close()
