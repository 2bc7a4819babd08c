"""Power cuts, full disks, and TPMs that are absent, locked, forbidden or gone in the middle."""

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from contextlib import suppress

import pytest

import hwlicense
from hwlicense import storage
from hwlicense.binders.tpm import TpmHardware
from hwlicense.core.envelope import disassemble
from hwlicense.core.errors import HwlicenseError, Reason, StorageError
from hwlicense.core.secret import Secret
from hwlicense.device.installing import install
from tests.forging import as_root, listing, refused
from tests.world import MEMBERS, PROGRAM, TERMS, WITH_PCRS, everything, licensed, run

SECONDS = 8.0
"""For each of the loops that kill."""


@pytest.fixture
def shop(own_vendor, device, tmp_path):
    """Files on the disk for every command; the device is enrolled and trusts the vendor."""
    (tmp_path / "a.hwreq").write_bytes(device.request())
    (tmp_path / "terms.toml").write_text(WITH_PCRS)
    (tmp_path / "a.hwlic").write_bytes(own_vendor.issue((tmp_path / "a.hwreq").read_bytes(), device.tpm).raw)
    (tmp_path / "out").mkdir()
    device.home.trust(own_vendor.public)
    device.home.keep_enrolled(device.tpm.tcti, "sha256:0,7")
    return tmp_path


def commands(shop, device):
    vendor = ("--vendor", shop / "acme" / "vendor")
    issue = (*vendor, "--request", shop / "a.hwreq", "--package", shop / "acme" / "model.hwpkg")
    return {
        "pack": ("vendor", "pack", *vendor, "--name", "n", "--version", "1", "-o", shop / "out" / "new", shop / "big"),
        "issue": (
            *("vendor", "issue", *issue, "--terms", shop / "terms.toml", "--ek-root", device.tpm.ek_root),
            *("-o", shop / "out" / "new"),
        ),
        "install": ("device", "install", "--home", device.home.path, shop / "a.hwlic"),
    }


def visible(*folders):
    """Files with names that count; what a killed process leaves under a hidden one is nobody's."""
    return {path: kept for path, kept in listing(*folders).items() if "/." not in path.removeprefix(str(folders[0]))}


# ---- killed -----------------------------------------------------------------------------------------------


class Killer:
    """Runs a command again and again, each time killed at a random moment of its usual time."""

    def __init__(self, arguments, name, **environment):
        self.arguments, self.name = [str(PROGRAM), *map(str, arguments)], name
        self.environment, self.chance = os.environ | environment, random.Random(name)
        self.tries = self.killed = 0
        started = time.monotonic()
        assert self._start().wait() == 0
        self.usual = time.monotonic() - started

    def __iter__(self):
        end = time.monotonic() + SECONDS
        while time.monotonic() < end or self.killed < 5:
            process = self._start()
            time.sleep(self.chance.uniform(0.3, 1.05) * self.usual)
            process.kill()
            self.killed += process.wait() == -signal.SIGKILL
            self.tries += 1
            yield self.tries
        print(f"\n{self.name}: killed {self.killed} of {self.tries} runs")  # noqa: T201

    def _start(self):
        quiet = subprocess.DEVNULL
        return subprocess.Popen(self.arguments, stdout=quiet, stderr=quiet, env=self.environment)


@pytest.mark.parametrize("command", ["pack", "issue"])
def test_the_vendor_killed_at_any_moment(shop, device, command):
    """The old file stays or the new one is there, whole; so is what the folder records; and the next run succeeds."""
    (shop / "big").write_bytes(random.Random(0).randbytes(3 << 20))
    folder, out, old = shop / "acme" / "vendor", shop / "out", b"what was there before"
    killer = Killer((*commands(shop, device)[command], "--force"), command)
    public = visible(folder / "keys", folder / "vendor.pub.json")
    for _ in killer:
        assert set(visible(out)) == {str(out), str(out / "new")}
        if (out / "new").read_bytes() != old:
            shown = run("inspect", "--vendor", folder / "vendor.pub.json", out / "new").stdout
            assert "signed by 'Acme'" in shown
            (out / "new").write_bytes(old)
        assert visible(folder / "keys", folder / "vendor.pub.json") == public
        for path in [*(folder / "issued").glob("*.hwlic"), *(folder / "approvals").glob("*.hwapp")]:
            disassemble(path.read_bytes())
    run(*killer.arguments[1:])
    assert (out / "new").read_bytes() != old


def test_an_installation_killed_at_any_moment(shop, device, own_vendor):
    """Over an older installation, which opens after each kill."""
    with device.tpm.tapped(record=False) as wire:
        killer = Killer(commands(shop, device)["install"], "install", HWLICENSE_TPM=wire.tcti)
        for _ in killer:
            with opened(own_vendor, device.home.path, wire.tcti) as model:
                assert everything(model) == MEMBERS
    run(*killer.arguments[1:])
    device.open(own_vendor).close()


@pytest.mark.parametrize("again", [False, True], ids=["the first time", "again"])
def test_an_installation_that_stops_at_each_write(device, own_vendor, monkeypatch, again):
    """Before a license lies in the home whole, it is not installed; where it does already, it stays usable."""
    raw = own_vendor.issue(device.request(), device.tpm).raw
    device.home.trust(own_vendor.public)
    if again:
        device.install(raw, own_vendor)
    write, left = storage.atomic_write, 0

    def stopping(*arguments, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise StorageError(Reason.STORAGE, "The power is cut.", "Switch it on.")
        write(*arguments, **options)

    stops = 0
    while True:
        left = stops
        with monkeypatch.context() as patch:
            patch.setattr(storage, "atomic_write", stopping)
            try:
                device.install(raw, own_vendor)
            except StorageError:
                stops += 1
            else:
                break
        if again:
            device.open(own_vendor).close()
        else:
            with refused("LICENSE_ABSENT"):
                device.open(own_vendor)
    assert stops == 2  # what the hardware gave, and the license
    device.open(own_vendor).close()


def opened(vendor, home, tcti):
    return hwlicense.open(vendor.package, vendor=vendor.text, home=home, tpm=tcti)


# ---- full disks -------------------------------------------------------------------------------------------


@pytest.fixture
def full(tmp_path):
    """A folder on a disk with room for a small file only, and what a child process needs to be bound by it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        as_root()
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], check=False, capture_output=True
        ).returncode
        == 0
    ):
        yield folder, {}
        subprocess.run(["umount", folder], check=True)
    else:  # where nothing can be mounted: no file may be larger than this
        yield folder, {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))}


def fill(folder, leave):
    with (folder / "ballast").open("wb", buffering=0) as file:
        with suppress(OSError):
            while file.write(bytes(4096)):
                pass
        file.truncate(max(0, file.tell() - leave))


@pytest.mark.parametrize("leave", [0, 4096, 8192])
def test_a_full_disk_under_the_home(shop, device, own_vendor, full, leave):
    folder, options = full
    home = folder / "home"
    shutil.copytree(device.home.path, home)
    if not options:
        fill(folder, leave)
    before = listing(home)
    done = run("device", "install", "--home", home, shop / "a.hwlic", status=None, **options)
    assert (done.returncode, _reason(done)) == (5, "STORAGE")
    assert {k: v for k, v in listing(home).items() if k in before} == before
    assert not list(home.rglob("license.hwlic"))
    refused_open = run("device", "check", "--home", home, own_vendor.package, status=1, **options)
    assert _reason(refused_open) == "LICENSE_ABSENT"
    (folder / "ballast").unlink(missing_ok=True)
    run("device", "install", "--home", home, shop / "a.hwlic")
    run("device", "check", "--open", "--home", home, own_vendor.package)


def test_the_doctor_sees_a_full_and_a_read_only_disk(shop, device, full):
    folder, options = full
    home, state = ("--home", device.home.path), folder / "state"
    run("device", "install", *home, shop / "a.hwlic")
    state.mkdir()
    before = run("device", "doctor", *home, "--state", state, status=None, **options).stdout
    assert "state:" not in before or options
    if not options:
        fill(folder, 4096)
    full_disk = run("device", "doctor", *home, "--state", state, status=None, **options).stdout
    assert f"note    state: {state}: " in full_disk
    assert "no approval can be installed" in full_disk
    assert not list(state.iterdir())
    if not options:
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        assert "Read-only file system" in run("device", "doctor", *home, "--state", state, status=None).stdout


def test_a_full_disk_under_the_output(shop, device, full):
    folder, options = full
    (shop / "big").write_bytes(bytes(1 << 20))
    issued = shop / "acme" / "vendor" / "issued"
    if not options:
        fill(folder, 4096)
    before = listing(folder, issued)
    home = ("--home", device.home.path)
    for arguments in (
        *(commands(shop, device)[which] for which in ("pack", "issue")),
        ("device", "enroll", *home, "--tpm", device.tpm.tcti, "--pcrs", "sha256:0,7", "-o", shop / "out" / "new"),
    ):
        words = [folder / "new" if word == shop / "out" / "new" else word for word in arguments]
        done = run(*words, status=None, **options)
        assert (done.returncode, _reason(done)) == (5, "STORAGE"), arguments
        assert listing(folder, issued) == before
    assert not (folder / "new").exists()


def test_a_full_disk_under_the_vendors_folder(shop, device, full):
    folder, options = full
    shutil.copytree(shop / "acme" / "vendor", folder / "vendor")
    if not options:
        fill(folder, 4096)
    before = listing(folder / "vendor")
    moved = {shop / "acme" / "vendor": folder / "vendor"}
    words = [moved.get(word, word) for word in commands(shop, device)["issue"]]
    done = run(*words, status=None, **options)
    assert (done.returncode, _reason(done)) == (5, "STORAGE")
    assert listing(folder / "vendor") == before
    assert not (shop / "out" / "new").exists()
    new = run("vendor", "init", folder / "second", "--no-passphrase", status=None, **options)
    assert (new.returncode, _reason(new)) == (5, "STORAGE")
    assert sorted(path.name for path in folder.iterdir() if path.name != "ballast") == ["vendor"]


def _reason(done):
    lines = done.stderr.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1, done.stderr
    assert sum(line.startswith("hint: ") for line in lines) == 1, done.stderr
    return next(line.removeprefix("reason: ") for line in lines if line.startswith("reason: "))


# ---- the TPM ----------------------------------------------------------------------------------------------


def test_no_tpm(own_vendor, device, tmp_path):
    raw = licensed(own_vendor, device)
    for tcti in (f"swtpm:path={tmp_path}/absent", f"device:{tmp_path}/absent", f"device:{tmp_path}"):
        gone = ("--tpm", tcti, "--home", device.home.path)
        for arguments in (
            ("device", "enroll", *gone, "-o", tmp_path / "new"),
            ("device", "check", "--open", *gone, own_vendor.package),
            ("device", "probe", *gone),
        ):
            assert _reason(run(*arguments, status=3)) in {"TPM_ABSENT", "TPM_FAILED"}
        doctor = run("device", "doctor", *gone, status=3)
        assert "missing TPM:" in doctor.stdout
    (tmp_path / "a.hwlic").write_bytes(raw)
    before = listing(device.home.path)
    done = run(
        "device", "install", "--home", device.home.path, "--tpm", "device:/dev/null", tmp_path / "a.hwlic", status=3
    )
    assert _reason(done) in {"TPM_ABSENT", "TPM_GONE", "TPM_FAILED"}
    assert listing(device.home.path) == before
    assert not (tmp_path / "new").exists()


def test_a_tpm_in_lockout(own_vendor, device):
    licensed(own_vendor, device, TERMS, pin=Secret(bytearray(b"2468")))

    def with_pin(pin):
        device.open(own_vendor, pin=lambda _: Secret(bytearray(pin))).close()

    with_pin(b"2468")
    ends = []
    while "TPM_LOCKOUT" not in ends:
        with pytest.raises(HwlicenseError) as caught:
            with_pin(b"1357")
        ends.append(str(caught.value.reason))
        assert len(ends) < 40
    assert set(ends[:-1]) == {"PIN_WRONG"}
    with refused("TPM_LOCKOUT", words="too many wrong"):
        with_pin(b"2468")
    licensed(own_vendor, device, TERMS)  # one without a PIN is not concerned
    device.open(own_vendor).close()


def test_gone_at_each_command_of_an_installation(own_vendor, device):
    """The wire is cut before and after each command: nothing is installed, and the next try succeeds."""
    raw = own_vendor.issue(device.request(), device.tpm).raw
    device.home.trust(own_vendor.public)
    before = listing(device.home.path)
    with device.tpm.tapped() as wire:

        def connect(_kind):
            return TpmHardware(wire.tcti)

        install(device.home, raw, connect)
        commands = len(wire.commands)
        shutil.rmtree(device.home.path / "licenses")
        assert listing(device.home.path) == before
        reasons: list[str] = []
        for executed in (False, True):
            for after in range(commands):
                wire.cut(after=after, executed=executed)
                try:
                    install(device.home, raw, connect)
                except HwlicenseError as error:
                    reasons.append(error.reason)
                else:  # it was a command that cleans up
                    shutil.rmtree(device.home.path / "licenses")
                assert listing(device.home.path) == before
                wire._faults.clear()
        assert set(reasons) <= {"TPM_GONE", "TPM_ABSENT"}
        assert len(reasons) > commands
        install(device.home, raw, connect)
        with opened(own_vendor, device.home.path, wire.tcti) as model:
            assert everything(model) == MEMBERS


def test_gone_at_each_command_of_an_opening(own_vendor, device):
    licensed(own_vendor, device)
    before = listing(device.home.path)
    with device.tpm.tapped() as wire:
        opened(own_vendor, device.home.path, wire.tcti).close()
        commands = len(wire.commands)
        lost = 0
        for executed in (False, True):
            for after in range(commands):
                wire.cut(after=after, executed=executed)
                try:
                    opened(own_vendor, device.home.path, wire.tcti).close()
                except HwlicenseError as error:
                    lost += error.reason in ("TPM_GONE", "TPM_ABSENT")
                wire._faults.clear()
        assert lost >= commands
        assert listing(device.home.path) == before
        with opened(own_vendor, device.home.path, wire.tcti) as model:
            assert everything(model) == MEMBERS


# ---- the environment --------------------------------------------------------------------------------------


def test_another_tpm_or_home_by_environment_is_harmless(own_vendor, device, hwlicense_tpms, tmp_path):
    licensed(own_vendor, device)
    device.home.keep_enrolled(device.tpm.tcti, "sha256:0,7")
    other = hwlicense_tpms()
    check = ("device", "check", "--open", "--home", device.home.path, own_vendor.package)
    evil = tmp_path / "evil"
    (evil / "hwlicense").mkdir(parents=True)
    log = tmp_path / "log"
    for environment, status, reason in (
        ({}, 0, None),
        ({"HWLICENSE_TPM": other.tcti}, 1, "WRONG_DEVICE"),
        ({"HWLICENSE_TPM": "cmd:touch " + str(evil / "ran")}, 2, "USAGE"),
        ({"HWLICENSE_TPM": str(evil / "library.so")}, 2, "USAGE"),
        ({"TPM2TOOLS_TCTI": other.tcti, "TSS2_TCTI": other.tcti, "TCTI": other.tcti}, 0, None),
        ({"TSS2_FAPICONF": str(evil), "TSS2_TCTILDR": "cmd:touch " + str(evil / "ran")}, 0, None),
        ({"TSS2_LOG": "all+trace", "TSS2_LOGFILE": str(log)}, 0, None),  # the library's trace shows what it unseals
        ({"HWLICENSE_HOME": str(evil)}, 0, None),
        ({"XDG_STATE_HOME": str(evil), "HOME": str(evil)}, 0, None),
        ({"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONOPTIMIZE": "2"}, 0, None),
        ({"PYTHONOPTIMIZE": "2", "HWLICENSE_TPM": other.tcti}, 1, "WRONG_DEVICE"),
    ):
        done = run(*check, status=status, env=os.environ | environment)
        assert reason is None or _reason(done) == reason
    assert not (evil / "ran").exists()
    assert not log.exists() or not log.read_bytes()
    without = ("device", "check", "--open", own_vendor.package)
    done = run(*without, status=1, env=os.environ | {"HWLICENSE_HOME": str(evil), "HWLICENSE_TPM": device.tpm.tcti})
    assert _reason(done) == "VENDOR_UNTRUSTED"
