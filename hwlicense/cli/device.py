"""`hwlicense device`: what the integrator and the operator do on the machine that runs the model."""

from __future__ import annotations

import platform
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from hwlicense import storage
from hwlicense.cli import output, secrets
from hwlicense.cli.hardware import NEW_KEYS, NewKey, enrolled_token, found_dongle, plugged_dongles, plugged_tokens
from hwlicense.cli.opening import Opener, opener_options
from hwlicense.cli.options import FILE, json_option, pcrs_option, place_options, token_option, tpm_option
from hwlicense.cli.status import status
from hwlicense.core.documents import Approval, ClockReset
from hwlicense.core.errors import Reason, UsageError, naming
from hwlicense.core.schema import FILE_LIMIT
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.wording import quantity
from hwlicense.device import diagnosing, installing, opening, reporting, selecting
from hwlicense.device.enrolling import enroll as make_request
from hwlicense.device.home import read_vendor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from hwlicense.core.errors import HwlicenseError
    from hwlicense.core.hardware import AnyHardware
    from hwlicense.device.model import Model


@click.group()
def device() -> None:
    """The machine that runs the model: enroll, install, check, diagnose."""


@device.command()
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


@device.command()
@place_options
@click.argument("public", type=FILE, metavar="VENDOR.pub.json")
def trust(home: Path | None, state: Path | None, public: Path) -> None:
    """Trust a vendor for the commands of this group. Applications bring their own trust and ignore this."""
    with naming(public):
        vendor = read_vendor(storage.read_limited(public, FILE_LIMIT))
    selecting.home(home, state).trust(vendor)
    output.note(f"Trusts the vendor {vendor.name!r} (fingerprint {vendor.fingerprint[:16]}).")


@device.command()
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


@device.command()
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
            if opens and (left := reporting.opens_left(place, installed, today, opener.connect())):
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


device.add_command(status)


@device.command()
@place_options
@tpm_option
@token_option
@click.option("--usb", is_flag=True, help="Show the USB dongles that are plugged in.")
@pcrs_option
@json_option
def probe(
    home: Path | None,
    state: Path | None,
    tpm: str | None,
    tokens: tuple[str, ...],
    usb: bool,
    pcrs: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show what this device's TPM is and, with --pcrs, its present values.

    The output is in the form that `vendor approve --pcrs` takes. With --token (pkcs11:?module-path=/usr/lib/MODULE.so)
    it shows that module's tokens instead, with their URIs, and with --usb the dongles, with their selectors.
    """
    place = selecting.home(home, state)
    if tokens or usb:
        if tpm or pcrs:
            what = "--tpm and --pcrs are about the TPM, --token and --usb about tokens and dongles."
            raise UsageError(Reason.USAGE, what, "Ask for one kind at a time.")
        found_tokens = plugged_tokens(selecting.token_uris(tokens, place)) if tokens else []
        found_dongles = plugged_dongles() if usb else []
        if as_json:
            output.emit({"tokens": found_tokens, "dongles": found_dongles})
            return
        for found in (*found_tokens, *found_dongles):
            output.columns([(key, output.shown(value)) for key, value in found.items()])
            output.say()
        if not found_tokens and not found_dongles:
            output.note("Nothing is plugged in.")
        return
    facts = diagnosing.probe(selecting.tpm_address(tpm, place), Selection.parse(*pcrs))
    values = facts.pop("pcrs")
    if as_json:
        output.emit(
            {**facts, "pcrs": {bank: {str(i): v.hex() for i, v in found.items()} for bank, found in values.items()}}
        )
        return
    for name, value in facts.items():
        output.say(f"# {name}: {output.shown(value)}")
    for bank, found in values.items():
        output.say()
        output.say(f"[{bank}]")
        for index, value in found.items():
            output.say(f'{index} = "{value.hex()}"')


@device.command()
@place_options
@tpm_option
@token_option
@json_option
def doctor(home: Path | None, state: Path | None, tpm: str | None, tokens: tuple[str, ...], as_json: bool) -> None:
    """Say what is here, what is missing, and which command or group mends it. Exit status 3 if something is."""
    place = selecting.home(home, state)
    findings = diagnosing.examine(place, tpm, tokens)
    if as_json:
        output.emit([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            output.say(f"{finding.state:<7} {finding.subject}: {finding.text}")
            if finding.mend:
                output.say(f"        mend: {finding.mend}")
    if any(finding.state == "missing" for finding in findings):
        raise click.exceptions.Exit(3)


def _not_checked(error: HwlicenseError) -> None:
    later = "install the license again when it is here" if error.reason.startswith("TPM") else "it was not checked"
    output.note(f"warning: not all of the license's hardware is here: {later}. {error.what} {error.hint}".rstrip())


def _read_all(model: Model, names: Iterable[str], advance: Callable[[int], None]) -> None:
    for name in names:
        with model.open(name) as file:
            while piece := file.read(1 << 20):
                advance(len(piece))
