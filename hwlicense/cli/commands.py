"""The tree of commands. Each group is imported when it is used: a device's commands load nothing of the vendor's."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

import click

from hwlicense import __version__
from hwlicense.core.errors import Reason, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

_COMMANDS: Final = {
    "device": ("hwlicense.cli.device:device", "The machine that runs the model: enroll, install, check, diagnose."),
    "exec": ("hwlicense.cli.executing:execute", "Run a program that is not Python over an open package."),
    "inspect": ("hwlicense.cli.inspecting:inspect", "Show what a file of the project says."),
    "run": ("hwlicense.cli.running:run", "Run the program that is sealed in a package."),
    "simulate": ("hwlicense_simulators.cli:simulate", "Run a command with simulated hardware (hwlicense-simulators)."),
    "vendor": ("hwlicense.cli.vendor:vendor", "The issuing side: keys, packages, licenses, approvals."),
}


class Lazy(click.Group):
    """A group whose commands are imported when they are used: `places` says from where, as MODULE:NAME."""

    def __init__(self, *arguments: Any, places: Mapping[str, str], **options: Any) -> None:  # noqa: ANN401  # as click's
        super().__init__(*arguments, **options)
        self._places = places

    def list_commands(self, _context: click.Context) -> list[str]:
        """Their names, for the help."""
        return sorted(self._places)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        """The command of that name, None where there is none. Raises UsageError EXTRA_MISSING."""
        if name not in self._places:
            return None
        module, _, attribute = self._places[name].partition(":")
        try:
            command: Any = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("hwlicense_simulators"):
                raise
            what = "Simulated hardware comes in a distribution of its own, which is not installed."
            raise UsageError(Reason.EXTRA_MISSING, what, "pip install hwlicense-simulators") from None
        return command if isinstance(command, click.Command) else None


class _Root(Lazy):
    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in sorted(_COMMANDS.items())])


@click.group(
    cls=_Root,
    places={name: place for name, (place, _) in _COMMANDS.items()},
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="hwlicense")
def root() -> None:
    """Bind machine-learning models to the hardware that they were sold for.

    A vendor packs a model and issues a license for one device; the device opens the package only with its own hardware.

    \b
    Exit status: 0 done, 1 refused by the license or the vendor's policy, 2 wrong usage,
    3 hardware missing or failing, 4 damaged or forged input, 5 anything else.
    """  # noqa: D301  # "do not wrap", to click, is this very character
