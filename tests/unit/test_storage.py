"""Files are written whole or not at all, and every failure has its reason."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hwlicense import storage
from hwlicense.core.errors import DamagedError, HwlicenseError, Reason, StorageError, UsageError


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.fixture(params=["unnamed", "hidden"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of making a file: the second is what vfat and NFS get."""
    if request.param == "hidden":
        original = os.open

        def without_tmpfile(path: object, flags: int, *rest: object, **named: object) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "not supported")
            return original(path, flags, *rest, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", without_tmpfile)
    return str(request.param)


@pytest.mark.usefixtures("kind")
def test_a_file_appears_whole_with_its_mode(tmp_path: Path) -> None:
    former = os.umask(0o027)
    try:
        with storage.new_file(tmp_path / "a", 0o644) as file:
            file.write(b"content")
            assert [name for name in names(tmp_path) if not name.startswith(".")] == []
    finally:
        os.umask(former)
    assert (tmp_path / "a").read_bytes() == b"content"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["a"]


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("code", [errno.EIO, errno.EDQUOT])
def test_a_file_whose_folder_cannot_be_synced_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    sync = os.fsync

    def fails_for_folders(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))
        sync(fd)

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fails_for_folders)
            with pytest.raises(StorageError, match=os.strerror(code)):
                storage.atomic_write(tmp_path / "a", b"content", force=False)
        assert names(tmp_path) == []
    storage.atomic_write(tmp_path / "a", b"content", force=False)
    assert names(tmp_path) == ["a"]


@pytest.mark.usefixtures("kind")
def test_an_existing_file_is_kept_unless_forced(tmp_path: Path) -> None:
    storage.atomic_write(tmp_path / "a", b"old")
    with pytest.raises(UsageError) as refused:
        storage.atomic_write(tmp_path / "a", b"new", force=False)
    assert refused.value.reason == Reason.FILE_EXISTS
    assert (tmp_path / "a").read_bytes() == b"old"
    storage.atomic_write(tmp_path / "a", b"new", force=True)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    assert names(tmp_path) == ["a"]


@pytest.mark.usefixtures("kind")
def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused, storage.new_file(tmp_path / "a") as file:  # noqa: PT012
        file.write(b"late")
        (tmp_path / "a").write_bytes(b"early")
    assert refused.value.reason == Reason.FILE_EXISTS
    assert (tmp_path / "a").read_bytes() == b"early"
    assert names(tmp_path) == ["a"]


def test_no_hard_links_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "unnamed":
        return  # a file system without links has no unnamed files either

    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", link)
    storage.atomic_write(tmp_path / "a", b"old", force=False)
    with pytest.raises(UsageError), storage.new_file(tmp_path / "b") as file:  # noqa: PT012
        file.write(b"late")
        (tmp_path / "b").write_bytes(b"early")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old", "b": b"early"}


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, ValueError, MemoryError])
def test_nothing_remains_after_an_interruption(tmp_path: Path, interruption: type[BaseException]) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(interruption), storage.new_file(tmp_path / "a", force=True) as file:  # noqa: PT012
        file.write(bytes(100_000))
        raise interruption
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.usefixtures("kind")
def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(StorageError) as refused:
            storage.atomic_write(tmp_path / "a", bytes(65537))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.reason == Reason.STORAGE
    assert refused.value.hint
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT])
def test_each_failure_has_a_hint(code: int) -> None:
    with pytest.raises(StorageError) as refused, storage.reporting(Path("a")):
        raise OSError(code, os.strerror(code))
    assert refused.value.hint


def test_missing_folder_folder_in_the_way_and_devices(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    cases: list[tuple[Path, type[HwlicenseError], Reason]] = [
        (tmp_path / "absent" / "a", UsageError, Reason.FILE_ABSENT),
        (tmp_path / "folder", UsageError, Reason.USAGE),
        (tmp_path / "fifo", UsageError, Reason.USAGE),
        (Path("/dev/null"), UsageError, Reason.USAGE),
    ]
    for path, kind, reason in cases:
        with pytest.raises(kind) as refused:
            storage.atomic_write(path, b"x")
        assert refused.value.reason == reason
        with pytest.raises(kind) as refused:
            storage.read_limited(path, 10)
        assert refused.value.reason == reason


def test_a_symbolic_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"target")
    (tmp_path / "link").symlink_to("target")
    storage.atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_bytes() == b"target"
    assert not (tmp_path / "link").is_symlink()


def test_reading_within_a_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    assert storage.read_limited(tmp_path / "a", 10) == b"0123456789"
    with pytest.raises(DamagedError) as refused:
        storage.read_limited(tmp_path / "a", 9)
    assert refused.value.reason == Reason.DOCUMENT_TOO_LARGE
    with pytest.raises(UsageError) as absent:
        storage.read_limited(tmp_path / "b", 9)
    assert absent.value.reason == Reason.FILE_ABSENT
    with storage.OpenFile(tmp_path / "a") as file:
        assert (file.size, file.read(4, 3), file.read(9, 8), file.read(1, 10)) == (10, b"3456", b"89", b"")


def test_sigkill_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old" * 10)
    code = (
        "import sys, pathlib; from hwlicense import storage; print(flush=True)\n"
        "while True: storage.atomic_write(pathlib.Path(sys.argv[1]), b'new' * 400_000)"
    )
    for round_ in range(8):
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")], stdout=subprocess.PIPE)
        assert child.stdout
        child.stdout.readline()
        time.sleep(0.003 * round_)
        child.kill()
        child.wait()
        child.stdout.close()
        assert (tmp_path / "a").read_bytes() in (b"old" * 10, b"new" * 400_000)
    left = [name for name in names(tmp_path) if name != "a"]
    assert all(name.startswith(".a.") for name in left)  # the instant between link and rename


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with storage.new_folder(tmp_path / "a") as building:
        (building / "keys").mkdir()
        storage.atomic_write(building / "keys" / "k", b"key")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "keys" / "k").read_bytes() == b"key"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    with pytest.raises(UsageError) as refused, storage.new_folder(tmp_path / "a"):
        pytest.fail("not reached")
    assert refused.value.reason == Reason.FILE_EXISTS
    with pytest.raises(KeyboardInterrupt), storage.new_folder(tmp_path / "b") as building:  # noqa: PT012
        (building / "x").write_bytes(b"x")
        raise KeyboardInterrupt
    with storage.new_folder(tmp_path / "c" / "d"):
        pass
    (tmp_path / "empty").mkdir()
    with storage.new_folder(tmp_path / "empty"):
        pass
    assert sorted(names(tmp_path)) == ["a", "c", "empty"]


def test_what_is_in_the_way_of_a_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("used")
    for path in (tmp_path / "used", tmp_path / "file", tmp_path / "link"):
        with pytest.raises(UsageError) as refused, storage.new_folder(path):
            pytest.fail("not reached")
        assert refused.value.reason == Reason.FILE_EXISTS
        assert refused.value.hint == "Give another folder, or remove what is in it."
    with pytest.raises(UsageError) as refused, storage.new_folder(tmp_path / "late"):
        (tmp_path / "late" / "file").mkdir(parents=True)
    assert refused.value.reason == Reason.FILE_EXISTS
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for path in (Path(), Path("..", "below"), tmp_path / "here" / "below"):
        with pytest.raises(UsageError, match="is the current folder") as refused, storage.new_folder(path):
            pytest.fail("not reached")
        assert refused.value.reason == Reason.USAGE
        assert "'below'" in refused.value.hint
    with storage.new_folder(Path("..", "beside")) as building:
        (building / "x").touch()
    assert names(tmp_path / "here" / "beside") == ["x"]
    assert sorted(names(tmp_path / "here")) == ["below", "beside"]


def test_a_mount_point_cannot_become_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(UsageError, match="something is mounted there") as refused:  # noqa: SIM117
        with storage.new_folder(tmp_path / "mounted") as building:
            (building / "x").touch()
    assert refused.value.reason == Reason.USAGE
    assert names(tmp_path) == ["mounted"]


def test_a_file_system_that_locks_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # as NFS does

    with storage.exclusive(tmp_path), pytest.raises(OSError, match="own") as passed:
        raise OSError("the block's own")
    assert type(passed.value) is OSError
    monkeypatch.setattr(fcntl, "flock", refuse)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(StorageError, match="cannot be locked") as refused, storage.exclusive(tmp_path):
        pytest.fail("not reached")
    assert "local disk" in refused.value.hint
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_folders_and_removal(tmp_path: Path) -> None:
    storage.make_folders(tmp_path / "a" / "b", 0o700)
    storage.make_folders(tmp_path / "a" / "b", 0o700)
    assert [folder.stat().st_mode & 0o777 for folder in (tmp_path / "a", tmp_path / "a" / "b")] == [0o700, 0o700]
    storage.atomic_write(tmp_path / "a" / "file", b"")
    for path in (tmp_path / "a" / "file", tmp_path / "a" / "file" / "below"):
        with pytest.raises(UsageError) as refused:
            storage.make_folders(path)
        assert refused.value.reason == Reason.USAGE
    storage.remove(tmp_path / "a" / "file")
    storage.remove(tmp_path / "a" / "file")
    assert names(tmp_path / "a") == ["b"]


def test_a_lock_ends_with_its_block_also_for_a_child_forked_meanwhile(tmp_path):
    with storage.exclusive(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
    try:
        with storage.exclusive(tmp_path, 1):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lock_that_is_not_to_be_had_is_waited_for_so_long(tmp_path):
    with storage.exclusive(tmp_path), pytest.raises(StorageError) as caught, storage.exclusive(tmp_path, 0.1):
        pass
    assert "0.1 s" in caught.value.what
