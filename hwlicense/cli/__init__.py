"""The command line: thin, the only importer of click, and the one place where errors become exit statuses."""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import TYPE_CHECKING, Final, NoReturn

from hwlicense.core.errors import HwlicenseError, Reason, unforeseen

if TYPE_CHECKING:
    from types import FrameType

    import click

USUAL_COLLECTION: Final = gc.get_threshold()
"""For programs that a command runs within its own process."""


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 refused, 2 usage, 3 hardware, 4 damaged or forged input, 5 other."""
    signal.signal(signal.SIGTERM, _terminated)
    gc.set_threshold(50_000)  # looking for garbage among what was just imported costs a tenth of a command's time
    try:
        from hwlicense.cli.commands import root  # noqa: PLC0415  # so that signals are heeded from the start

        status = _run(root)
    except KeyboardInterrupt:  # before the command began, or when it had ended
        status = 130
    # Not sys.exit(): taking the interpreter apart costs an eighth of a command's time. Nothing is left to do by now:
    # click flushes what it prints, files and hardware are closed, and keys are wiped where their blocks end.
    os._exit(status)


def _run(command: click.Command) -> int:  # noqa: PLR0911  # one return for each way to end
    import click  # noqa: PLC0415  # when `main` has set how often garbage is looked for

    from hwlicense.cli import output  # noqa: PLC0415

    try:
        status = command.main(standalone_mode=False, prog_name="hwlicense")
    except HwlicenseError as error:
        output.failed(error)
        return error.exit_status
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.Abort:
        output.note("interrupted")
        return 130
    except click.exceptions.NoArgsIsHelpError as error:  # a group without a command: the help is the answer
        click.echo(error.ctx.get_help(), err=True)
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"See `{context.command_path} --help`." if context else ""
        output.failure(Reason.USAGE, error.format_message().rstrip(".") + ".", hint)
        return 2
    except KeyboardInterrupt:
        output.note("interrupted")
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except OSError as error:  # of what no other place reads or writes: standard output on a full disk, say
        what = f"{error.filename or 'Output'}: {error.strerror}."
        output.failure(Reason.STORAGE, what, "Check the disk and the permissions.")
        return 5
    except Exception as error:  # noqa: BLE001  # the last net: a traceback could show what it must not, so name only the place
        said = unforeseen(error)
        output.failure(said.reason, said.what, said.hint)
        return 5
    return status if isinstance(status, int) else 0


def _terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(143)  # as an exception, so that everything half-written is removed on the way out
