"""`hwlicense device status`: what is installed, what is left of it and when there is more."""

from __future__ import annotations

import datetime
import time
from typing import TYPE_CHECKING, Any, Final

import click

from hwlicense.cli import output
from hwlicense.cli.options import json_option, place_options, tpm_option
from hwlicense.core.durations import spelled, waiting
from hwlicense.device import opening, reporting, selecting, usage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hwlicense.core.errors import HwlicenseError
    from hwlicense.device.home import Home

_ACCOUNT: Final = {
    "unverified": "its own word, checked when the license is opened ({})",
    "unreadable": "damaged, or not to be read: what is left is seen when the license is opened ({})",
    "absent": "none in {} yet: the first opening begins it (if there was one, it is gone)",
    "missing": "none in {}, though the TPM has counted opens: it is in another state folder, or gone",
    "unused": "none yet: the TPM has counted no open",
}

_SECONDS: Final = ("continuity", "presence_interval", "grace", "grace_left", "guard_interval")
"""What JSON has in seconds."""


@click.command()
@place_options
@tpm_option
@click.option(
    "--watch",
    type=click.FloatRange(min=0.2),
    is_flag=False,
    flag_value=2.0,
    metavar="SECONDS",
    help="Show it again and again, until interrupted.  [default: every 2 seconds]",
)
@json_option
def status(home: Path | None, state: Path | None, tpm: str | None, watch: float | None, as_json: bool) -> None:
    """Show what is installed, what it allows, how much of it is left and who enforces it.

    Spends nothing. Asks the TPM where the license has opens or powered-on hours that the TPM counts. What the runtime
    counts is read from the state folder as it lies there: it is checked when the license is opened. With --watch and
    --json, each time is one line. `time` in JSON is in UTC. Interrupted, it ends with exit status 130.
    """
    place = selecting.home(home, state)
    if watch is None:
        _report(place, tpm, as_json=as_json, watched=False)
        return
    try:
        while True:
            _report(place, tpm, as_json=as_json, watched=True)
            time.sleep(watch)
    except KeyboardInterrupt:  # as it is meant to end: nothing is to be said
        output.after_interrupt()
        raise click.exceptions.Exit(130) from None


def _report(place: Home, tpm: str | None, *, as_json: bool, watched: bool) -> None:
    now = datetime.datetime.now(datetime.UTC)
    entries, problems = reporting.status(place, opening.utc_today(), selecting.hardware(place, tpm))
    if as_json:
        told = [{"reason": p.reason, "what": p.what, "hint": p.hint} for p in problems]
        found = {"home": str(place.path), "licenses": entries, "problems": told}
        output.emit({"time": f"{now:%Y-%m-%dT%H:%M:%SZ}"} | found, indent=not watched)
        return
    if watched:
        click.clear()
        output.say(f"{now.astimezone():%Y-%m-%d %H:%M:%S %Z}")
        output.say()
    _show(place, entries, problems)


def _show(place: Home, entries: list[dict[str, Any]], problems: list[HwlicenseError]) -> None:
    if not entries and not problems:
        output.note(f"No license by a trusted vendor is installed in {place.path}.")
    for entry in entries:
        limits, unreached = entry.pop("limits", []), entry.pop("unreached", None)
        rows = list(_rows(entry, unreached))
        output.columns([*rows, *((f"limit {row['limit']}", _left(row, unreached)) for row in limits)])
        output.say()
    for problem in problems:
        output.note(f"problem: {problem.what} ({problem.reason})")
        if problem.hint:
            output.note(f"hint: {problem.hint}")


def _rows(entry: dict[str, Any], unreached: dict[str, str] | None) -> Iterator[tuple[str, str]]:
    refusal, folder = entry.pop("refusal"), entry.pop("account_folder", "")
    if "account" in entry:
        entry["account"] = _ACCOUNT[entry["account"]].format(folder)
    if "uncharged" in entry:
        entry["uncharged"] = usage.left_open(**entry["uncharged"])
    if "monitor" in entry:
        entry["monitor"] = "; ".join(_monitored(entry["monitor"]))
    if "charged_in_doubt" in entry:
        entry["charged_in_doubt"] = f"{entry['charged_in_doubt']:,}"
    entry |= {key: spelled(entry[key]) for key in _SECONDS if key in entry}
    for key, value in entry.items():
        if key != "days_left" or value is not None:  # without an end there are none
            yield key, output.shown(value)
        if key == "state" and refusal:
            yield "", f"{refusal['what']} {refusal['hint']}"
        if key == "state" and unreached:
            why = f"{unreached['what']} {unreached['hint']}"
            yield "", f"the TPM was not reached, so it is not known whether it opens: {why}"


def _monitored(found: dict[str, Any]) -> Iterator[str]:
    if not found["found_by"]:
        yield "unknown: see account" if found["in_force"] is None else "nothing found"
        return
    yield f"{found['in_force']}, found by {output.shown(found['found_by'])}"
    if "throttled" in found:
        more = f", more in {waiting(found['refills_in'])}" if "refills_in" in found else ""
        yield f"{found['left']:,} left of {found['throttled']}{more}"
    if "for_seconds" in found:
        yield f"for {waiting(found['for_seconds'])}"


def _left(row: dict[str, Any], unreached: dict[str, str] | None) -> str:
    if row["left"] is None:
        by_account = row["enforced_by"].startswith("runtime, ")
        why = ": the TPM was not reached" if unreached and row["enforced_by"] == "TPM" else ""
        text = f"unknown, of {row['of']:,}{': see account' if by_account else why}"
    else:
        text = f"{row['left']:,} of {row['of']:,} left{'' if row['verified'] else ' by the account'}"
    text += f"; enforced by: {row['enforced_by']}"
    return f"{text}; more in {waiting(row['refills_in'])}" if "refills_in" in row else text
