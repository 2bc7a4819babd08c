"""What collectors, crashes, full disks and kills find: no plaintext in core dumps, no half-written package."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hwlicense.core import package
from hwlicense.core.errors import Reason, StorageError
from hwlicense.core.schema import encode
from hwlicense.core.secret import Secret
from tests.packages import decrypt, opened, pack

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
MARKER = b"PLAINTEXT-OF-THE-MODEL/"
CONTENT = b"".join(MARKER + b"%09d" % i for i in range(20_000))

PROTECTED = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
from hwlicense.core.documents import VendorPublic
from hwlicense.core.keys import Content
from hwlicense.core.schema import decode
from hwlicense.core.secret import Secret
from hwlicense.device.model import Model
from hwlicense.device.reading import PackageFile
vendor = decode(Path("vendor.json").read_bytes(), VendorPublic)
key = Secret(bytearray(32))
with open(0, "rb", buffering=0) as stdin: stdin.readinto(key.buffer)
model = Model(PackageFile(Path("model.hwpkg"), vendor), Content(key, Secret(bytearray())))
key.wipe()
held = model.read("weights"), model.path("weights"), model.open("weights")
held[2].readinto(memoryview(bytearray(1)))
print("ready", flush=True)
"""
UNPROTECTED = """
held = open("files/weights", "rb").read()
print("ready", flush=True)
"""
CLOSED = """
import mmap
with open(held[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)  # as a framework keeps it
copy = bytes(held[0])
del held
model.close()
"""
WAIT = "import time; time.sleep(60)"
CRASH = "import os, resource; resource.setrlimit(resource.RLIMIT_CORE, (-1, -1)); os.abort()"


@pytest.fixture
def secrets(vendor, tmp_path) -> dict[str, bytes]:
    """A package in `tmp_path`, and what must not be found: plaintext, content key, chunk keys."""
    out, key, manifest = pack(vendor, tmp_path, {"weights": CONTENT}, chunk_size=4096)
    (tmp_path / "vendor.json").write_bytes(encode(vendor.public))
    raw, count = out.read_bytes(), len(manifest.members[0].digests) // 32
    start = 16 + int.from_bytes(raw[8:16], "little")
    keys = Secret(bytearray(count * 32))
    package.open_table_into(key, raw[start : start + count * 32 + 16], keys.buffer)
    table = bytes(keys.buffer)
    return {
        "plaintext": MARKER,
        "content key": bytes(key.buffer),
        **{f"chunk key {i}": table[i * 32 : i * 32 + 32] for i in range(count)},
    }


def start(code: str, folder: Path, key: bytes) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdin
    child.stdin.write(key)
    child.stdin.close()
    child.stdin = None
    return child


def found(core: Path, secrets: dict[str, bytes]) -> list[str]:
    raw = core.read_bytes()
    return [what for what, secret in secrets.items() if secret in raw]


def collect(code: str, folder: Path, secrets: dict[str, bytes]) -> list[str] | None:
    """What a crash collector (gdb's gcore) finds in the process; nothing at all where it may not attach."""
    with start(code + WAIT, folder, secrets["content key"]) as child:
        assert child.stdout
        assert child.stdout.readline() == b"ready\n"
        done = subprocess.run(
            ["gcore", "-o", "dump", str(child.pid)], cwd=folder, capture_output=True, text=True, check=False
        )
        child.kill()
    core = folder / f"dump.{child.pid}"
    if not core.exists():
        assert "ptrace" in done.stdout + done.stderr
        return None
    return found(core, secrets)


def test_a_collector_finds_nothing(secrets, tmp_path):
    assert collect(UNPROTECTED, tmp_path, secrets) == ["plaintext"]  # the control: it does look everywhere
    seen = collect(PROTECTED.format(root=str(ROOT)), tmp_path, secrets)
    assert seen == ([] if os.getuid() == 0 else None)  # others may not even attach


def test_a_crash_leaves_no_core(secrets, tmp_path):
    """The kernel says whether it dumped core, wherever core_pattern sends it. Copies outlive the model."""
    dumped = {}
    protected = PROTECTED.format(root=str(ROOT))
    for what, code in (("control", UNPROTECTED), ("protected", protected), ("closed", protected + CLOSED)):
        with start(code + CRASH, tmp_path, secrets["content key"]) as child:
            status = os.waitpid(child.pid, 0)[1]
            assert os.WIFSIGNALED(status)
            assert os.WTERMSIG(status) == signal.SIGABRT
            dumped[what] = os.WCOREDUMP(status)
            child.returncode = -signal.SIGABRT
    assert dumped == {"control": True, "protected": False, "closed": False}
    for core in tmp_path.glob("core*"):  # the control's alone, where core_pattern keeps it here
        assert found(core, secrets) == ["plaintext"]


PACKER = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
from hwlicense.core.documents import VendorPublic
from hwlicense.core.keys import Content
from hwlicense.vendor import packing, signing
made = signing.generate("ed25519")
public = signing.public_part("Acme", made)
keys = signing.assembled(made, public)
print("ready", flush=True)
packing.pack(packing.sources([Path("in")]), Path("out", "m.hwpkg"), name="n", version="1", vendor=public, keys=keys,
             chunk_size=65536, force=True)
"""


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_while_packing(vendor, tmp_path, blow):
    """At random moments: the old package is whole, or the new one, and nothing else lies about."""
    good, key, _ = pack(vendor, tmp_path, {"a": b"old"}, chunk_size=4096)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(os.urandom(8 << 20))
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "m.hwpkg"
    out.write_bytes(good.read_bytes())
    drawn, old = random.Random(4), 0
    for _ in range(12):
        before = out.read_bytes()
        with start(PACKER.format(root=str(ROOT)), tmp_path, b"") as child:
            assert child.stdout
            assert child.stdout.readline() == b"ready\n"
            time.sleep(drawn.random() * 0.08)
            child.send_signal(blow)
            child.communicate()
        after = out.read_bytes()
        old += before == after
        assert after == before or len(after) > 8 << 20
        names = [path.name for path in out.parent.iterdir() if path.name != out.name]
        killed = blow in (signal.SIGKILL, signal.SIGTERM)  # neither lets the process tidy up
        assert names == [] or (killed and all(name.startswith(".m.hwpkg.") for name in names))
        for name in names:
            (out.parent / name).unlink()
    assert old
    assert decrypt(good.read_bytes(), bytes(key.buffer)) == {"a": b"old"}


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1 MiB where the tests may mount one; else a limit on the size of files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode == 0:
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        yield folder
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk(vendor, tmp_path, small_disk):
    (tmp_path / "large").write_bytes(os.urandom(1 << 20))
    (tmp_path / "small").write_bytes(b"small")
    out = small_disk / "m.hwpkg"
    vendor.pack(out, tmp_path / "small")
    before = out.read_bytes()
    for target in (out, small_disk / "other.hwpkg"):
        with pytest.raises(StorageError) as refused:
            vendor.pack(target, tmp_path / "large", force=True)
        assert refused.value.reason == Reason.STORAGE
        assert refused.value.hint
        assert [path.name for path in small_disk.iterdir()] == ["m.hwpkg"]
        assert out.read_bytes() == before
    vendor.pack(small_disk / "other.hwpkg", tmp_path / "small")  # what failed has given its space back


def test_nothing_decrypted_touches_the_disk(vendor, secrets, tmp_path):
    """Every file that reading opens for writing, seen by strace: none."""
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-o", str(trace), "-e", "trace=open,openat,creat,rename,link,linkat,unlink,mkdir"]
    code = PROTECTED.format(root=str(ROOT))
    subprocess.run(
        [*command, sys.executable, "-B", "-c", code], cwd=tmp_path, input=secrets["content key"], check=True, timeout=60
    )
    calls = trace.read_text().splitlines()
    assert any("model.hwpkg" in call for call in calls)
    writing = [
        call for call in calls if any(flag in call for flag in ("O_WRONLY", "O_RDWR", "O_CREAT", "rename", "link"))
    ]
    assert [call for call in writing if "readlink" not in call] == []
    with opened(vendor, tmp_path / "model.hwpkg", Secret(bytearray(secrets["content key"]))) as model:
        assert bytes(model.read("weights")) == CONTENT
