"""Packing: what goes in, under which name, and what happens when something is in the way."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tracemalloc
from collections import defaultdict
from pathlib import Path

import pytest

from hwlicense import storage, threads
from hwlicense.core import package
from hwlicense.core.errors import HwlicenseError, Reason, StorageError, UsageError
from hwlicense.vendor import packing
from tests.packages import content_key, decrypt, in_child, ordinary_user, pack, reachable


def tree(folder: Path, members: dict[str, bytes]) -> Path:
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def names(*inputs: Path) -> list[str]:
    return [source.name for source in packing.sources(inputs)]


def test_folders_give_relative_names_and_files_their_own_in_one_order(tmp_path):
    tree(tmp_path / "in", {"b/deep/x": b"", "a": b"", ".hidden": b"", "b.txt": b""})
    tree(tmp_path, {"single": b""})
    expected = sorted([".hidden", "a", "b.txt", "b/deep/x", "single"])
    assert names(tmp_path / "in", tmp_path / "single") == expected
    assert names(tmp_path / "single", tmp_path / "in") == expected


def test_a_relative_folder_and_the_working_folder(tmp_path, monkeypatch):
    tree(tmp_path / "in", {"a": b"", "b/c": b""})
    monkeypatch.chdir(tmp_path / "in")
    assert names(Path()) == names(Path("../in")) == ["a", "b/c"]


def test_links_inside_are_followed_and_links_outside_refused(tmp_path):
    tree(tmp_path, {"in/a": b"content", "outside": b"secret"})
    (tmp_path / "in" / "b").symlink_to("a")
    assert [source.size for source in packing.sources([tmp_path / "in"])] == [7, 7]
    (tmp_path / "whole").symlink_to("in")
    assert names(tmp_path / "whole") == ["a", "b"]
    (tmp_path / "file").symlink_to("outside")
    assert names(tmp_path / "file") == ["file"]  # named by the user, not found
    (tmp_path / "in" / "c").symlink_to("c")
    with pytest.raises(StorageError):
        names(tmp_path / "in")
    (tmp_path / "in" / "c").unlink()
    for target in ("../outside", "/etc/passwd", "..", "."):
        (tmp_path / "in" / "c").symlink_to(target)
        with pytest.raises(UsageError) as refused:
            names(tmp_path / "in")
        assert refused.value.reason == Reason.USAGE
        (tmp_path / "in" / "c").unlink()
    (tmp_path / "in" / "c").symlink_to("absent")
    with pytest.raises(UsageError) as absent:
        names(tmp_path / "in")
    assert absent.value.reason == Reason.FILE_ABSENT


def test_what_is_no_file_is_refused(tmp_path):
    tree(tmp_path, {"in/a": b""})
    os.mkfifo(tmp_path / "in" / "fifo")
    with pytest.raises(UsageError) as refused:
        names(tmp_path / "in")
    assert refused.value.reason == Reason.USAGE
    (tmp_path / "in" / "fifo").unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "in" / "s"))
        with pytest.raises(HwlicenseError):
            names(tmp_path / "in")
    for path, reason in ((tmp_path / "absent", Reason.FILE_ABSENT), (Path("/dev/null"), Reason.USAGE)):
        with pytest.raises(UsageError) as given:
            names(path)
        assert given.value.reason == reason
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError) as nothing:
        names(tmp_path / "empty")
    assert nothing.value.reason == Reason.USAGE


@pytest.mark.parametrize("members", [["A", "a"], ["x\ny"], [b"\xff".decode(errors="surrogateescape")], ["a\\b"]])
def test_names_that_no_package_holds(tmp_path, members):
    tree(tmp_path / "in", dict.fromkeys(members, b""))
    with pytest.raises(UsageError) as refused:
        names(tmp_path / "in")
    assert refused.value.reason == Reason.MEMBER_NAME


def test_one_file_given_twice(tmp_path):
    tree(tmp_path, {"a": b""})
    with pytest.raises(UsageError) as refused:
        names(tmp_path / "a", tmp_path / "a")
    assert refused.value.reason == Reason.MEMBER_NAME


@pytest.mark.parametrize(
    ("size", "chunk_size"), [(0, 1), (2 << 30, 1), (2**31 + 1, 2), (4 << 30, 2), (16 << 30, 8), (1 << 40, 8)]
)
def test_large_packages_have_larger_chunks(size, chunk_size):
    assert packing.chunk_size_for(size) == chunk_size << 20


def test_progress_counts_every_byte_once(vendor, tmp_path):
    tree(tmp_path / "in", {"a": bytes(10_001), "b": b"", "c": b"x"})
    seen: list[int] = []
    vendor.pack(tmp_path / "out", tmp_path / "in", chunk_size=4096, progress=seen.append)
    assert sum(seen) == sum(source.size for source in packing.sources([tmp_path / "in"])) == 10_002


@pytest.mark.parametrize(
    "options", [{"chunk_size": 4095}, {"chunk_size": 1 << 27}, {"name": ""}, {"version": "x" * 201}]
)
def test_what_a_package_cannot_be(vendor, tmp_path, options):
    tree(tmp_path / "in", {"a": b""})
    with pytest.raises(UsageError) as refused:
        vendor.pack(tmp_path / "out", tmp_path / "in", **options)
    assert refused.value.reason == Reason.USAGE
    assert not (tmp_path / "out").exists()


def test_too_many_chunks_are_refused_before_any_is_made(vendor, tmp_path):
    with (tmp_path / "big").open("wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(UsageError, match="too many chunks"):
        vendor.pack(tmp_path / "out", tmp_path / "big", chunk_size=4096, progress=lambda size: pytest.fail(str(size)))
    assert not (tmp_path / "out").exists()


def test_an_existing_package_is_kept_unless_forced(vendor, tmp_path):
    out, _, _ = pack(vendor, tmp_path, {"a": b"first"})
    raw = out.read_bytes()
    with pytest.raises(UsageError) as refused:
        vendor.pack(out, tmp_path / "files")
    assert refused.value.reason == Reason.FILE_EXISTS
    assert out.read_bytes() == raw
    manifest = vendor.pack(out, tmp_path / "files", force=True)
    assert decrypt(out.read_bytes(), bytes(content_key(vendor, manifest).buffer)) == {"a": b"first"}
    assert packing.read_manifest(out, vendor.public) == manifest


def test_a_package_is_not_packed_into_itself(vendor, tmp_path):
    tree(tmp_path / "in", {"a": b"", "out": b"old"})
    with pytest.raises(UsageError) as refused:
        vendor.pack(tmp_path / "in" / "out", tmp_path / "in", force=True)
    assert refused.value.reason == Reason.USAGE
    assert (tmp_path / "in" / "out").read_bytes() == b"old"


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def rewrite(path: Path) -> None:
    """Same size, same time, other bytes: only the second pass's digest can tell."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(12_000)
        file.write(b"CHANGED")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path: Path) -> None:
    path.with_name("other").write_bytes(path.read_bytes())
    path.with_name("other").rename(path)


def shorten(path: Path) -> None:
    os.truncate(path, 5000)


@pytest.mark.parametrize(
    ("change", "moment"),  # after so many of ten chunks, five in each pass
    [(change, moment) for change in (append, shorten) for moment in (1, 5, 9)]
    + [(change, moment) for change in (replace, Path.unlink) for moment in (1, 5)]
    + [(rewrite, 5)],
)
def test_an_input_that_changes_meanwhile(vendor, tmp_path, change, moment):
    tree(tmp_path / "in", {"a": bytes(20_000)})
    seen: list[int] = []

    def progress(size: int) -> None:
        seen.append(size)
        if len(seen) == moment:
            change(tmp_path / "in" / "a")

    with pytest.raises((StorageError, UsageError)) as refused:
        vendor.pack(tmp_path / "out", tmp_path / "in", chunk_size=4096, progress=progress)
    assert refused.value.reason == (Reason.FILE_ABSENT if change is Path.unlink else Reason.STORAGE)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_input_without_permission(tmp_path):
    """As an ordinary user, in a child: root reads everything."""
    tree(tmp_path / "in", {"a": b""})
    (tmp_path / "in" / "a").chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    reachable(tmp_path)

    def child() -> None:
        ordinary_user()
        for given in (tmp_path / "in", tmp_path / "in" / "a", tmp_path / "closed" / "x", tmp_path / "closed"):
            with pytest.raises(StorageError) as refused:
                packing.sources([given])
            assert refused.value.hint

    in_child(child)


def test_memory_stays_bounded(vendor, tmp_path):
    with (tmp_path / "big").open("wb") as file:
        file.truncate(64 << 20)
    tracemalloc.start()
    vendor.pack(tmp_path / "out", tmp_path / "big")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * threads.THREADS + 2 << 20
    assert (tmp_path / "out").stat().st_size > 64 << 20


def test_no_plaintext_reaches_the_disk(tmp_path):
    """Every write of the process, seen by strace."""
    marker = b"MARKER-OF-THE-PLAINTEXT-" * 400
    tree(tmp_path / "in", {"a": marker})
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from hwlicense.vendor import packing, signing
made = signing.generate("ed25519")
public = signing.public_part("Acme", made)
keys = signing.assembled(made, public)
packing.pack(packing.sources([Path("in")]), Path("out"), name="n", version="1", vendor=public, keys=keys,
             chunk_size=4096)
"""
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-xx", "-s", "20000", "-o", str(trace), "-e"]
    calls = "trace=write,pwrite64,writev,pwritev,pwritev2,sendfile,copy_file_range,splice,openat,open,creat,mmap,fsync"
    subprocess.run([*command, calls, sys.executable, "-c", code], cwd=tmp_path, check=True)
    seen = trace.read_text()
    assert "".join(f"\\x{byte:02x}" for byte in b"hwpkg\0") in seen  # what is written is seen
    assert "".join(f"\\x{byte:02x}" for byte in marker[:16]) not in seen
    assert "O_TMPFILE" in seen
    assert seen.count("fsync(") >= 2


def test_a_key_never_has_two_ciphertexts_on_the_disk(vendor, tmp_path, monkeypatch):
    """Nor has any other but that of the first pass: what changed meanwhile is encrypted in memory alone."""
    made, written = defaultdict(set), []
    seals, writes = package.seal_chunk_into, storage.write_at

    def seal(key, plain, out, *, last: bool) -> None:
        seals(key, plain, out, last=last)
        made[bytes(key)].add(bytes(out))

    def write(fd: int, data: memoryview, offset: int) -> None:
        written.append(bytes(data))
        writes(fd, data, offset)

    monkeypatch.setattr(package, "seal_chunk_into", seal)
    monkeypatch.setattr(packing, "write_at", write)
    monkeypatch.setattr(threads, "THREADED", 1)
    tree(tmp_path / "in", {"a": bytes(20 * 4096)})
    seen: list[int] = []

    def progress(_size: int) -> None:
        seen.append(1)
        if len(seen) == 20:  # between the passes
            rewrite(tmp_path / "in" / "a")

    with pytest.raises(StorageError):
        vendor.pack(tmp_path / "out", tmp_path / "in", chunk_size=4096, progress=progress)
    twice = [sealed for sealed in made.values() if len(sealed) > 1]
    assert len(twice) == 1
    assert len(made) == 20
    assert not twice[0] & set(written)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
