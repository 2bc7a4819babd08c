"""A TPM that takes a command and never answers: whoever asks it is told so, and can ask again when it answers."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hwlicense.binders.tpm import TpmHardware, answering
from hwlicense.core.errors import HardwareError, Reason
from hwlicense.core.tpm.pcrs import Selection
from tests.counted import handles
from tests.world import TERMS, licensed

COUNTED = TERMS + "[limits]\nopens = 3\n"
IMPATIENT = """
from hwlicense.binders.tpm import answering
from hwlicense.cli import main
answering.LIMIT = answering.MAKING = 1.0
main()
"""


@pytest.fixture
def impatient(monkeypatch):
    """What takes a minute takes a second here."""
    monkeypatch.setattr(answering, "LIMIT", 1.0)
    monkeypatch.setattr(answering, "MAKING", 1.0)


@pytest.fixture
def hardware(hwlicense_tpm):
    with TpmHardware(hwlicense_tpm.tcti) as opened:
        opened.describe(Selection())
        yield opened


def stop(tpm):
    os.kill(tpm.pid, signal.SIGSTOP)


def unanswered(hardware, tpm):
    """A command that no answer comes to."""
    stop(tpm)
    with pytest.raises(HardwareError, match="gave no answer"):
        hardware.describe(Selection())


def go_on(tpm):
    os.kill(tpm.pid, signal.SIGCONT)


def served(hardware):
    """Once the answer that was owed has come."""
    end = time.monotonic() + 20
    while answering._hung:
        assert time.monotonic() < end
        time.sleep(0.01)
    hardware.describe(Selection())


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("asked", ["status", "doctor", "probe", "enroll", "check"])
def test_a_command_says_so(own_vendor, device, tmp_path, asked, after):
    licensed(own_vendor, device, COUNTED, counted=True)
    arguments = {
        "enroll": ("--counted", "-o", tmp_path / "new.hwreq"),
        "check": ("--open", own_vendor.package),
    }.get(asked, ())
    with device.tpm.tapped() as wire:
        wire.delay(1e6, after=after, times=1 << 30)
        program = [sys.executable, "-c", IMPATIENT, "device", asked, "--home", device.home.path, "--tpm", wire.tcti]
        done = subprocess.run(
            [*map(str, [*program, *arguments])], capture_output=True, text=True, timeout=60, check=False
        )
    assert "Traceback" not in done.stderr
    said = "has not answered an earlier command" if asked == "check" else "gave no answer within 1 s"  # asked twice
    assert said in done.stdout + done.stderr
    assert ("TPM_HUNG" in done.stderr) == (asked != "doctor")
    assert done.returncode == (0 if asked == "status" else 3)
    if asked == "doctor":
        assert "missing TPM: The TPM gave no answer" in done.stdout
        assert "mend: Try again in a minute" in done.stdout
        assert "its TPM" not in done.stdout
    assert not (tmp_path / "new.hwreq").exists()


@pytest.mark.usefixtures("impatient")
def test_it_serves_again_when_it_answers(hardware, hwlicense_tpm):
    stop(hwlicense_tpm)
    for words in ("gave no answer within 1 s", "has not answered an earlier command"):
        with pytest.raises(HardwareError, match=words) as caught:
            hardware.describe(Selection())
        assert (caught.value.reason, bool(caught.value.hint)) == (Reason.TPM_HUNG, True)
    go_on(hwlicense_tpm)
    served(hardware)


@pytest.mark.usefixtures("impatient")
def test_it_serves_again_when_it_was_started_anew(hardware, hwlicense_tpm):
    unanswered(hardware, hwlicense_tpm)
    hwlicense_tpm.power_cut()
    served(hardware)


@pytest.mark.usefixtures("impatient")
def test_another_connection_and_a_forked_child_are_told_by_themselves(hardware, hwlicense_tpm):
    unanswered(hardware, hwlicense_tpm)
    with TpmHardware(hwlicense_tpm.tcti) as other, pytest.raises(HardwareError, match="an earlier command"):
        other.describe(Selection())
    pid = os.fork()
    if not pid:
        try:
            hardware.describe(Selection())
        except HardwareError as error:
            os._exit(error.reason != Reason.TPM_HUNG or "no answer within" not in error.what)
        os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    go_on(hwlicense_tpm)
    served(hardware)


def test_an_interrupted_wait_ends_at_once(hardware, hwlicense_tpm):
    """Control-C, which the library lets wait for the TPM."""
    stop(hwlicense_tpm)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        hardware.describe(Selection())
    assert time.monotonic() - began < 10
    go_on(hwlicense_tpm)
    served(hardware)


def test_an_interrupted_wait_for_a_tpm_that_answers_leaves_nothing_behind(hardware, hwlicense_tpm):
    from tpm2_pytss import ESAPI  # noqa: PLC0415

    def interrupted(*_):
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, interrupted)
    try:
        for _ in range(20):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            try:
                while True:
                    hardware.describe(Selection())
            except InterruptedError:
                pass
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not answering._hung
    hardware.describe(Selection())
    hardware.close()
    with ESAPI(hwlicense_tpm.tcti) as esapi:
        assert [handle for first in (0x80000000, 0x02000000) for handle in handles(esapi, first)] == []


def test_without_a_thread_it_takes_as_long_as_it_takes(hardware, monkeypatch):
    def none_left(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    hardware.describe(Selection())
