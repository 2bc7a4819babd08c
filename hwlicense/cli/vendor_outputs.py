"""`hwlicense vendor verify-outputs`: whether signed logs are what the devices wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from hwlicense import storage
from hwlicense.cli import output
from hwlicense.cli.vendor_input import FILE
from hwlicense.core.auditing import moment
from hwlicense.core.documents import VendorPublic
from hwlicense.core.errors import DamagedError, Reason, RefusedError, UsageError, naming
from hwlicense.core.schema import FILE_LIMIT, decode
from hwlicense.core.wording import quantity
from hwlicense.vendor import logs
from hwlicense.vendor.folder import Folder

if TYPE_CHECKING:
    from pathlib import Path

    from hwlicense.core.auditing import Fault, Licensed, Recorded
    from hwlicense.core.errors import HwlicenseError

_SHOWN: Final = 20


@click.command()
@click.option("--vendor", "folder", type=FILE, metavar="VENDOR_DIR", help="The vendor folder.")
@click.option("--vendor-public", type=FILE, metavar="VENDOR.pub.json", help="In its place: the vendor's public keys.")
@click.option(
    "--license",
    "licenses",
    type=FILE,
    required=True,
    multiple=True,
    metavar="LICENSE.hwlic",
    help="The license under which was recorded; all revisions of it that were in use.",
)
@click.option(
    "--first",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="The recording from which on all are to be here, and none before it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.argument("files", nargs=-1, required=True, type=FILE, metavar="FILE...")
def verify_outputs(
    folder: Path | None,
    vendor_public: Path | None,
    licenses: tuple[Path, ...],
    first: int,
    as_json: bool,
    files: tuple[Path, ...],
) -> None:
    """Check signed logs of outputs, offline: the word of the device's hardware, every record, and what is missing.

    FILES are all files of one or more logs; a folder stands for the .hwout files in it. Exits 4 where something was
    forged, changed or taken out; 2 where a license that they name was not given; 1 where a recording was cut, which a
    crash does, too.
    """
    if (folder is None) == (vendor_public is None):
        raise UsageError(Reason.USAGE, "Give either --vendor or --vendor-public.", "See `--help`.")
    place = Folder(folder) if folder else None
    public = place.public if place else _public(vendor_public)
    licensed = logs.licenses(licenses, public, place)
    checked = logs.check(_found(files), licensed, first)
    refusal = _verdict(checked, licensed)
    if as_json:
        output.emit(
            {
                "verdict": str(refusal.reason) if refusal else "intact",
                "recordings": [_recording(each) for each in checked.recordings],
                "faults": [fault._asdict() for fault in checked.faults],
            }
        )
    else:
        _show(checked)
    if refusal:
        for line in (f"error: {refusal.what}", f"reason: {refusal.reason}", f"hint: {refusal.hint}"):
            output.note(line)  # the JSON of `output.failure` would be a second document
        raise click.exceptions.Exit(refusal.exit_status)


def _public(path: Path | None) -> VendorPublic:
    assert path is not None  # noqa: S101  # the caller has one of two
    with naming(path):
        return decode(storage.read_limited(path, FILE_LIMIT), VendorPublic, spaced=True)


def _found(files: tuple[Path, ...]) -> list[Path]:
    found: list[Path] = []
    for path in files:
        with storage.reporting(path):
            found += sorted(path.glob("*.hwout")) if path.is_dir() else [path]
    if not found:
        raise UsageError(Reason.FILE_ABSENT, "There is no .hwout file in the folders given.", "Check the paths.")
    return found


def _verdict(checked: logs.Checked, licensed: Licensed) -> HwlicenseError | None:
    if checked.has("forged"):
        count = sum(fault.severity == "forged" for fault in checked.faults)
        what = f"The logs are not what the device wrote: {quantity(count, 'fault')} that no crash explains."
        return DamagedError(Reason.OUTPUTS_DAMAGED, what, "Get the files again; if they stay so, ask who had them.")
    if checked.has("unjudged"):
        statements = [each.statement for each in checked.recordings]
        lacking = {
            f"{said.license} r{said.revision}"
            for said in statements
            if (said.license, said.revision) not in licensed.licenses
        }
        what = f"The logs cannot be judged without the license that they name: {', '.join(sorted(lacking))}."
        hint = "Give it as well, by a --license of its own. If you never issued it, nothing vouches for those files."
        return UsageError(Reason.OUTPUTS_UNJUDGED, what, hint)
    if checked.has("cut"):
        what = "What is here is genuine, and it is not all: a recording was cut."
        hint = "A crash or power cut explains one cut at the end of a recording; see from when nothing is known."
        return RefusedError(Reason.OUTPUTS_INCOMPLETE, what, hint)
    return None


def _recording(each: Recorded) -> dict[str, Any]:
    quotes = [{"clock": quote.clock, "resets": quote.reset_count, "safe": quote.safe} for quote in each.quotes]
    return {
        "license": each.statement.license,
        "revision": each.statement.revision,
        "log": each.statement.log,
        "recording": each.statement.recording,
        "hardware": each.hardware,
        "from": moment(each.first_wall),
        "to": moment(each.last_wall),
        "records": each.records,
        "signed": each.signed,
        "outputs": each.outputs,
        "inputs": each.inputs,
        "dropped": each.dropped,
        "ended": each.ended,
        "tpm": quotes,
    }


def _show(checked: logs.Checked) -> None:
    for each in checked.recordings:
        said = each.statement
        ended = "ended" if each.ended else "CUT"
        output.say(
            f"log {said.log!r}, recording {said.recording} (license {said.license[:8]} r{said.revision}): {ended}"
        )
        output.columns(
            [
                ("  certified by", each.hardware),
                ("  from", moment(each.first_wall)),
                ("  to", moment(each.last_wall)),
                ("  records", _numbers(each)),
                ("  dropped", f"{each.dropped:,}"),
            ]
        )
    for fault in checked.faults[:_SHOWN]:
        output.say(_line(fault))
    if len(checked.faults) > _SHOWN:
        output.say(f"and {len(checked.faults) - _SHOWN} more (--json shows all)")


def _numbers(each: Recorded) -> str:
    return f"{each.records:,}: {quantity(each.outputs, 'output')}, {quantity(each.inputs, 'input')}"


def _line(fault: Fault) -> str:
    record = "" if fault.record is None else f"record {fault.record}: "
    return f"{fault.severity}: {fault.where}: {record}{fault.what}"
