"""`hwlicense vendor revise` and `hwlicense vendor reset-clock`: what changes a license that is in the field."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

import click

from hwlicense import storage
from hwlicense.cli import output, secrets
from hwlicense.cli.vendor_input import FILE, force_option, vendor_option
from hwlicense.core.documents import License
from hwlicense.core.envelope import verified
from hwlicense.core.schema import FILE_LIMIT
from hwlicense.vendor import resetting
from hwlicense.vendor.folder import Folder

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@vendor_option
@click.option(
    "--license", "licensed", type=FILE, required=True, metavar="LICENSE.hwlic", help="Any revision of the license."
)
@click.option("-o", "--output", "target", type=FILE, required=True, metavar="OUT.hwclk")
@force_option
@secrets.passphrase_option
def reset_clock(folder: Path, licensed: Path, target: Path, force: bool, passphrase_file: Path | None) -> None:
    """Tell a device what time it is, where it remembers a time that was wrong.

    A device refuses when its clock is behind what it was: so after it was set far forward by mistake. The reset holds
    this machine's time and serves one license; `device install` takes it in. Send it only where it is needed: whoever
    keeps it for later can have its time believed then.
    """
    place = Folder(folder)
    with output.naming(licensed):
        document = verified(storage.read_limited(licensed, FILE_LIMIT), License, place.public)
    keys = secrets.unlock(place, passphrase_file)
    now = datetime.datetime.now(datetime.UTC)
    _, sealed = resetting.reset_clock(keys, document, now)
    with storage.new_file(target, force=force) as file:
        file.write(sealed)
    output.note(f"Reset the clock of license {document.grant.license} to {now:%Y-%m-%d %H:%M:%S} UTC in {target}.")
