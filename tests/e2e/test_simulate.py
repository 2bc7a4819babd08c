"""`hwlicense simulate` as scripts and CI see it: environment, exit status, streams, signals, nothing left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dongle_host import ANSWER, CLIENT, asked

SIMULATE = [sys.executable, "-m", "hwlicense_simulators"]


def simulate(*arguments, **options):
    return subprocess.run([*SIMULATE, *arguments], capture_output=True, text=True, timeout=60, check=False, **options)


def found(pattern, text):
    match = re.search(pattern, text)
    assert match, text
    return match[1]


def folder_of(stderr):
    return Path(found(r"swtpm:path=(\S+)/wire", stderr))


def pcr(index, *arguments, **options):
    done = simulate("--tpm", *arguments, "--", "tpm2_pcrread", f"sha256:{index}", **options)
    assert done.returncode == 0, done.stderr
    return found(r"0x([0-9A-F]{64})", done.stdout)


def test_the_command_has_a_tpm_whose_ek_verifies(tmp_path):
    script = """
        set -e
        test "$HWLICENSE_TPM" = "$TPM2TOOLS_TCTI"
        tpm2_nvread 0x1c00002 > ek.der
        openssl verify -CAfile "$HWLICENSE_SIMULATOR_EK_ROOT" ek.der
    """
    done = simulate("--tpm", "--", "sh", "-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ek.der: OK\n"
    assert re.search(r"^its EK root: /\S+/ek-root\.pem$", done.stderr, re.MULTILINE)
    assert not folder_of(done.stderr).exists()


def test_streams_and_status_are_the_commands_own():
    done = simulate("--tpm", "sh", "-c", "cat; echo complaint >&2; exit 7", input="from outside")
    assert done.returncode == 7
    assert done.stdout == "from outside"
    assert done.stderr.endswith("complaint\n")


@pytest.mark.parametrize(
    ("command", "status"),
    [(["sh", "-c", "kill -9 $$"], 137), (["/no/such/program"], 127), (["/etc/passwd"], 126)],
)
def test_other_ends_are_those_of_a_shell(command, status):
    done = simulate("--tpm", "--", *command)
    assert done.returncode == status
    assert not folder_of(done.stderr).exists()


def test_a_kept_tpm_is_the_same_device_at_the_next_run(tmp_path):
    read = ("--", "sh", "-c", "tpm2_nvread 0x1c00016 | sha256sum; tpm2_readclock")
    first, second = (simulate("--tpm", "--state", tmp_path / "board", *read) for _ in range(2))
    other = simulate("--tpm", *read)
    assert first.stdout.split()[0] == second.stdout.split()[0] != other.stdout.split()[0]
    assert "safe: yes" in second.stdout
    resets = [int(found(r"reset_count: (\d+)", done.stdout)) for done in (first, second)]
    assert resets[1] == resets[0] + 1


def test_a_kept_tpm_in_use_is_refused_with_status_3(tmp_path):
    inner = [*SIMULATE, "--tpm", "--state", str(tmp_path), "--", "true"]
    done = simulate("--tpm", "--state", str(tmp_path), "--", *inner)
    assert done.returncode == 3
    assert "error: another process uses the TPM" in done.stderr
    assert "reason: SIMULATOR_FAILED\nhint: wait for it" in done.stderr


def test_what_is_measured_can_be_chosen(tmp_path):
    factory = pcr(0)
    assert pcr(0) == factory != pcr(0, "--firmware", "firmware 2")
    (tmp_path / "boot.toml").write_text('7 = "secure boot off"\n8 = ["one", "two"]\n')
    assert pcr(7, "--boot", "boot.toml", cwd=tmp_path) == pcr(7, "--boot", "7=secure boot off") != pcr(7)
    assert pcr(9, "--boot", "boot.toml", cwd=tmp_path) == "0" * 64


@pytest.mark.parametrize("text", ["7 = 1", "pcr7 = 'x'", "7 = ['x', 1]", "7 ="])
def test_a_wrong_boot_file_is_wrong_usage(text, tmp_path):
    (tmp_path / "boot.toml").write_text(text)
    done = simulate("--tpm", "--boot", tmp_path / "boot.toml", "--", "true")
    assert done.returncode == 2
    assert "boot.toml" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--", "true"],
        ["--tpm"],
        ["--tpm", "--boot", "no file", "--", "true"],
        ["--dongle", "--firmware", "2", "--", "true"],
        ["--token", "--dongle-touch", "--", "true"],
        ["--tpm", "--dongle-blank", "--", "true"],
        ["--dongle", "--no-touch", "--", "true"],
        ["--dongle", "--pulled", "token", "--", "true"],
        ["--token", "--pulled", "dongle", "--", "true"],
        ["--token", "--pulled", "tpm", "--", "true"],
    ],
)
def test_wrong_usage(arguments):
    done = simulate(*arguments)
    assert done.returncode == 2
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_simulator_fails_with_status_3(tmp_path):
    done = simulate("--tpm", "--", "true", env=os.environ | {"PATH": str(tmp_path)})
    assert done.returncode == 3
    assert done.stderr.splitlines()[-3:] == [
        "error: the program swtpm_setup is not installed",
        "reason: SIMULATOR_MISSING",
        "hint: sudo apt-get install swtpm-tools",
    ]


def test_two_processes_of_the_command_share_the_tpm():
    hold = (
        "import os,socket,subprocess as s; c=socket.socket(socket.AF_UNIX);"
        "c.connect(os.environ['HWLICENSE_TPM'].partition('=')[2]);"
        "s.run(['tpm2_getrandom','--hex','4'],check=True,timeout=10)"
    )
    done = simulate("--tpm", "--", sys.executable, "-c", hold)
    assert done.returncode == 0, done.stderr


def running(script, **options):
    process = subprocess.Popen(
        [*SIMULATE, "--tpm", "--", "sh", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_the_command_once(number):
    name = number.name.removeprefix("SIG")
    with running(
        f"trap 'echo got {name}; n=1' {name}; echo ready; until [ $n ]; do sleep 0.05; done; exit 5"
    ) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 5
    assert out == f"got {name}\n"
    assert not folder_of(err).exists()


def test_a_command_that_dies_of_a_signal_takes_everything_with_it():
    with running("echo ready; sleep 5 & wait") as process:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        assert process.returncode == 128 + signal.SIGTERM
        assert process.stderr
        # The sleep holds the pipe, as a daemon of the command might.
        os.set_blocking(process.stderr.fileno(), False)
        assert not folder_of(process.stderr.read()).exists()


def test_killed_outright_it_still_leaves_no_folder():
    with running("echo ready; exec sleep 1") as process:
        assert process.stderr
        folder = folder_of(process.stderr.readline())
        process.kill()
    for _ in range(100):
        if not folder.exists():
            break
        time.sleep(0.05)
    assert not folder.exists()


ASK = [sys.executable, "-c", CLIENT + ANSWER, *asked(b"the same question")]
ORDER = """
order() { : > "$HWLICENSE_SIMULATOR_CONTROL/$1"; while [ -e "$HWLICENSE_SIMULATOR_CONTROL/$1" ]; do sleep 0.02; done; }
slots() { pkcs11-tool --module "${HWLICENSE_TOKEN#*module-path=}" --list-token-slots; }
"""


def answer(*arguments, command=ASK):
    done = simulate("--dongle", *arguments, "--", *command)
    assert done.returncode == 0, done.stderr
    return bytes.fromhex(done.stdout)


def test_the_command_has_a_token_that_takes_its_pin():
    script = """
        module="${HWLICENSE_TOKEN#*module-path=}"
        pkcs11-tool --module "$module" --login --pin 123456 --keypairgen --key-type EC:prime256v1 --label mine
        pkcs11-tool --module "$module" --list-objects
    """
    done = simulate("--token", "--", "sh", "-ec", script)
    assert done.returncode == 0, done.stderr
    assert re.search(r"label: +mine", done.stdout)
    uri = found(r"simulated token: (pkcs11:token=hwlicense;serial=\S+)\nits PIN: 123456\n", done.stderr)
    assert not Path(uri.partition("module-path=")[2]).exists()


def test_the_command_has_a_dongle_that_pyusb_finds():
    script = 'echo "$HWLICENSE_USB" "$HWLICENSE_SIMULATOR_USB"; "$@"'
    done = simulate("--dongle", "--", "sh", "-c", script, "sh", *ASK)
    assert done.returncode == 0, done.stderr
    selector, socket, mac = done.stdout.split()
    assert selector == found(r"simulated dongle: (\S+)\n", done.stderr)
    assert re.fullmatch(r"1050:0407:\d{7}", selector)
    assert len(bytes.fromhex(mac)) == 20
    assert not Path(socket).parent.exists()


def test_all_kinds_are_kept_together(tmp_path):
    everything = ("--tpm", "--token", "--dongle", "--state", tmp_path / "board")
    script = 'sha256sum < "$HWLICENSE_SIMULATOR_EK_ROOT"; echo "${HWLICENSE_TOKEN%%[?]*}"; "$@"'
    first, second = (simulate(*everything, "--", "sh", "-ec", script, "sh", *ASK) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert {path.name for path in (tmp_path / "board").iterdir()} >= {"ek-root.pem", "tpm", "token", "dongle"}
    assert answer("--state", tmp_path / "board").hex() == first.stdout.split()[-1]
    assert answer() != answer()


def test_a_kept_dongle_in_use_is_refused_with_status_3(tmp_path):
    options = ("--dongle", "--state", str(tmp_path))
    done = simulate(*options, "--", *SIMULATE, *options, "--", "true")
    assert done.returncode == 3
    assert "error: another process uses the dongle" in done.stderr


@pytest.mark.parametrize("kind", ["dongle", "token"])
def test_a_script_plugs_and_pulls(kind):
    look = {"token": "slots | grep -c label", "dongle": '"$@" >/dev/null 2>&1 && echo 1 || echo 0'}[kind]
    script = f"{ORDER}\n{look}; order plug-{kind}; {look}; order pull-{kind}; {look}; order plug-{kind}; {look}"
    done = simulate(f"--{kind}", "--pulled", kind, "--", "sh", "-c", script, "sh", *ASK)
    assert done.stdout.split() == ["0", "1", "0", "1"], done.stderr


def test_what_cannot_be_ordered_is_said_and_removed():
    done = simulate("--dongle", "--", "sh", "-c", f"{ORDER}\norder plug-dongle; order plug-token")
    assert done.returncode == 0
    assert "error: the simulated device is plugged in already\n" in done.stderr
    assert "error: no such order: plug-token\nhint: one of plug-dongle, pull-dongle, touch\n" in done.stderr


def test_a_kept_token_that_was_pulled_is_back_at_the_next_run(tmp_path):
    state = ("--token", "--state", tmp_path)
    assert simulate(*state, "--", "sh", "-c", f"{ORDER}\norder pull-token").returncode == 0
    done = simulate(*state, "--", "sh", "-c", f"{ORDER}\nslots")
    assert "hwlicense" in done.stdout


def test_touches_come_after_a_second_or_when_ordered():
    start = time.monotonic()
    assert answer("--dongle-touch")
    assert time.monotonic() - start > 1
    script = f'{ORDER}\norder touch & "$@"; wait'
    assert answer("--dongle-touch", "--no-touch", command=["sh", "-c", script, "sh", *ASK])


def test_a_blank_dongle_refuses():
    done = simulate("--dongle", "--dongle-blank", "--", *ASK)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "refused")


def test_the_plugin_sets_the_environment_for_its_own_tests_only(tmp_path):
    (tmp_path / "test_product.py").write_text(
        """
import os
VARIABLES = {
    "HWLICENSE_TPM", "TPM2TOOLS_TCTI", "HWLICENSE_SIMULATOR_EK_ROOT",
    "HWLICENSE_TOKEN", "HWLICENSE_USB", "HWLICENSE_SIMULATOR_USB",
}

def test_before():
    assert not VARIABLES & set(os.environ)

def test_one(hwlicense_tpm, hwlicense_ek_root):
    assert os.environ["HWLICENSE_TPM"] == hwlicense_tpm.tcti
    assert hwlicense_tpm.ek_root.read_bytes() == hwlicense_ek_root.read_bytes()

def test_several(hwlicense_tpms):
    assert hwlicense_tpms().pid != hwlicense_tpms().pid

def test_token(hwlicense_token, hwlicense_reader):
    assert os.environ["HWLICENSE_TOKEN"] == hwlicense_token.uri
    assert hwlicense_reader.tokens == (hwlicense_token,)

def test_tokens(hwlicense_tokens):
    assert hwlicense_tokens().serial != hwlicense_tokens(label="other").serial

def test_dongle(hwlicense_dongle):
    import subprocess, sys, usb.core
    assert os.environ["HWLICENSE_USB"] == hwlicense_dongle.selector
    assert usb.core.find(idVendor=0x1050).idProduct == 0x0407
    subprocess.run([sys.executable, "-c", "import usb.core; usb.core.find(idVendor=0x1050).bus"], check=True)

def test_dongles(hwlicense_dongles):
    import usb.core
    first, second = hwlicense_dongles(), hwlicense_dongles(serial=2)
    second.pull()
    assert [first.plugged, second.plugged] == [True, False]
    assert len(list(usb.core.find(find_all=True))) == 1

def test_dongles_are_gone():
    import usb.backend.libusb1
    assert usb.backend.libusb1.get_backend.__module__ == "usb.backend.libusb1"

test_after = test_before
"""
    )
    named = {"HWLICENSE_TPM", "TPM2TOOLS_TCTI", "HWLICENSE_TOKEN", "HWLICENSE_USB"}
    clean = {name: value for name, value in os.environ.items() if name not in named}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=clean,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout
    assert "9 passed" in done.stdout


def test_help_has_an_example_and_names_the_variables():
    text = simulate("--help").stdout
    for kind in ("tpm", "token", "dongle"):
        assert f"hwlicense simulate --{kind} " in text
    for name in (
        *("HWLICENSE_TPM", "TPM2TOOLS_TCTI", "HWLICENSE_SIMULATOR_EK_ROOT"),
        *("HWLICENSE_TOKEN", "HWLICENSE_USB", "HWLICENSE_SIMULATOR_USB", "HWLICENSE_SIMULATOR_CONTROL"),
    ):
        assert name in text
