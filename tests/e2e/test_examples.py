"""The examples, as a reader runs them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from hwlicense.core.secret import Secret
from hwlicense_simulators import Tpm
from tests.world import MEMBERS, TERMS, licensed

ROOT = Path(__file__).parents[2]
WITH_DATES = TERMS + "[validity]\nnot_after = 2090-12-31\n"


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_demo_goes_as_it_is_told():
    told = run(sys.executable, ROOT / "examples" / "label_reader" / "story.py")
    assert told.count("SN 4711-0815") == 4
    reasons = re.findall(r"reason: (\w+)", told)
    assert reasons == [
        "WRONG_DEVICE",
        "WRONG_DEVICE",
        "PCR_MISMATCH",
        "PACKAGE_DAMAGED",
        "PACKAGE_DAMAGED",
        "DONGLE_ABSENT",
    ]
    assert "the line stands still: DONGLE_ABSENT" in told
    assert (ROOT / "build" / "demo" / "part-read.png").stat().st_size > 100_000


def test_a_model_of_ones_own(tmp_path):
    with Tpm() as tpm:
        run(ROOT / "examples" / "own_model" / "story.sh", cwd=tmp_path, env=os.environ | tpm.environment)


def test_weights_under_a_c_program(tmp_path):
    with Tpm() as tpm:
        story = ROOT / "examples" / "native" / "story.sh"
        told = run(story, cwd=tmp_path, env=os.environ | tpm.environment)
    assert told.splitlines()[-4:] == ["6 22 38", "3 7 11", "0 4 8", "refused: RATE_EXCEEDED"]


def test_a_program_that_is_sealed(tmp_path):
    with Tpm() as tpm:
        told = run(ROOT / "examples" / "sealed" / "story.sh", cwd=tmp_path, env=os.environ | tpm.environment)
    assert told.endswith("grey 170: scratched (0.27)\ngrey 250: broken (0.59)\nexit status 1\n")
    assert "secret.cpython-" in told
    assert "secret.cpython-311.pyc" not in told


def test_a_product_tests_itself_with_the_plugin():
    folder = ROOT / "examples" / "ci"
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull)
    assert "3 passed" in run(*command, "--rootdir", folder, folder)


def test_the_service_needs_nothing_that_its_unit_forbids():
    """By systemd's own reading: every line is known to it, and nothing is left open that was closed."""
    unit = ROOT / "examples" / "service" / "reader.service"
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60, check=False)
    said = [line for line in done.stderr.splitlines() if "is not executable" not in line and unit.name in line]
    assert said == []
    run("systemd-analyze", "security", "--offline=true", "--threshold=13", unit)


def test_the_program_of_the_service_runs_without_writable_code(vendor, device):
    """MemoryDenyWriteExecute= as the kernel itself has it (PR_SET_MDWE, Linux 6.3)."""
    licensed(vendor, device)
    program = (
        "import ctypes, sys, pathlib, hwlicense\n"
        "assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0\n"
        "package, vendor, home, tpm = sys.argv[1:]\n"
        "with hwlicense.open(package, vendor=pathlib.Path(vendor).read_text(), home=home, tpm=tpm) as model:\n"
        "    print(sum(len(model.read(name)) for name in model.names))\n"
    )
    public = vendor.folder / "vendor" / "vendor.pub.json"
    told = run(sys.executable, "-I", "-c", program, vendor.package, public, device.home.path, device.tpm.tcti)
    assert int(told) == sum(map(len, MEMBERS.values()))


def program(vendor, folder):
    """The command of service and container, with what it needs beside it."""
    for source, name in (
        (ROOT / "examples/container/application.py", "application.py"),
        (vendor.package, "reader.hwpkg"),
        (vendor.folder / "vendor" / "vendor.pub.json", "vendor.pub.json"),
    ):
        shutil.copy(source, folder / name)
    return sys.executable, "-I", folder / "application.py"


def test_the_program_of_the_container(vendor, device, tmp_path):
    licensed(vendor, device, WITH_DATES)
    where = {"HWLICENSE_HOME": str(device.home.path), "READER_STATE": str(tmp_path / "state")}
    told = run(*program(vendor, tmp_path), env=os.environ | where | device.tpm.environment)
    assert f"weights.bin {len(MEMBERS['weights.bin'])}" in told
    assert list((tmp_path / "state").rglob("ledger"))


def test_the_containers_system_has_the_libraries_that_the_tpms_binding_needs():
    recipe = (ROOT / "examples/container/Dockerfile").read_text()
    import tpm2_pytss._libtpm2_pytss as binding  # noqa: PLC0415  # the compiled half of tpm2-pytss

    linked = re.findall(r"=> (\S+/libtss2-\S+)", run("ldd", binding.__file__))
    assert linked
    for library in linked:
        found = re.search(r"^(\S+):\S+: ", run("dpkg", "-S", Path(library).resolve()), re.MULTILINE)
        assert found
        assert found[1] in recipe.split()


def test_keys_lie_in_ordinary_memory_where_a_unit_forbids_memfd_secret(vendor, device):
    """As @system-service of systemd 252 does: what the unit's line for it is about."""
    licensed(vendor, device)
    forbidding = (
        "import ctypes, struct, sys, pathlib, hwlicense\n"
        "libc = ctypes.CDLL(None)\n"
        "assert libc.prctl(38, 1, 0, 0, 0) == 0\n"  # PR_SET_NO_NEW_PRIVS
        # seccomp(2): load the call's number; memfd_secret gives EPERM; all else goes
        "steps = struct.pack('HBBI' * 4, 0x20, 0, 0, 0, 0x15, 0, 1, 447, 6, 0, 0, 0x50001, 6, 0, 0, 0x7FFF0000)\n"
        "held = ctypes.create_string_buffer(steps)\n"
        "program = ctypes.create_string_buffer(struct.pack('HxxxxxxP', 4, ctypes.addressof(held)))\n"
        "assert libc.prctl(22, 2, program) == 0\n"
    )
    opening = (
        "package, vendor, home, tpm = sys.argv[1:]\n"
        "with hwlicense.open(package, vendor=pathlib.Path(vendor).read_text(), home=home, tpm=tpm) as model:\n"
        "    print(model.protection.secret > 0)\n"
    )
    public = vendor.folder / "vendor" / "vendor.pub.json"
    given = (vendor.package, public, device.home.path, device.tpm.tcti)
    assert run(sys.executable, "-c", "import sys, pathlib, hwlicense\n" + opening, *given) == "True\n"
    assert run(sys.executable, "-c", forbidding + opening, *given) == "False\n"
    unit = (ROOT / "examples" / "service" / "reader.service").read_text()
    assert "\nSystemCallFilter=memfd_secret\n" in unit
    assert "memfd_secret" not in run("systemd-analyze", "syscall-filter", "@system-service").split()


def test_a_pin_that_is_refused_waits_for_a_person(vendor, device, tmp_path):
    """By a status that the unit does not restart on. Refusals that may pass have another, and are tried again."""
    licensed(vendor, device, TERMS, pin=Secret(bytearray(b"2468")))
    where = {"HWLICENSE_HOME": str(device.home.path), "CREDENTIALS_DIRECTORY": str(tmp_path)}
    ended = []
    for pin in ("1357", "2468"):
        (tmp_path / "pin").write_text(pin)
        ended.append(
            subprocess.run(program(vendor, tmp_path), env=os.environ | where | device.tpm.environment, check=False)
        )
    elsewhere = {"HWLICENSE_HOME": str(tmp_path / "empty")}
    ended.append(subprocess.run(program(vendor, tmp_path), env=os.environ | elsewhere, check=False))
    assert [done.returncode for done in ended] == [77, 0, 1]
    unit = (ROOT / "examples" / "service" / "reader.service").read_text()
    assert "\nRestart=on-failure\n" in unit
    assert "\nRestartPreventExitStatus=2 4 77\n" in unit
