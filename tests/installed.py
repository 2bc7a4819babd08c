"""An application as it is installed on a device: with a Python environment of its own, and nothing of the tests.

The environment that runs the tests has an editable install, which the guard rightly remarks upon.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
import venv
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import hwlicense
from hwlicense.device.home import Home
from tests.world import TERMS, Device, Vendor, licensed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hwlicense_simulators import Tpm

PACKAGES = ("blake3", "cryptography", "msgspec", "click", "cffi", "_cffi_backend*.so", "tpm2_pytss", "yaml", "_yaml")
HERE = Path(hwlicense.__file__).parent

OPENING = """
import sys
import hwlicense
package, vendor, home, tpm = sys.argv[1:]
try:
    model = hwlicense.open(package, vendor=open(vendor).read(), home=home, tpm=tpm)
except hwlicense.HwlicenseError as error:
    print(error.reason, error, flush=True)
    sys.exit(error.exit_status)
print("open", *(f"{one.check}: {one.what}" for one in model.findings), sep="\\n", flush=True)
"""
LATER = """
import time
{during}
until = time.monotonic() + 20
try:
    while time.monotonic() < until:
        model.read("weights.bin")
        time.sleep(0.05)
    print("never refused")
except hwlicense.HwlicenseError as error:
    print(error.reason, error, flush=True)
    assert not any(model._keys.memory.view), "keys are left"
"""


class Installation:
    """Python with this package installed as a release is, and a folder for the application's own files."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "env", symlinks=True)
        self.python = folder / "env" / "bin" / "python"
        self.folder = folder / "application"
        self.folder.mkdir()
        paths = {"base": str(folder / "env"), "platbase": str(folder / "env")}
        self.packages = Path(sysconfig.get_path("purelib", "venv", paths))
        from_here = Path(sysconfig.get_path("purelib"))
        for pattern in PACKAGES:
            for found in from_here.glob(pattern):
                self._take(found)
        self._take(HERE)

    def _take(self, found: Path) -> None:
        if found.is_dir():
            shutil.copytree(found, self.packages / found.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(found, self.packages)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        # Python takes the bytecode of a text of the same length that was there in the same second
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
        return path

    def run(
        self,
        code: str | Path,
        *arguments: str,
        options: tuple[str, ...] = (),
        under: tuple[str, ...] = (),
        **environment,
    ) -> subprocess.CompletedProcess[str]:
        """Run a file, or code that is written into one."""
        path = code if isinstance(code, Path) else self.write("app.py", code)
        clean = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        command = [*under, str(self.python), *options, str(path), *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=clean | environment, capture_output=True, text=True, timeout=120, check=False
        )

    @contextmanager
    def started(self, code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A program that runs on until the end of the block, once it has printed its first line."""
        path = self.write("app.py", code)
        clean = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        command = [str(self.python), str(path), *arguments]
        with subprocess.Popen(
            command, cwd=self.folder, env=clean, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
        ) as child:
            try:
                yield child
            finally:
                child.kill()

    @contextmanager
    def laid(self, name: str, text: str) -> Iterator[Path]:
        """A file among the installed packages, for the time of the block."""
        path = self.packages / name
        path.write_text(text)
        try:
            yield path
        finally:
            path.unlink()


class Sold:
    """A product at a customer's: one TPM, and a home for each of several licenses."""

    def __init__(self, folder: Path, vendor: Vendor, tpm: Tpm) -> None:
        self.folder, self.vendor, self.tpm = folder, vendor, tpm

    def license(self, terms: str = "") -> tuple[str, ...]:
        """What the program is given to open under such terms."""
        device = Device(Home(self.folder / f"home-{len(list(self.folder.iterdir()))}"), self.tpm)
        licensed(self.vendor, device, TERMS + terms)
        vendor = self.vendor.folder / "vendor" / "vendor.pub.json"
        return str(self.vendor.package), str(vendor), str(device.home.path), self.tpm.tcti


def shared_library(folder: Path, name: str, code: str) -> Path:
    """Native code, built here."""
    source, target = folder / f"{name}.c", folder / f"{name}.so"
    source.write_text(code)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", target, source], check=True)
    return target


__all__ = ["LATER", "OPENING", "Installation", "Sold", "shared_library"]
