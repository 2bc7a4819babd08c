"""Measuring an application: digests of the files that it has loaded, for `[application]` in the terms."""

from __future__ import annotations

import ast
import os
import subprocess
from typing import TYPE_CHECKING, Final

import msgspec

from hwlicense import loaded
from hwlicense.core.errors import Reason, UsageError
from hwlicense.core.process import FILE_LIMIT
from hwlicense.loaded import Loaded
from hwlicense.storage import reporting

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

# What an opening imports where terms ask for it, and what that imports in turn, is measured whether or not it is here
_RUN: Final = (
    "import sys, hwlicense.device.guarding; from hwlicense.loaded import report; report(int(sys.argv[1]), sys.argv[2:])"
)
_NAME_LIMIT: Final = 500
_ABSENT: Final = "Check the path."


class Measurement:
    """Files by name, with SHA-256 of their content; and the names of those that must be loaded."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.required: set[str] = set()

    def add(self, found: Iterable[Loaded], *, required: bool = False) -> None:
        """Raises UsageError for what cannot be measured, or more than a license can name."""
        for one in found:
            if one.digest is None or self.files.get(one.name, one.digest) != one.digest:
                what = f"{one.name} {one.problem or 'was changed while it was measured'}, so it cannot be measured."
                raise UsageError(Reason.USAGE, what, "Measure an application that is installed as it will be sold.")
            name = one.name.encode(errors="backslashreplace").decode()[-_NAME_LIMIT:]
            self.files[name] = one.digest
            self.required |= {name} if required else set()
        if len(self.files) > FILE_LIMIT:
            what = f"A license names at most {FILE_LIMIT:,} files, and there are {len(self.files):,}."
            raise UsageError(Reason.USAGE, what, "Measure what the application loads: a command, not whole folders.")

    def text(self) -> str:
        """The table `[application]` of the terms, in TOML."""
        lines = ["[application]", f"required = [{', '.join(map(_quoted, sorted(self.required)))}]", ""]
        lines.append("[application.files]")
        lines += [f'{_quoted(name)} = "{self.files[name].hex()}"' for name in sorted(self.files)]
        return "\n".join(lines) + "\n"


def files_in(path: Path) -> Iterator[Loaded]:
    """A file, or all of a folder but caches of bytecode. Raises UsageError FILE_ABSENT."""
    if not path.exists():
        raise UsageError(Reason.FILE_ABSENT, f"{path} does not exist.", _ABSENT)
    inside = sorted(path.rglob("*")) if path.is_dir() else [path]
    for each in inside:
        if each.is_file() and each.parent.name != "__pycache__":
            with reporting(each):
                yield Loaded(str(each.resolve()), loaded.file_digest(each))


def mapped_by(process: int) -> tuple[Loaded, list[Loaded]]:
    """The program that a process runs, and its native libraries. Raises UsageError where it may not be looked at."""
    try:
        found = list(loaded.native(process))
        program = os.readlink(f"/proc/{process}/exe")  # noqa: PTH115  # no path of this one's
    except OSError as error:
        what = f"The process {process} cannot be looked at ({error.strerror})."
        hint = "Give a running process of your own; one that has opened a model can be looked at by root alone."
        raise UsageError(Reason.USAGE, what, hint) from error
    named = next((one for one in found if one.name == program.removesuffix(" (deleted)")), None)
    if named is None:
        what = f"The program of process {process}, {program}, is not among what it has mapped."
        raise UsageError(Reason.USAGE, what, "Start it anew: it was replaced since, as a rule.")
    return named, found


def run(python: str, arguments: Sequence[str]) -> tuple[list[Loaded], list[Loaded]]:
    """Run a program by this interpreter to its end: program and interpreter, and all that it had loaded then.

    Raises UsageError where it fails, or hwlicense is not installed for that interpreter.
    """
    if arguments[0] != "-m" and not os.path.isfile(arguments[0]):  # noqa: PTH113  # as the interpreter looks for it
        raise UsageError(Reason.FILE_ABSENT, f"There is no program {arguments[0]}.", _ABSENT)
    reading, writing = os.pipe()
    with os.fdopen(reading, encoding="ascii") as lines:
        try:
            command = [python, "-c", _RUN, str(writing), *arguments]
            started = subprocess.Popen(command, pass_fds=[writing], stdout=2)  # noqa: S603  # what the user names
        except OSError as error:
            what = f"{python} cannot be run ({error.strerror})."
            raise UsageError(Reason.FILE_ABSENT, what, _ABSENT) from error
        finally:
            os.close(writing)
        with started:
            written = list(lines)
    try:
        pairs = [ast.literal_eval(line) for line in written]
    except (ValueError, SyntaxError):  # cut off
        pairs = []
    if started.returncode or not pairs:
        what = f"The program ended with status {started.returncode}, so it was not measured."
        raise UsageError(Reason.USAGE, what, "It must run to its end, under a Python that hwlicense is installed for.")
    found = [
        Loaded(name, said, "") if isinstance(said, bytes) else Loaded(name, None, str(said)) for name, said in pairs
    ]
    return found[:2], found


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode().replace("\x7f", "\\u007f")  # as a basic string of TOML
