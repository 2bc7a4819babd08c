"""`hwlicense vendor measure`: the digests of an application, for the terms."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from hwlicense import storage
from hwlicense.cli import output
from hwlicense.cli.vendor_input import FILE, force_option, refuse_existing, text
from hwlicense.core.errors import Reason, UsageError, naming
from hwlicense.core.terms import parse_measured
from hwlicense.core.wording import quantity
from hwlicense.vendor import measuring

if TYPE_CHECKING:
    from pathlib import Path


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("-o", "--output", "target", type=FILE, required=True, metavar="APP.toml")
@click.option("--python", metavar="PYTHON", help="The interpreter that runs the program.  [default: this one]")
@click.option("--pid", "processes", multiple=True, type=int, metavar="PID", help="Native code of a running process.")
@click.option("--file", "files", multiple=True, type=FILE, metavar="PATH", help="A file, or all files in a folder.")
@click.option(
    "--with",
    "others",
    multiple=True,
    type=FILE,
    metavar="OLD.toml",
    help="Name the files of this table too, of another version: both may run. Required is then what both require.",
)
@force_option
@click.argument("program", nargs=-1, type=click.UNPROCESSED, metavar="[-- PROGRAM]...")
def measure(
    target: Path,
    python: str | None,
    processes: tuple[int, ...],
    files: tuple[Path, ...],
    others: tuple[Path, ...],
    force: bool,
    program: tuple[str, ...],
) -> None:
    """Write the table [application] of the terms: what the process that opens the package may have loaded.

    PROGRAM is SCRIPT or -m MODULE with its arguments. It is run to its end, and all that it has loaded then is
    measured: interpreter, native libraries, Python modules. The program itself and the interpreter are required.
    """
    if not (processes or files or program):
        raise UsageError(Reason.USAGE, "There is nothing to measure.", "Give a program, --pid or --file.")
    if python and not program:
        raise UsageError(Reason.USAGE, "--python is about a program, and there is none.", "Give it after two dashes.")
    if program == ("-m",):
        raise UsageError(Reason.USAGE, "-m has no module after it.", "Give SCRIPT or -m MODULE after the two dashes.")
    refuse_existing(target, force=force)
    measured = measuring.Measurement()
    for path in files:
        measured.add(measuring.files_in(path))
    for process in processes:
        running, libraries = measuring.mapped_by(process)
        measured.add([running], required=True)
        measured.add(libraries)
    if program:
        needed, found = measuring.run(python or sys.executable, program)
        measured.add(needed, required=True)
        measured.add(found)
    for path in others:
        with naming(path):
            measured.admit(parse_measured(text(path)))
    storage.atomic_write(target, measured.text().encode(), 0o644, force=force)
    output.note(
        f"Measured {quantity(len(measured.files), 'file')}, {len(measured.required):,} of them required, into {target}."
    )
    if processes and not program:
        output.note("Python modules are not seen from outside: name them with --file, or give the program.")
