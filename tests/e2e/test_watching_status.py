"""Control-C at a command: `device status --watch`, which it ends at once and without a word, with status 130."""

import signal
import subprocess
import sys
import termios
import time

import pytest

from tests.counter import Terminal
from tests.refusals import until
from tests.world import PROGRAM, TERMS, licensed


@pytest.mark.parametrize("watch", ["0.2", "600"], ids=["often", "asleep"])
def test_at_a_terminal(own_vendor, device, watch):
    licensed(own_vendor, device, TERMS)
    with Terminal("device", "status", "--home", device.home.path, "--watch", watch) as person:
        before = termios.tcgetattr(person.fd)
        person.until("state +installed\n[^$]*\n\n")
        person.type("\x03")
        rest, status = person.end()
        assert termios.tcgetattr(person.fd) == before
    assert status == 130
    assert rest.endswith("^C\n")  # the prompt comes on a line of its own


def test_while_the_tpm_is_asked(own_vendor, device):
    licensed(own_vendor, device, TERMS + "[limits]\nopens = 3\n", counted=True)
    with device.tpm.tapped() as wire:
        wire.delay(1e6, after=2, times=1 << 30)
        asked = [PROGRAM, "device", "status", "--watch", "--home", device.home.path, "--tpm", wire.tcti]
        with subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
            until(lambda: len(wire.commands) >= 2)
            time.sleep(1)  # until the third is under way: cleaning up before it would be waited for
            watching.send_signal(signal.SIGINT)
            assert watching.communicate(timeout=20) == ("", "")
    assert watching.returncode == 130


INTERRUPTED = """
import sys
from hwlicense.cli import main

class Finder:
    def find_spec(self, name, *_):
        if name == "hwlicense.cli.commands":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
main()
"""


def test_before_the_command_begins():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
