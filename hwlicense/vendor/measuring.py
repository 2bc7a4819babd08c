"""Measuring an application: digests of the files that it has loaded, for `[application]` in the terms."""

from __future__ import annotations

import ast
import os
import select
import signal
import subprocess
import time
from io import FileIO
from typing import TYPE_CHECKING, Final

import msgspec

from hwlicense import loaded
from hwlicense.core.errors import Reason, UsageError
from hwlicense.core.process import FILE_LIMIT, isolated
from hwlicense.loaded import Loaded
from hwlicense.storage import reporting

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from hwlicense.core.process import Application

# What an opening imports where terms ask for it, and what that imports in turn, is measured whether or not it is here
_RUN: Final = """
import os, sys
try:
    import hwlicense.device.guarding
    from hwlicense.device.memory import sealed_inodes
    from hwlicense.loaded import report
except (ImportError, SyntaxError) as error:
    os.write(int(sys.argv[1]), ascii((sys.executable, f"cannot import hwlicense ({error})")).encode())
    sys.exit()
report(int(sys.argv[1]), sys.argv[2:], sealed_inodes)
"""
_PATIENCE: Final = 1.0  # seconds in which a program ends by itself that the terminal has interrupted, too
_TERMINATING: Final = 10.0  # seconds from SIGTERM to SIGKILL
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

    def admit(self, other: Application) -> None:
        """Files of another version, too. Required are then only those that both require, with the same content."""
        self.required &= {
            file.name for file in other.files if file.required and self.files.get(file.name) == file.digest
        }
        here = set(self.files.values())
        for file in other.files:
            name = file.name
            while self.files.get(name, file.digest) != file.digest:
                name = f"{name} (other version)"[-_NAME_LIMIT:]
            if file.digest not in here:
                self.add([Loaded(name, file.digest)])

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

    SIGINT and SIGTERM end the program, and what it had loaded by then is measured. `hwlicense run` is run as it starts
    itself anew, isolated. Raises UsageError where it fails, or hwlicense is not installed for that interpreter.
    """
    if arguments[0] != "-m" and not os.path.isfile(arguments[0]):  # noqa: PTH113  # as the interpreter looks for it
        raise UsageError(Reason.FILE_ABSENT, f"There is no program {arguments[0]}.", _ABSENT)
    options, environment = ["-c"], dict(os.environ)
    if rest := _of_run(arguments):
        arguments, options, environment = ["-m", "hwlicense", *rest], ["-I", "-c"], isolated(environment)
    reading, writing = os.pipe()
    with FileIO(reading) as report:
        try:
            command = [python, *options, _RUN, str(writing), *arguments]
            program = subprocess.Popen(command, pass_fds=[writing], stdout=2, env=environment)  # noqa: S603  # the user's
        except OSError as error:
            what = f"{python} cannot be run ({error.strerror})."
            raise UsageError(Reason.FILE_ABSENT, what, _ABSENT) from error
        finally:
            os.close(writing)
        with program:
            written, ended = _awaited(program, report)
    try:
        pairs = [ast.literal_eval(line) for line in written.decode("ascii").splitlines()]
    except (ValueError, SyntaxError):  # cut off
        pairs = []
    if not pairs and program.returncode == -signal.SIGKILL and ended:
        what = f"The program did not end within {_TERMINATING:.0f} seconds of SIGTERM, so it was not measured."
        raise UsageError(Reason.USAGE, what, "Let it end on SIGTERM, or by itself.")
    if not pairs or (program.returncode and not ended):
        what = f"The program ended with status {program.returncode}, so it was not measured."
        hint = "Let it open under a license without [application], and end by itself, or by Ctrl-C or SIGTERM to this."
        raise UsageError(Reason.USAGE, what, hint)
    found = [
        Loaded(name, said, "") if isinstance(said, bytes) else Loaded(name, None, str(said)) for name, said in pairs
    ]
    return found[:2], found


def _of_run(arguments: Sequence[str]) -> Sequence[str]:
    """`run` and what follows, where this is `hwlicense run`: as a module, or by the path of the command."""
    if arguments[:2] == ("-m", "hwlicense"):
        rest = arguments[2:]
    else:
        rest = arguments[1:] if os.path.basename(arguments[0]) == "hwlicense" else ()  # noqa: PTH119  # of text
    return rest if rest[:1] == ("run",) else ()


def _awaited(program: subprocess.Popen[bytes], report: FileIO) -> tuple[bytes, bool]:
    """All that a program reports until it has ended, and whether it was this process that ended it, on a signal."""
    asked: list[float] = []
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in kept:
        signal.signal(number, lambda *_: asked.append(time.monotonic()))
    written, more, told = bytearray(), True, False
    try:
        while (ready := select.select([report] if more else [], [], [], 0.1)[0]) or program.poll() is None:
            if ready:
                part = report.read(1 << 16)
                written += part
                more = bool(part)
            waited = time.monotonic() - asked[0] if asked else 0.0
            if waited > _PATIENCE and not told:
                program.terminate()
                told = True
            elif waited > _PATIENCE + _TERMINATING:
                program.kill()
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    return bytes(written), bool(asked)


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode().replace("\x7f", "\\u007f")  # as a basic string of TOML
