"""`hwlicense exec`: run a program that is not Python over an open model."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Final

import click

import hwlicense
from hwlicense.cli import output
from hwlicense.cli.opening import Opener, opener_options
from hwlicense.cli.options import FILE
from hwlicense.core.errors import HwlicenseError, Reason, RefusedError, UsageError
from hwlicense.device import executing
from hwlicense.device.memory import protection
from hwlicense.device.tree import Tree

if TYPE_CHECKING:
    from hwlicense.core.hardware import PinSource
    from hwlicense.core.secret import Secret
    from hwlicense.device.reading import PackageFile

_STATUSES: Final = {Reason.COMMAND_ABSENT: 127, Reason.COMMAND_UNUSABLE: 126}


def _show_include(context: click.Context, _parameter: click.Parameter, asked: bool) -> None:
    if asked:
        output.say(str(Path(hwlicense.__file__).parent / "include"))
        context.exit()


@click.command("exec")
@opener_options
@click.option("--at", type=FILE, metavar="DIR", help="An empty folder: there, COMMAND sees the package's files.")
@click.option("--executable", is_flag=True, help="With --at: let files in DIR be run, and loaded as libraries.")
@click.option("--fd", "as_fds", is_flag=True, help="Pass the files as descriptors of sealed memory.")
@click.option(
    "--include-dir",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_include,
    help="Print the folder of hwlicense.h, for a C compiler's -I.",
)
@click.argument("package", type=FILE, metavar="PACKAGE.hwpkg")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.pass_context
def execute(
    context: click.Context,
    opener: Opener,
    at: Path | None,
    executable: bool,
    as_fds: bool,
    package: Path,
    command: tuple[str, ...],
) -> None:
    """Open a package, and run COMMAND over its files in memory.

    With --at they are read-only files in DIR, which COMMAND and what it starts see, and no other process. With --fd a
    {NAME} in COMMAND is replaced by a path to that file's memory, and HWLICENSE_FDS has all descriptors, as JSON.
    HWLICENSE_SOCKET is the descriptor by which COMMAND spends inferences.

    The exit status is COMMAND's, 128+N where signal N ended it, 127 where it is not found, 126 where it cannot be run.
    Where the license asks for presence and the hardware is gone, or for a guard and it finds something, COMMAND gets
    SIGTERM, and ten seconds later SIGKILL.
    """
    if (at is None) != as_fds:
        what = "--at and --fd exclude each other." if at else "How is COMMAND to get the files?"
        raise UsageError(Reason.USAGE, what, "Give --at DIR, or --fd.")
    if executable and as_fds:
        raise UsageError(Reason.USAGE, "--executable is about the folder of --at.", "Leave it out with --fd.")
    file = opener.package(package)
    members = [file.layout.members[name] for name in file.layout.names]  # its code is not for programs
    if not members:
        output.note("The package has no files but code: COMMAND gets none. `hwlicense run` runs the code.")
    try:
        with file:
            executing.check_command(command[0], at, executable=executable)
            mount = executing.mount(at, members, executable=executable) if at else None
            with Tree(command, mount, [member.name for member in members] if as_fds else []) as tree:
                status = _run(opener, file, tree)
    except HwlicenseError as error:
        if error.reason not in _STATUSES:
            raise
        output.failed(error)
        status = _STATUSES[error.reason]
    context.exit(status)


def _run(opener: Opener, file: PackageFile, tree: Tree) -> int:
    started, pin = Event(), opener.pin()
    if pin and not (opener.pin_file or opener.token_pin_file):
        pin = _until(started, pin)
    with opener.open(file, pin) as model:
        program = executing.Program(model, tree)
        _warn_of_swap()
        started.set()
        try:
            return program.run()
        finally:
            if program.fault:
                output.note(f"A question of COMMAND's had no answer: {program.fault.what} {program.fault.hint}")


def _until(started: Event, source: PinSource) -> PinSource:
    """A source that asks no more once the terminal is COMMAND's: what is typed there then is not meant for it."""

    def ask(prompt: str, /, *, last_try: bool = False) -> Secret:
        if started.is_set():
            what = "A PIN is needed again, and the terminal is COMMAND's by now."
            raise RefusedError(Reason.PIN_NEEDED, what, "Give --pin-file, which is read again.")
        return source(prompt, last_try=last_try)

    return ask


def _warn_of_swap() -> None:
    if left := protection().swappable:
        output.note(f"{left:,} bytes of keys and plaintext may be swapped out: raise `ulimit -l`, or encrypt the swap.")
