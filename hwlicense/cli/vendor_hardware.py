"""`hwlicense vendor dongle` and `hwlicense vendor token`: hardware that the vendor prepares and sends."""

from __future__ import annotations

import datetime
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hwlicense import storage
from hwlicense.cli import output, secrets
from hwlicense.cli.hardware import NEW_KEYS, NewKey, enrolled_token
from hwlicense.core.documents import Request, TokenEvidence
from hwlicense.core.envelope import assemble
from hwlicense.core.errors import Reason, UsageError
from hwlicense.core.schema import SCHEMA, check
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.uri import TokenUri
from hwlicense.core.wording import quantity
from hwlicense.vendor import dongles, evidence
from hwlicense.vendor.folder import Folder, TokenRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from hwlicense.binders.usb import Dongle
    from hwlicense.core.documents import Evidence
    from hwlicense.core.dongle import Mode

FILE = click.Path(path_type=Path, readable=False)
vendor_option = click.option(
    "--vendor", "folder", type=FILE, required=True, metavar="VENDOR_DIR", help="The vendor folder."
)
usb_option = click.option(
    "--usb",
    "selector",
    default="any",
    show_default=True,
    metavar="SELECTOR",
    help="Which dongle: any, VENDOR:PRODUCT (in hex) or VENDOR:PRODUCT:SERIAL, with ,slot=1 or ,slot=2 (the default).",
)
request_option = click.option(
    "-o", "--output", "target", type=FILE, metavar="OUT.hwreq", help="Write a request for it, to issue a license with."
)
force_option = click.option("--force", is_flag=True, help="Replace the output file if it exists.")


@click.group()
def dongle() -> None:
    """USB dongles that answer challenges (HMAC-SHA1): program them, or record the answers of one."""


@dongle.command()
@vendor_option
@usb_option
@click.option("--touch", is_flag=True, help="Answer only when touched; not for licenses that ask for presence.")
@click.option(
    "--mode",
    type=click.Choice(["less-than-64", "fixed-64"]),
    default="less-than-64",
    show_default=True,
    help="How the dongle reads challenges; other programs may want the one or the other.",
)
@click.option("--replace-slot", is_flag=True, help="Write over a slot in use: licenses for what is in it end.")
@request_option
@force_option
@secrets.passphrase_option
def program(
    folder: Path,
    selector: str,
    touch: bool,
    mode: Mode,
    replace_slot: bool,
    target: Path | None,
    force: bool,
    passphrase_file: Path | None,
) -> None:
    """Write a fresh secret into a slot of a dongle, under a fresh access code. Both stay in the vendor folder, sealed.

    Whoever knows the secret can copy the dongle; it can be read out of neither the dongle nor the folder without the
    vendor's keys.
    """
    place = Folder(folder)
    keys = secrets.unlock(place, passphrase_file)
    with _request(target, force=force) as keep, storage.exclusive(place.path), _one(selector) as (device, slot):
        made = dongles.program(place, keys, device, slot, touch=touch, mode=mode, overwrite=replace_slot)
        keep(made.evidence)
    _say(f"Programmed the dongle {made.record.dongle} (slot {slot}, serial {made.record.serial or 'not told'})", target)


@dongle.command("enroll")
@vendor_option
@usb_option
@click.option(
    "--answers",
    type=click.IntRange(1, dongles.POOL_LIMIT),
    default=5000,
    show_default=True,
    help="How many answers to record: each license takes one, and as many as its presence.answers.",
)
@request_option
@force_option
@secrets.passphrase_option
def enroll_dongle(
    folder: Path, selector: str, answers: int, target: Path | None, force: bool, passphrase_file: Path | None
) -> None:
    """Record answers of a dongle that was programmed elsewhere, so that licenses can be issued for it.

    For one that was programmed here nothing is recorded: its answers are known. With -o it gets a further request.
    """
    place = Folder(folder)
    keys = secrets.unlock(place, passphrase_file)
    with _request(target, force=force) as keep, storage.exclusive(place.path), _one(selector) as (device, slot):
        if answers > 1 and device.touch_wanted(slot):
            what = f"Slot {slot} of this dongle wants a touch for each of {answers:,} answers."
            raise UsageError(Reason.USAGE, what, "Give --answers with as many touches as you are ready for.")
        with output.progress("Recording", answers + 1, in_bytes=False) as advance:

            def ask(challenge: bytes) -> Any:  # noqa: ANN401  # a Secret
                advance(1)
                return device.ask(slot, challenge, output.note)

            made = dongles.enroll(place, keys, device, slot, answers, ask)
        keep(made.evidence)
    if made.record.mode:
        _say(f"The dongle {made.record.dongle} was programmed here: all its answers are known", target)
    else:
        _say(f"Enrolled the dongle {made.record.dongle} (slot {slot}) with {quantity(answers, 'answer')}", target)


@dongle.command("list")
@vendor_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_dongles(folder: Path, as_json: bool) -> None:
    """Show the dongles that were programmed or enrolled here, and how many recorded answers are left."""
    rows = [
        {
            "dongle": record.dongle,
            "product": record.product,
            "serial": record.serial,
            "slot": record.slot,
            "touch": record.touch,
            "answers_left": None if record.mode else record.answers - record.used,
        }
        for record in Folder(folder).dongles()
    ]
    if as_json:
        output.emit(rows)
        return
    for row in rows:
        left = (
            "programmed here" if row["answers_left"] is None else f"{quantity(int(row['answers_left']), 'answer')} left"
        )
        touch = ", touch" if row["touch"] else ""
        output.say(f"{row['dongle']}  {row['product']}:{row['serial'] or '-'},slot={row['slot']}{touch}  {left}")


@click.group()
def token() -> None:
    """PKCS#11 tokens: make their keys here, so that later requests with them are believed."""


@token.command("enroll")
@vendor_option
@click.option(
    "--token", "uri", required=True, metavar="PKCS11_URI", help="pkcs11:token=NAME?module-path=/usr/lib/MODULE.so"
)
@click.option("--new-key", type=click.Choice(NEW_KEYS), help="Make a key on the token; without, one that is there.")
@secrets.pin_options
@request_option
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
def enroll_token(
    folder: Path,
    uri: str,
    new_key: NewKey | None,
    pin_file: Path | None,
    last_try: bool,
    target: Path | None,
    force: bool,
) -> None:
    """Record the key of a token, made on it with --new-key. Only a key that was made on the token is in it alone."""
    place = Folder(folder)
    parsed = TokenUri.parse(uri)
    if parsed.module is None:
        what = "The URI does not say which module the token needs."
        raise UsageError(Reason.USAGE, what, "Add the module of the token's maker: ?module-path=/usr/lib/MODULE.so")
    with _request(target, force=force) as keep:
        with enrolled_token(parsed, secrets.pin_source(pin_file, last_try=last_try), new_key) as hardware:
            found = hardware.describe(Selection())
        assert isinstance(found, TokenEvidence)  # noqa: S101  # what a token gives
        fingerprint = evidence.fingerprint(found.key)
        with storage.exclusive(place.path):
            place.keep_token(fingerprint, TokenRecord(SCHEMA, found.uri, found.key))
        keep(found)
    if new_key is None:
        output.note("warning: this key was on the token before: one that was made outside may be in other places, too.")
    _say(f"Recorded the token's key {fingerprint.hex()} ({found.mechanism})", target)


def _say(what: str, target: Path | None) -> None:
    output.note(f"{what}{f'; the request is {target}' if target else ''}.")


@contextmanager
def _one(selector: str) -> Iterator[tuple[Dongle, int]]:
    """The one dongle that `selector` names, and its slot. Raises AbsentError; UsageError where there are several."""
    from hwlicense.binders.usb import Selector, find_one  # noqa: PLC0415  # the library is an extra

    parsed = Selector.parse(selector)
    with find_one(parsed) as device:
        yield device, parsed.slot


@contextmanager
def _request(target: Path | None, *, force: bool) -> Iterator[Callable[[Evidence], None]]:
    """Takes what a request is about, and writes it. The file is begun first: a wrong path costs nothing, and changes
    nothing.
    """
    if target is None:
        yield lambda _found: None
        return
    with storage.new_file(target, force=force) as file:

        def write(found: Evidence) -> None:
            today = datetime.datetime.now(datetime.UTC).date()
            request = Request(SCHEMA, today, "prepared by the vendor", [found])
            check(request)
            file.write(assemble(request, []))
            file.flush()

        yield write
