"""A device with a licensed package, and programs that `hwlicense exec` runs there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwlicense.device.home import Home
from hwlicense_simulators import Tpm
from tests.world import PROGRAM, TERMS, Device, licensed, run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.world import Vendor

READY = "echo ready; "


class Shop:
    """Where the license is installed. `at` is an empty folder."""

    def __init__(self, vendor: Vendor, folder: Path, device: Device, tcti: str) -> None:
        self.vendor, self.folder, self.device = vendor, folder, device
        self.at = folder / "at"
        self.at.mkdir()
        self.environment = os.environ | {
            "HWLICENSE_HOME": str(device.home.path),
            "HWLICENSE_TPM": tcti,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def exec(self, *command: str | Path, status: int | None = 0, given=None, package: Path | None = None, **options):
        """Run a command under `hwlicense exec`, with --at unless something else is `given`."""
        how = ["--at", self.at] if given is None else given
        words = ["exec", package or self.vendor.package, *how, "--", *command]
        given_options: dict[str, Any] = {
            "env": self.environment,
            "cwd": self.folder,
            "stdin": subprocess.DEVNULL,
        } | options
        return run(*words, status=status, **given_options)

    @contextmanager
    def running(self, script: str, how: str = "--at", mark: str = "") -> Iterator[subprocess.Popen[str]]:
        """The same while it runs, after its first line."""
        given = ["--at", self.at] if how == "--at" else ["--fd"]
        words = [PROGRAM, "exec", self.vendor.package, *given, "--", "sh", "-c", READY + script]
        environment = self.environment | {"MARK": mark}
        pipe = subprocess.PIPE
        with subprocess.Popen(
            words, env=environment, cwd=self.folder, text=True, stdin=pipe, stdout=pipe, stderr=pipe
        ) as process:
            try:
                assert process.stdout.readline() == "ready\n", process.stderr.read()
                yield process
            finally:
                process.kill()


@contextmanager
def shop(vendor: Vendor, folder: Path, terms: str = TERMS, *, counted: bool = False) -> Iterator[Shop]:
    with Tpm() as tpm, tpm.tapped(record=False) as wire:
        device = Device(Home(folder / "home"), tpm)
        licensed(vendor, device, terms, counted=counted)
        yield Shop(vendor, folder, device, wire.tcti)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def marked(mark: str) -> set[int]:
    """Processes with this in their environment, whose memory or descriptors could hold something still."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"MARK={mark}\0".encode() in (entry / "environ").read_bytes():
                    found.add(int(entry.name))
            except OSError:  # ended meanwhile, or another's
                continue
    return found


def runs(pid: int) -> bool:
    """A zombie does not: whoever should reap it may be slow, or there is no init that does."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def mounts(path: Path) -> set[int]:
    """Processes that see something mounted at `path`."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f" {path} ".encode() in (entry / "mountinfo").read_bytes():
                    found.add(int(entry.name))
            except OSError:  # ended meanwhile, or another's
                continue
    return found


def until(true, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
