"""`hwlicense vendor`: what the release engineer and the order desk do. No TPM is needed, nor its library."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import click

from hwlicense import storage
from hwlicense.cli import output, secrets
from hwlicense.cli.vendor_hardware import dongle, token
from hwlicense.cli.vendor_input import (
    FILE,
    code_options,
    compiled_code,
    examined,
    force_option,
    text,
    trusted,
    vendor_option,
)
from hwlicense.cli.vendor_licenses import issue, reset_clock, revise
from hwlicense.cli.vendor_measuring import measure
from hwlicense.cli.vendor_outputs import verify_outputs
from hwlicense.core.errors import Reason, UsageError, naming
from hwlicense.core.wording import quantity
from hwlicense.vendor import approving, packing, signing
from hwlicense.vendor.folder import Folder

if TYPE_CHECKING:
    from pathlib import Path

    from hwlicense.core.package import Algorithm


@click.group()
def vendor() -> None:
    """The issuing side: keys, packages, licenses, approvals."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # passphrase and private keys are in memory from here on


for command in (dongle, issue, measure, reset_clock, revise, token, verify_outputs):
    vendor.add_command(command)


@vendor.command()
@click.argument("path", metavar="VENDOR_DIR", type=FILE)
@click.option("--name", help="The vendor's name, shown to customers.  [default: the folder's name]")
@click.option(
    "--classical",
    type=click.Choice(signing.CLASSICAL_KINDS),
    default="ed25519",
    show_default=True,
    help="Kind of the classical signing key; ML-DSA-65 always signs beside it.",
)
@click.option(
    "--no-passphrase", is_flag=True, help="Keep the private keys in the clear (for tests and sealed machines)."
)
@secrets.passphrase_option
def init(path: Path, name: str | None, classical: str, no_passphrase: bool, passphrase_file: Path | None) -> None:
    """Make a vendor folder with new keys.

    Keep a copy of the folder in a safe place: licenses for packages already sold need these keys.
    VENDOR_DIR/vendor.pub.json is public; applications carry its text, and devices trust it.
    """
    if no_passphrase and passphrase_file:
        raise UsageError(Reason.USAGE, "--no-passphrase and --passphrase-file exclude each other.", "Give one of them.")
    passphrase = None if no_passphrase else secrets.new_passphrase(passphrase_file)
    made = Folder.create(path, name or path.resolve().name, passphrase, classical)
    output.note(f"Made {made.path} for the vendor {made.public.name!r} (fingerprint {made.public.fingerprint[:16]}).")


@vendor.command()
@vendor_option
@click.option("--name", required=True, help="The package's name.")
@click.option("--version", required=True, help="The package's version.")
@click.option("-o", "--output", "target", type=FILE, required=True, metavar="OUT.hwpkg")
@click.option(
    "--hash",
    "algorithm",
    type=click.Choice(["blake3", "sha256"]),
    default="blake3",
    show_default=True,
    help="Digest of the ciphertext.",
)
@code_options
@force_option
@secrets.passphrase_option
@click.argument("inputs", nargs=-1, type=FILE, metavar="[INPUT]...")
def pack(
    folder: Path,
    name: str,
    version: str,
    target: Path,
    algorithm: Algorithm,
    packages: tuple[Path, ...],
    entry: str | None,
    pythons: tuple[str, ...],
    optimize: int,
    force: bool,
    passphrase_file: Path | None,
    inputs: tuple[Path, ...],
) -> None:
    """Encrypt and sign files into a package.

    An INPUT that is a folder is packed with paths relative to it; a file goes in under its own name. With --code,
    Python packages go in as bytecode, data and native modules.
    """
    place = Folder(folder)
    compiled = compiled_code(packages, name, entry, pythons, optimize)
    keys = secrets.unlock(place, passphrase_file)
    found = packing.sources(inputs, compiled)
    with output.progress("Packing", sum(source.size for source in found)) as advance:
        manifest = packing.pack(
            found,
            target,
            name=name,
            version=version,
            vendor=place.public,
            keys=keys,
            algorithm=algorithm,
            progress=advance,
            force=force,
            code=compiled.code if compiled else None,
        )
    size = sum(member.size for member in manifest.members)
    count = len(manifest.members)
    output.note(f"Packed {quantity(count, 'file')}, {quantity(size, 'byte')}, into {target}.")
    if compiled:
        versions = ", ".join(compiled.code.versions)
        output.note(
            f"Its code is for Python {versions}; what stays here: {quantity(compiled.left_out, 'source')} and the like."
        )


@vendor.command()
@vendor_option
@click.option("--product", required=True, help="The product line, as in the terms.")
@click.option(
    "--pcrs", type=FILE, metavar="PCRS.toml", help='Golden values: a table a bank, such as [sha256], with 7 = "HEX".'
)
@click.option("--request", type=FILE, metavar="REQ.hwreq", help="Take the PCR values of a request that you trust.")
@click.option(
    "--ek-root", "roots", multiple=True, metavar="[CLASS=]CA.pem", help="With --request: as in `vendor issue`."
)
@click.option("--ek", "recorded_keys", multiple=True, metavar="NAME", help="With --request: as in `vendor issue`.")
@click.option(
    "--generation",
    type=click.IntRange(min=1),
    help="Start a new generation: licenses issued from now on open with no older approval; those issued before do.",
)
@click.option("-o", "--output", "target", type=FILE, required=True, metavar="OUT.hwapp")
@force_option
@secrets.passphrase_option
def approve(
    folder: Path,
    product: str,
    pcrs: Path | None,
    request: Path | None,
    roots: tuple[str, ...],
    recorded_keys: tuple[str, ...],
    generation: int | None,
    target: Path,
    force: bool,
    passphrase_file: Path | None,
) -> None:
    """Approve a platform state for a product line.

    One approval file serves every device of the line: send it with the firmware update that brings the new state.
    """
    if (pcrs is None) == (request is None):
        raise UsageError(Reason.USAGE, "Give either --pcrs or --request.", "See `hwlicense vendor approve --help`.")
    place = Folder(folder)
    if pcrs:
        with naming(pcrs):
            values = approving.parse_pcrs(text(pcrs))
    else:
        assert request is not None  # noqa: S101  # by the check above
        values = examined(request, trusted(place, roots, recorded_keys)).pcrs
    keys = secrets.unlock(place, passphrase_file)
    with storage.exclusive(place.path), storage.new_file(target, force=force) as file:
        known = place.approvals(product)
        chosen_generation = generation or approving.current_generation(known)
        approval, sealed = approving.approve(place.public, keys, product, chosen_generation, values)
        file.write(sealed)
        file.flush()
        place.keep_approval(approval, sealed)
    which = ", ".join(f"{p.bank}:{p.index}" for p in approval.pcrs)
    output.note(f"Approved a state of {product!r} ({which}), generation {approval.generation}, in {target}.")
