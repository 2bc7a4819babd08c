"""`hwlicense device probe` and `doctor`: what is here, and what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hwlicense.cli import output
from hwlicense.cli.hardware import plugged_dongles, plugged_tokens
from hwlicense.cli.options import json_option, pcrs_option, place_options, token_option, tpm_option
from hwlicense.core.errors import Reason, UsageError
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.device import diagnosing, selecting

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
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


@click.command()
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
