"""A vendor, packages and a device with a simulated TPM, and hwlicense as a wheel installs it."""

from __future__ import annotations

import compileall
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import hwlicense
from benchmarks.measure import Command, run

if TYPE_CHECKING:
    from hwlicense_simulators import Tpm

PCRS = "sha256:0,7"
TERMS = f'licensee = "Acme Robotics"\nproduct = "reader"\n[require]\npcrs = ["{PCRS}"]\n'


class Scene:
    """Everything lies below `folder`."""

    def __init__(self, folder: Path, tpm: Tpm, installed: tuple[Path, Path] | None = None) -> None:
        self.folder, self.tpm = folder, tpm
        self.environment = tpm.environment
        self.python, self.program = installed or install(folder / "installed")
        self.home, self.package = folder / "home", folder / "model.hwpkg"
        self.vendor = folder / "vendor"
        self.hwlicense("vendor", "init", "--no-passphrase", "--name", "Acme", self.vendor)

    def at(self, tpm: Tpm, name: str) -> Scene:
        """Another one, with the same programs: of another TPM, in a folder within."""
        folder = self.folder / name
        folder.mkdir()
        return Scene(folder, tpm, (self.python, self.program))

    @property
    def vendor_text(self) -> str:
        """What an application carries."""
        return (self.vendor / "vendor.pub.json").read_text()

    def command(self, *arguments: str | Path) -> Command:
        """A command line of hwlicense."""
        return [str(self.program), *map(str, arguments)]

    def script(self, code: str, *arguments: str | Path) -> Command:
        """A Python program in the installed environment, which must not find the sources that lie around here."""
        return [str(self.python), "-P", "-c", code, *map(str, arguments)]

    def hwlicense(self, *arguments: str | Path) -> None:
        """Run a command, untimed."""
        run(self.command(*arguments), self.environment)

    def pack(self, source: Path, target: Path | None = None) -> Command:
        """The command that packs `source`."""
        out = ("--force", "-o", target or self.package)
        return self.command(
            "vendor", "pack", "--vendor", self.vendor, "--name", "model", "--version", "1", *out, source
        )

    def license(self) -> None:
        """Enroll, issue, trust and install, for the package there is."""
        request, terms, licensed = (self.folder / name for name in ("a.hwreq", "terms.toml", "a.hwlic"))
        terms.write_text(TERMS)
        self.hwlicense("device", "enroll", "--home", self.home, "--pcrs", PCRS, "--force", "-o", request)
        issue = ("--request", request, "--package", self.package, "--terms", terms, "--force", "-o", licensed)
        root = f"virtual={self.tpm.ek_root}"
        self.hwlicense("vendor", "issue", "--vendor", self.vendor, *issue, "--ek-root", root)
        self.hwlicense("device", "trust", "--home", self.home, self.vendor / "vendor.pub.json")
        self.hwlicense("device", "install", "--home", self.home, licensed)


def install(folder: Path) -> tuple[Path, Path]:
    """Python and `hwlicense` in an environment of its own, compiled, without what an editable installation adds.

    What hwlicense depends on comes from the environment that runs the benchmark.
    """
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    source = Path(hwlicense.__file__).parent
    shutil.copytree(source, packages / "hwlicense", ignore=shutil.ignore_patterns("__pycache__"))
    below = [place for place in sys.path if Path(place).name == "site-packages"]
    (packages / "dependencies.pth").write_text("".join(f"{place}\n" for place in below))
    compileall.compile_dir(packages, quiet=1)
    python, program = folder / "bin" / "python", folder / "bin" / "hwlicense"
    program.write_text(f"#!{python}\nimport sys\nfrom hwlicense.cli import main\nsys.exit(main())\n")
    program.chmod(0o755)
    return python, program
