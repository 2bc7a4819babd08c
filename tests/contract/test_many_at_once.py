"""Many that open at once, each with a connection of its own, on a TPM without a resource manager."""

import subprocess
import threading

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
