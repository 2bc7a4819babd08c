"""`hwlicense device check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hwlicense.cli import output
from hwlicense.cli.opening import Opener, opener_options
from hwlicense.cli.options import FILE, json_option
from hwlicense.core.wording import quantity
from hwlicense.device import opening

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from hwlicense.device.model import Model


@click.command()
@opener_options
@click.option(
    "--open",
    "fully",
    is_flag=True,
    help="Open the package and read all of it. Costs one of the license's opens, where the TPM counts them, and with "
    "presence terms recorded answers of a dongle; nothing else.",
)
@json_option
@click.argument("package", type=FILE, metavar="PACKAGE.hwpkg")
def check(
    opener: Opener,
    fully: bool,
    as_json: bool,
    package: Path,
) -> None:
    """Verify a package and its license without key and hardware; with --open, open it and read everything."""
    place = opener.place()
    with opener.package(package) as file:
        if not fully:  # which verifies every chunk on its way
            with output.progress("Verifying", file.size) as advance:
                file.verify(advance)
        today = opening.utc_today()
        installed = opening.first_valid(opening.fitting_licenses(file.manifest, file.vendor, place), today)
        grant = installed.license.grant
        opens = grant.terms_of_use.limits.opens
        if opens and not fully:
            left_by = "`device status` says how many are left"
            output.note(f"The license has {quantity(opens, 'open')}, and opening takes one: {left_by}.")
        if fully:
            if opens:
                from hwlicense.device import reporting  # noqa: PLC0415  # 5 ms, which most licenses need not

                if left := reporting.opens_left(place, installed, today, opener.connect()):
                    output.note(f"The license has {left:,} of {quantity(opens, 'open')} left, and opening spends one.")
            model = opener.open(file)
            members = file.manifest.members  # code, too
            with model, output.progress("Reading", sum(member.size for member in members)) as advance:
                _read_all(model, [member.name for member in members], advance)
            grant = model.grant or grant
    result = {
        "package": file.manifest.name,
        "version": file.manifest.version,
        "vendor": file.vendor.name,
        "license": grant.license,
        "files": len(file.manifest.members),
        "opened": fully,
    }
    if as_json:
        output.emit(result)
    else:
        said = "opened and read" if fully else "verified; a license for it is installed"
        output.say(
            f"{file.manifest.name} {file.manifest.version}, {quantity(len(file.manifest.members), 'file')}: {said}"
        )


def _read_all(model: Model, names: Iterable[str], advance: Callable[[int], None]) -> None:
    for name in names:
        with model.open(name) as file:
            while piece := file.read(1 << 20):
                advance(len(piece))
