"""`hwlicense device enroll`, `trust` and `install`: what is done once on a device, or once for a license."""

from __future__ import annotations

import platform
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from hwlicense import storage
from hwlicense.cli import output, secrets
from hwlicense.cli.hardware import NEW_KEYS, NewKey, enrolled_token, found_dongle
from hwlicense.cli.options import FILE, pcrs_option, place_options, token_option, tpm_option
from hwlicense.core.documents import Approval, ClockReset
from hwlicense.core.errors import Reason, UsageError, naming
from hwlicense.core.schema import FILE_LIMIT
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.device import installing, opening, selecting
from hwlicense.device.enrolling import enroll as make_request
from hwlicense.device.home import read_vendor

if TYPE_CHECKING:
    from pathlib import Path

    from hwlicense.core.errors import HwlicenseError
    from hwlicense.core.hardware import AnyHardware


@click.command()
@place_options
@tpm_option
@token_option
@click.option(
    "--usb",
    "dongles",
    multiple=True,
    metavar="SELECTOR",
    help="A USB dongle: any, VENDOR:PRODUCT (in hex) or VENDOR:PRODUCT:SERIAL, with ,slot=1 or ,slot=2 (the default).",
)
@pcrs_option
@click.option(
    "--new-key", type=click.Choice(NEW_KEYS), help="Make a key on the token first; without, one that is there."
)
@click.option(
    "--counted",
    is_flag=True,
    help="Make a counter in the TPM, for licenses with opens, hours or an anchored account. Takes some NV memory.",
)
@secrets.pin_options
@click.option("--name", default=platform.node, help="A label for the vendor.  [default: the host name]")
@click.option("-o", "--output", "target", type=FILE, required=True, metavar="OUT.hwreq")
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
def enroll(
    home: Path | None,
    state: Path | None,
    tpm: str | None,
    tokens: tuple[str, ...],
    dongles: tuple[str, ...],
    pcrs: tuple[str, ...],
    new_key: NewKey | None,
    counted: bool,
    pin_file: Path | None,
    last_try: bool,
    name: str,
    target: Path,
    force: bool,
) -> None:
    """Write a request for a license: what this device's hardware says of itself.

    Without --token and --usb that is the TPM, which quotes the request. With them the TPM is among the hardware only if
    --tpm, --pcrs or --counted is given.
    """
    place = selecting.home(home, state)
    selection = Selection.parse(*pcrs)
    if new_key and len(tokens) != 1:
        raise UsageError(Reason.USAGE, "--new-key makes a key on one token.", "Give exactly one --token with it.")
    uris = selecting.token_uris(tokens, place) if tokens else []
    if len(uris) > 1 and pin_file:
        what = "A file holds the PIN of one token, and several are to be enrolled."
        raise UsageError(Reason.USAGE, what, "Enroll them one at a time; `vendor issue` takes several requests.")
    with_tpm = bool(tpm or pcrs or counted or not (tokens or dongles))
    # Begun first: a wrong path costs nothing, and changes nothing
    with storage.new_file(target, force=force) as file, ExitStack() as stack:
        hardware: list[AnyHardware] = []
        if with_tpm:
            hardware.append(stack.enter_context(selecting.hardware(place, tpm)("tpm")))
        for uri in uris:
            source = secrets.pin_source(pin_file, last_try=last_try)
            hardware.append(stack.enter_context(enrolled_token(uri, source, new_key)))
        hardware += [stack.enter_context(found_dongle(selector)) for selector in dongles]
        file.write(make_request(hardware, selection, name, opening.utc_today(), counted=counted))
        file.flush()
        before = place.enrolled()
        kept = tpm if with_tpm else before.tpm if before else None
        place.keep_enrolled(kept, str(selection), [str(uri) for uri in uris], dongles)
    tpm_part = f"the TPM ({str(selection) or 'no PCRs'}{', with a counter' if counted else ''})"
    kinds = [tpm_part] * with_tpm + ["a token"] * len(uris) + ["a dongle"] * len(dongles)
    output.note(f"Wrote the request {target} for {', '.join(kinds)}. Send it to the vendor.")


@click.command()
@place_options
@click.argument("public", type=FILE, metavar="VENDOR.pub.json")
def trust(home: Path | None, state: Path | None, public: Path) -> None:
    """Trust a vendor for the commands of this group. Applications bring their own trust and ignore this."""
    with naming(public):
        vendor = read_vendor(storage.read_limited(public, FILE_LIMIT))
    selecting.home(home, state).trust(vendor)
    output.note(f"Trusts the vendor {vendor.name!r} (fingerprint {vendor.fingerprint[:16]}).")


@click.command()
@place_options
@tpm_option
@token_option
@click.argument("file", type=FILE, metavar="LICENSE|APPROVAL|CLOCKRESET")
def install(home: Path | None, state: Path | None, tpm: str | None, tokens: tuple[str, ...], file: Path) -> None:
    """Install a license, the approval of a new platform state, or a clock reset. Doing it again is harmless."""
    place = selecting.home(home, state)
    connect = selecting.hardware(place, tpm, tokens, output.note)
    with naming(file):
        installed = installing.install(place, storage.read_limited(file, FILE_LIMIT), connect, _not_checked)
    if isinstance(installed, ClockReset):
        served = "The next opening goes by it, unless one has done so already"
        output.note(f"The clock reset of license {installed.license} is installed. {served}.")
    elif isinstance(installed, Approval):
        output.note(f"Installed the approval of a platform state for {installed.product!r}.")
        grants = [found.license.grant for found in place.licenses(place.trusted())[0]]
        if (installed.product, installed.generation) not in {(grant.product, grant.generation) for grant in grants}:
            output.note(
                f"It is of generation {installed.generation}, which no license here accepts yet: ask for new licenses."
            )
    else:
        packages = ", ".join(f"{p.name} {p.version}" for p in installed.grant.packages)
        output.note(f"Installed license {installed.grant.license}, revision {installed.grant.revision}: {packages}.")


def _not_checked(error: HwlicenseError) -> None:
    later = "install the license again when it is here" if error.reason.startswith("TPM") else "it was not checked"
    output.note(f"warning: not all of the license's hardware is here: {later}. {error.what} {error.hint}".rstrip())
