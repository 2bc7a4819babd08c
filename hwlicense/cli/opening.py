"""What every command that opens a package takes: where the license lies, the hardware, and PINs."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import msgspec

from hwlicense.cli import output, secrets
from hwlicense.cli.options import place_options, token_option, tpm_option
from hwlicense.core.errors import naming
from hwlicense.device import opening, selecting
from hwlicense.device.home import by_any
from hwlicense.device.reading import PackageFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hwlicense.core.hardware import PinSource
    from hwlicense.device.bound import Connect
    from hwlicense.device.home import Home
    from hwlicense.device.model import Model

_OPTIONS = (secrets.token_pin_option, secrets.pin_options, token_option, tpm_option, place_options)


class Opener(msgspec.Struct, frozen=True):
    """The options as they were given."""

    home: Path | None
    state: Path | None
    tpm: str | None
    tokens: tuple[str, ...]
    pin_file: Path | None
    token_pin_file: Path | None
    last_try: bool

    def place(self) -> Home:
        """The device's home. Raises UsageError."""
        return selecting.home(self.home, self.state)

    def package(self, path: Path) -> PackageFile:
        """A package of a vendor that the home trusts. Raises as `PackageFile`, and RefusedError VENDOR_UNTRUSTED."""
        place = self.place()
        with naming(path):
            return by_any(place.trusted(), lambda vendor: PackageFile(path, vendor), place.path)[0]

    def connect(self) -> Connect:
        """The hardware, which is not asked yet."""
        return selecting.hardware(self.place(), self.tpm, self.tokens, output.note)

    def pin(self) -> PinSource | None:
        """Where PINs come from."""
        return secrets.pin_source(self.pin_file, self.token_pin_file, last_try=self.last_try)

    def open(self, package: PackageFile, pin: PinSource | None = None) -> Model:
        """Open it, with PINs from `pin` or as the options say. Raises as `hwlicense.open`."""
        return opening.open_package(package, self.place(), self.connect(), pin or self.pin())


def opener_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give the command an `opener` from these options."""

    @functools.wraps(function)
    def collected(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401  # as click calls any command
        opener = Opener(**{name: options.pop(name) for name in Opener.__struct_fields__})
        return function(*arguments, opener=opener, **options)

    made: Callable[..., Any] = collected
    for option in _OPTIONS:
        made = option(made)
    return made
