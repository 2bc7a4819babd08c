"""`hwlicense run`: a sealed program, in an interpreter that takes nothing from the user's environment."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, NoReturn

import click

from hwlicense.cli import USUAL_COLLECTION, output
from hwlicense.cli.opening import Opener, opener_options
from hwlicense.cli.options import FILE
from hwlicense.core.errors import HwlicenseError, Reason, UsageError, naming
from hwlicense.core.process import isolated
from hwlicense.device import running, sealed_code, sealed_resources

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from hwlicense.core.code import Entry

_INTERRUPTED: Final = 130
_HUNG_UP: Final = 129
_IMPORTING: Final = (__name__, running.__name__, sealed_code.__name__, sealed_resources.__name__)


@click.command(context_settings={"allow_interspersed_args": False})
@opener_options
@click.option("--entry", metavar="MODULE:FUNCTION", help="Where to begin.  [default: as the vendor packed it]")
@click.argument("package", type=FILE, metavar="PACKAGE.hwpkg")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[--] [ARGS]...")
@click.pass_context
def run(
    context: click.Context,
    opener: Opener,
    entry: str | None,
    package: Path,
    arguments: tuple[str, ...],
) -> NoReturn:
    """Run the program in a package, under its license. Nothing of it is written to a disk.

    Python starts isolated (as by -I): without the variables PYTHON*, LD_PRELOAD and LD_AUDIT, the user's site folder
    and modules of the current folder. ARGS are the program's; its exit status is this command's.
    """
    own = {option for parameter in context.command.params for option in parameter.opts if option.startswith("-")}
    if arguments and arguments[0].partition("=")[0] in own | {"--help"}:
        what = f"{arguments[0]} follows the package, so that it would be the program's."
        raise UsageError(Reason.USAGE, what, "Put it before the package; or `--` before it, if it is the program's.")
    isolate()
    with ExitStack() as stack:
        file = stack.enter_context(opener.package(package))
        with naming(package):
            begin = running.entry_of(file.manifest, entry)
        model = stack.enter_context(opener.open(file))
        stack.enter_context(model.importer())
        stack.enter_context(running.started(model))
        # After threads and exit handlers of the program: they may still need the model
        atexit.register(_close, stack.pop_all())
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # the terminal is gone, and nobody ignores that (nohup)
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(_HUNG_UP))
    _end_children_at_once()
    gc.set_threshold(*USUAL_COLLECTION)
    sys.argv = [str(package), *(arguments[1:] if arguments[:1] == ("--",) else arguments)]
    sys.exit(_status(begin))


def isolate() -> None:
    """Start anew, isolated, unless that is so already. No secret is there yet. Raises UsageError."""
    clean = isolated(os.environ)
    if sys.flags.isolated and len(clean) == len(os.environ):
        return
    if not sys.executable:
        raise UsageError(Reason.USAGE, "Python does not know its own path.", "Start it by its full path.")
    os.execve(sys.executable, [sys.executable, "-I", "-m", "hwlicense", *sys.argv[1:]], clean)  # noqa: S606  # no shell


def _status(begin: Entry) -> int | str | None:
    """Run the program to its end; its exit status, as sys.exit takes it."""
    try:
        status = running.begin(begin)
    except SystemExit as end:
        return end.code
    except HwlicenseError as error:
        output.failed(error)
        return error.exit_status
    except BaseException as error:  # noqa: BLE001  # the program's own, shown as Python shows it
        trace = _without_own(error.__traceback__)
        shown = error.with_traceback(trace)
        sys.excepthook(type(shown), shown, trace)
        return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    return status if isinstance(status, int | str) else None if status is None else str(status)


def _without_own(trace: TracebackType | None) -> TracebackType | None:
    """What Python shows of its own importing: nothing, at the beginning and where sealed code is found and read."""
    while trace and trace.tb_frame.f_globals.get("__name__", "").startswith((*_IMPORTING, "importlib")):
        trace = trace.tb_next
    last = trace
    while last:
        following = last.tb_next
        while following and following.tb_frame.f_globals.get("__name__", "").startswith(_IMPORTING):
            following = following.tb_next
        last.tb_next = following
        last = following
    return trace


def _close(stack: ExitStack) -> None:
    try:
        stack.close()
    except HwlicenseError as error:
        output.failed(error)


def _end_children_at_once() -> None:
    """SIGTERM and SIGHUP end a child that the program forks at once, as the parent expects that terminates it.

    Blocked meanwhile: the exception that it is in this process would come in the midst of other handlers of forking.
    """
    before: list[set[signal.Signals]] = []

    def block() -> None:
        before.append({signal.Signals(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, ours.keys())})

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before.pop())

    def in_child() -> None:
        for number, handler in ours.items():
            if callable(handler) and signal.getsignal(number) is handler:
                signal.signal(number, signal.SIG_DFL)
        unblock()

    ours = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=in_child)
