"""`hwlicense vendor issue`, and what changes a license that is in the field: `revise` and `reset-clock`."""

from __future__ import annotations

import datetime
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

import click

from hwlicense import storage
from hwlicense.cli import output, secrets
from hwlicense.cli.vendor_input import (
    FILE,
    agreed_terms,
    enclose_option,
    examined,
    force_option,
    new_pin,
    pin_options,
    read_manifest,
    refuse_existing,
    terms_option,
    today,
    trust_options,
    trusted,
    vendor_option,
    why_believed,
)
from hwlicense.core.documents import License
from hwlicense.core.envelope import verified
from hwlicense.core.errors import Reason, UsageError, naming
from hwlicense.core.schema import FILE_LIMIT
from hwlicense.core.secret import Secret
from hwlicense.vendor import dongles, enclosing, issuing, resetting, revising
from hwlicense.vendor.basis import packaged, recorded
from hwlicense.vendor.folder import Folder

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@vendor_option
@click.option(
    "--request",
    "requests",
    type=FILE,
    required=True,
    multiple=True,
    metavar="REQ.hwreq",
    help="The device's request; several, where its TPM, tokens and dongles were enrolled apart.",
)
@click.option(
    "--package",
    "packages",
    type=FILE,
    required=True,
    multiple=True,
    metavar="PKG.hwpkg",
    help="A package that the license opens; may be given several times.",
)
@terms_option
@enclose_option
@trust_options
@click.option("-o", "--output", "target", type=FILE, required=True, metavar="OUT.hwlic")
@pin_options
@force_option
@secrets.passphrase_option
def issue(
    folder: Path,
    requests: tuple[Path, ...],
    packages: tuple[Path, ...],
    terms: Path,
    enclosed: Path | None,
    roots: tuple[str, ...],
    recorded_keys: tuple[str, ...],
    token_roots: tuple[Path, ...],
    tokens: tuple[str, ...],
    target: Path,
    with_pin: bool,
    pin_file: Path | None,
    force: bool,
    passphrase_file: Path | None,
) -> None:
    """Issue a license for one device.

    The first request of a product line makes its first approved platform state, if the terms require PCRs. These values
    are trusted on first use: approve golden values beforehand with `vendor approve --pcrs` where you have them.
    """
    place = Folder(folder)
    agreed = agreed_terms(terms)
    believed = trusted(place, roots, recorded_keys, token_roots, tokens)
    parts = [part for request in requests for part in examined(request, believed).parts]
    manifests = [read_manifest(path, place) for path in packages]
    refuse_existing(target, force=force)
    enclosure = enclosing.read(enclosed) if enclosed else Secret(bytearray())
    pin = new_pin(pin_file, with_pin=with_pin)
    keys = secrets.unlock(place, passphrase_file)
    # One at a time, so that a product has one first approval. The file is begun first: the folder records nothing that
    # could not be written.
    with storage.exclusive(place.path), storage.new_file(target, force=force) as file:
        issued = issuing.issue(
            place.public,
            keys,
            parts,
            manifests,
            agreed,
            place.approvals(agreed.product),
            today=today(),
            pin=pin,
            bind_dongle=partial(dongles.bind, place, keys),
            enclosure=enclosure,
        )
        source = revising.Sources(parts, list(map(packaged, manifests)), 1)
        trust = _keep(place, file, issued, source, enclosing.recorded(enclosure, issued.license.grant.license, keys))
        others = place.of_one_counter(issued.license)
    if others:
        what = f"the license {', '.join(others)} was made from a request with the same counter, which serves one"
        output.note(f"warning: {what}. For another, enroll again with --counted; for other terms, use `vendor revise`.")
    output.note(f"Issued license {issued.license.grant.license} for {agreed.licensee!r} in {target}; {trust}.")


@click.command()
@vendor_option
@click.option(
    "--license",
    "licensed",
    type=FILE,
    required=True,
    metavar="OLD.hwlic",
    help="The latest revision of the license, as it was sent.",
)
@terms_option
@click.option(
    "--request",
    "requests",
    type=FILE,
    multiple=True,
    metavar="REQ.hwreq",
    help="A new request of the same device; several, as in `vendor issue`.  [default: what the license was made from]",
)
@click.option(
    "--package",
    "packages",
    type=FILE,
    multiple=True,
    metavar="PKG.hwpkg",
    help="A package that the revision opens; may be given several times.  [default: those of the license]",
)
@enclose_option
@click.option("--no-enclosure", is_flag=True, help="Enclose nothing.  [default: what the license encloses]")
@trust_options
@click.option("-o", "--output", "target", type=FILE, required=True, metavar="OUT.hwlic")
@pin_options
@click.option("--no-pin", is_flag=True, help="Go on without the PIN that the license has had.")
@force_option
@secrets.passphrase_option
def revise(
    folder: Path,
    licensed: Path,
    terms: Path,
    requests: tuple[Path, ...],
    packages: tuple[Path, ...],
    enclosed: Path | None,
    no_enclosure: bool,
    roots: tuple[str, ...],
    recorded_keys: tuple[str, ...],
    token_roots: tuple[Path, ...],
    tokens: tuple[str, ...],
    target: Path,
    with_pin: bool,
    pin_file: Path | None,
    no_pin: bool,
    force: bool,
    passphrase_file: Path | None,
) -> None:
    """Change the terms of a license in the field: a new revision for the same device, which `device install` takes in.

    TERMS are all of the new terms, not only those that change. Opens and inferences count anew from the installation
    of the revision. Hours of powered-on time go on counting from the request that the license was made from: to give
    more of them, raise the number, or give a new --request, from which they start again.
    """
    place = Folder(folder)
    agreed = agreed_terms(terms)
    with naming(licensed):
        raw = storage.read_limited(licensed, FILE_LIMIT)
        old = place.issued(raw)
    believed = trusted(place, roots, recorded_keys, token_roots, tokens)
    parts = [part for request in requests for part in examined(request, believed).parts]
    given = [packaged(read_manifest(path, place)) for path in packages]
    basis = place.basis(old)
    source = revising.sources(old, basis, parts, given)
    agreed = revising.kept_revocable(old, agreed)
    refuse_existing(target, force=force)
    if no_pin and (with_pin or pin_file):
        raise UsageError(Reason.USAGE, "--no-pin excludes --pin and --pin-file.", "Give one of them.")
    if enclosed and no_enclosure:
        raise UsageError(Reason.USAGE, "--enclose and --no-enclosure exclude each other.", "Give one of them.")
    enclosure = enclosing.read(enclosed) if enclosed else Secret(bytearray())
    if revising.had_pin(old) and not (no_pin or with_pin or pin_file):
        what = f"Revision {old.grant.revision} has a PIN, which is not known here: the next one takes its own."
        raise UsageError(Reason.USAGE, what, "Give --pin or --pin-file; or --no-pin, to go on without.")
    pin = new_pin(pin_file, with_pin=with_pin)
    keys = secrets.unlock(place, passphrase_file)
    if not enclosed and not no_enclosure:
        enclosure = enclosing.kept(basis, keys)
    with storage.exclusive(place.path), storage.new_file(target, force=force) as file:
        with naming(licensed):
            place.issued(raw)  # again: another may have revised it meanwhile
        made = issuing.make(
            place.public,
            keys,
            source.parts,
            source.packages,
            agreed,
            place.approvals(agreed.product),
            today=today(),
            license_id=old.grant.license,
            revision=old.grant.revision + 1,
            since=source.since,
            pin=pin,
            bind_dongle=partial(dongles.bind, place, keys),
            enclosure=enclosure,
        )
        trust = _keep(place, file, made, source, enclosing.recorded(enclosure, old.grant.license, keys))
    grant = made.license.grant
    output.note(
        f"Made revision {grant.revision} of license {grant.license} for {agreed.licensee!r} in {target}; {trust}."
    )
    output.note(revising.end_of(old, made.license))


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
    with naming(licensed):
        document = verified(storage.read_limited(licensed, FILE_LIMIT), License, place.public)
    keys = secrets.unlock(place, passphrase_file)
    now = datetime.datetime.now(datetime.UTC)
    _, sealed = resetting.reset_clock(keys, document, now)
    with storage.new_file(target, force=force) as file:
        file.write(sealed)
    output.note(f"Reset the clock of license {document.grant.license} to {now:%Y-%m-%d %H:%M:%S} UTC in {target}.")


def _keep(place: Folder, file: BinaryIO, made: issuing.Issued, source: revising.Sources, enclosure: bytes) -> str:
    """Write a license down, for the device and here. Returns why its hardware is believed."""
    file.write(made.raw)
    file.flush()
    if made.approval:
        place.keep_approval(*made.approval)
        product = made.license.grant.product
        output.note(f"The PCRs of the device's request are the first approved state of {product!r}.")
    basis = recorded(made.license, source.parts, source.packages, source.since, enclosure)
    place.keep_license(made.license, made.raw, basis)
    return "; ".join(why_believed(binding) for binding in made.license.bindings)
