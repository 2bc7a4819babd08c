"""The errors of the simulators. None is ever turned into a skipped test: a missing simulator is a failure."""

from __future__ import annotations

import shutil


class SimulatorError(Exception):
    """A simulator could not do what was asked. `str()` says what happened; `hint` what to do, and may be empty."""

    reason = "SIMULATOR_FAILED"

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


class ProgramMissingError(SimulatorError):
    """A program that a simulator consists of is not installed."""

    reason = "SIMULATOR_MISSING"


_PACKAGES = {
    "swtpm": "swtpm",
    "swtpm_setup": "swtpm-tools",
    "swtpm_localca": "swtpm-tools",
    "setpriv": "util-linux",
    "softhsm2-util": "softhsm2",
    "cc": "gcc",
}


def program(name: str) -> str:
    """The full path of a program. Raises ProgramMissingError, which names the Debian package that has it."""
    if path := shutil.which(name):
        return path
    raise ProgramMissingError(f"the program {name} is not installed", f"sudo apt-get install {_PACKAGES[name]}")
