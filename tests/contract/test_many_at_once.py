"""Many that open at once, each with a connection of its own, on a TPM without a resource manager."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

import hwlicense
from tests.world import PROGRAM, licensed


@pytest.mark.parametrize("tapped", [False, True], ids=["direct", "behind a wire"])
def test_threads_and_processes_wait_for_their_turn(vendor, device, tapped):
    licensed(vendor, device)
    with device.tpm.tapped() as wire:
        tcti = wire.tcti if tapped else device.tpm.tcti
        failed = []

        def open_it():
            try:
                hwlicense.open(vendor.package, vendor=vendor.text, home=device.home.path, tpm=tcti).close()
            except hwlicense.HwlicenseError as error:
                failed.append(error)

        threads = [threading.Thread(target=open_it) for _ in range(6)]
        command = [PROGRAM, "device", "check", "--open", "--home", device.home.path, "--tpm", tcti, vendor.package]
        processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [process.wait(60) for process in processes] == [0] * 4
    assert failed == []


DECODING = """
import sys, threading
from hwlicense.core import documents, envelope
sys.setswitchinterval(1e-6)
raw = open(sys.argv[1], "rb").read()
together, failed = threading.Barrier(12), []
def work():
    together.wait()
    try:
        envelope.unverified(raw, documents.License)
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=work) for _ in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join()
sys.exit(bool(failed))
"""


def test_threads_that_decode_their_first_document_at_once():
    """Left to itself, msgspec crashes in about one of four such processes."""
    license_ = Path(__file__).parents[1] / "vectors" / "license-1.hwlic"
    ended = [subprocess.run([sys.executable, "-c", DECODING, license_], check=False).returncode for _ in range(25)]
    assert ended == [0] * 25
