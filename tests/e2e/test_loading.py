"""Loading under bad conditions: failing disks, little memory, no huge pages. An error of ours or the model, no crash.

strace(1) makes the kernel's calls fail or wait, in processes that are otherwise as they are.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import pytest

from hwlicense.core.errors import DamagedError, Reason
from hwlicense.device.reading import PackageFile
from tests.packages import in_child, opened, pack
from tests.world import PROGRAM, WITH_PCRS, licensed

SIZE = (24 << 20) + 17
CONTENT = random.Random(0).randbytes(SIZE)
READ = """
import hashlib, resource, sys
import hwlicense
from hwlicense.device.memory import protection
try:
    with hwlicense.open(sys.argv[1], vendor=sys.argv[2], home=sys.argv[3]) as model:
        if sys.argv[4] == "little more than now":
            used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
            resource.setrlimit(resource.RLIMIT_AS, (used + (12 << 20),) * 2)
        elif sys.argv[4]:
            resource.setrlimit(getattr(resource, sys.argv[4]), (0, 0))
        for how in (model.read, lambda name: open(model.path(name), "rb").read(), lambda name: model.open(name)):
            try:
                got = how("weights")
                digest = hashlib.sha256()
                if hasattr(got, "read"):
                    while piece := got.read(1 << 20):
                        digest.update(piece)
                else:
                    digest.update(got)
                print(digest.hexdigest(), protection().locked == protection().held)
                del got
            except hwlicense.HwlicenseError as error:
                print(error.reason, error.hint)
except hwlicense.HwlicenseError as error:
    print(error.reason, error.hint)
"""


class Shop:
    """A licensed package of one large member."""

    def __init__(self, vendor, device, folder):
        self.vendor, self.device = vendor, device
        (folder / "weights").write_bytes(CONTENT)
        vendor.package = folder / "large.hwpkg"
        vendor.manifest = vendor.pack(vendor.package, folder / "weights")
        licensed(vendor, device, WITH_PCRS)
        device.home.keep_enrolled(device.tpm.tcti, "sha256:0,7")

    def check(self, *before, status):
        return self._run([*before, PROGRAM, "device", "check", "--open", "--home", self.home, self.package], status)

    def read(self, *before, limit=""):
        """What reading in three ways came to."""
        given = [self.package, self.vendor.text, self.home, limit]
        return self._run([*before, sys.executable, "-c", READ, *given], 0).stdout.splitlines()

    @property
    def home(self):
        return self.device.home.path

    @property
    def package(self):
        return self.vendor.package

    def _run(self, words, status):
        done = subprocess.run([*map(str, words)], check=False, capture_output=True, text=True, timeout=120)
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done


@pytest.fixture
def shop(own_vendor, device, tmp_path):
    return Shop(own_vendor, device, tmp_path)


def failing(how, shop):
    """strace that has reading the package go wrong as `how` says."""
    call = "preadv,preadv2"
    trace = ("strace", "-f", "-qq", "-o", "/dev/null", "-P", shop.package)
    return *trace, "-e", f"trace={call}", "-e", f"inject={call}:{how}"


def whole():
    from hashlib import sha256  # noqa: PLC0415

    return sha256(CONTENT).hexdigest()


@pytest.mark.parametrize("when", [1, 3, 15, 24], ids=lambda when: f"read {when}")
def test_a_disk_that_fails_in_the_middle(shop, when):
    failed = shop.check(*failing(f"error=EIO:when={when}+", shop), status=5)
    assert "Input/output error" in failed.stderr
    assert "hint: The disk failed: look at the kernel's log, and restore the file from a copy." in failed.stderr


def test_a_disk_that_stalls_and_one_that_gives_little_at_a_time(shop):
    started = time.monotonic()
    shop.check(*failing("delay_enter=1500000:when=12", shop), status=0)
    assert time.monotonic() - started > 1.5
    assert shop.check(*failing("error=EINTR:when=7", shop), status=0).stdout  # a signal in the middle


def test_a_disk_where_the_file_ends_in_the_middle(shop):
    failed = shop.check(*failing("retval=0:when=15+", shop), status=4)
    assert "reason: PACKAGE_DAMAGED" in failed.stderr


def test_a_package_that_is_cut_while_it_is_read(vendor, tmp_path):
    """No SIGBUS: nothing of it is mapped."""
    package, _, _ = pack(vendor, tmp_path, {"weights": CONTENT}, chunk_size=1 << 20)

    def child() -> None:
        with PackageFile(package, vendor.public) as file, pytest.raises(DamagedError) as refused:
            file.verify(lambda _: os.truncate(package, 2 << 20))
        assert refused.value.reason == Reason.PACKAGE_DAMAGED

    in_child(child)


def test_a_package_that_is_replaced_or_removed_while_it_is_open(vendor, tmp_path):
    package, key, _ = pack(vendor, tmp_path, {"weights": CONTENT}, chunk_size=1 << 20)
    with opened(vendor, package, key) as model:
        pack(vendor, tmp_path, {"weights": b"another"}, chunk_size=1 << 20, force=True)
        assert bytes(model.read("weights")) == CONTENT
        package.unlink()
        with model.open("weights") as file:
            assert file.read() == CONTENT


def test_too_few_addresses_for_the_model(shop):
    """`ulimit -v`: what needs all of it at once is refused, and reading in parts goes on."""
    read, path, parts = shop.read(limit="little more than now")
    for refused in (read, path):
        assert refused.startswith("STORAGE ")
        assert "model.open" in refused
    assert parts.startswith(whole())


def test_no_memory_may_be_locked(shop):
    """`ulimit -l`: it works, and is said."""
    words = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"] if os.getuid() == 0 else []
    assert shop.read(*words, limit="RLIMIT_MEMLOCK") == [f"{whole()} False"] * 3


@pytest.mark.parametrize("how", ["refused", "disabled"])
def test_no_huge_pages(shop, how):
    if how == "refused":
        words = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=madvise", "-e", "inject=madvise:error=EINVAL"]
    else:  # PR_SET_THP_DISABLE, prctl(2): as where the system says "never"
        disable = "import ctypes, os, sys; assert not ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)"
        words = [sys.executable, "-c", f"{disable}; os.execv(sys.argv[1], sys.argv[1:])"]
    assert [line.split()[0] for line in shop.read(*words)] == [whole()] * 3
