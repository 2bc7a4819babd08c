"""What the vendor's commands are given: the folder, requests and whom to trust, packages, terms and a PIN."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hwlicense import storage
from hwlicense.cli import output, secrets
from hwlicense.core.documents import TpmBinding, UsbBinding
from hwlicense.core.errors import Reason, UsageError, naming
from hwlicense.core.oddities import oddities
from hwlicense.core.schema import FILE_LIMIT
from hwlicense.core.terms import SIZE_LIMIT, parse_terms
from hwlicense.vendor import certificates, compiling, evidence, packing

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hwlicense.core.documents import Binding, Manifest
    from hwlicense.core.secret import Secret
    from hwlicense.core.terms import Terms
    from hwlicense.vendor.compiling import Compiled
    from hwlicense.vendor.folder import Folder

FILE = click.Path(path_type=Path, readable=False)

vendor_option = click.option(
    "--vendor", "folder", type=FILE, required=True, metavar="VENDOR_DIR", help="The vendor folder."
)
force_option = click.option("--force", is_flag=True, help="Replace the output file if it exists.")


def _one(_context: click.Context, _parameter: click.Parameter, given: tuple[Path, ...]) -> Path | None:
    if len(given) > 1:
        raise UsageError(Reason.USAGE, "--enclose is given twice.", "A license encloses one file: give one.")
    return given[0] if given else None


enclose_option = click.option(
    "--enclose",
    "enclosed",
    type=FILE,
    multiple=True,
    callback=_one,
    metavar="FILE",
    help="Up to 64 KiB for the application of this license alone, such as a watermark's seed; sealed as the keys are.",
)
terms_option = click.option("--terms", type=FILE, required=True, metavar="TERMS.toml", help="What the license allows.")


def trust_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--ek-root, --ek, --token-root and --token: whom to believe what a request says."""
    for option in (
        click.option(
            "--token",
            "tokens",
            multiple=True,
            metavar="FINGERPRINT",
            help="Trust the token key with this fingerprint (SHA-256, hex). Those of `vendor token enroll` are known "
            "already.",
        ),
        click.option(
            "--token-root",
            "token_roots",
            multiple=True,
            type=FILE,
            metavar="CA.pem",
            help="Trust tokens whose keys are attested under these CAs.",
        ),
        click.option(
            "--ek",
            "recorded_keys",
            multiple=True,
            metavar="NAME",
            help="Trust the EK with this Name (hex), recorded by hand.",
        ),
        click.option(
            "--ek-root",
            "roots",
            multiple=True,
            metavar="[CLASS=]CA.pem",
            help=f"Trust EK certificates under these CAs. CLASS: {', '.join(evidence.ROOT_CLASSES)}.",
        ),
    ):
        function = option(function)
    return function


def code_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--code, --entry, --python and -O: Python code that goes into a package."""
    for option in (
        click.option("-O", "optimize", count=True, help="Leave assertions out; -OO: docstrings as well."),
        click.option(
            "--python",
            "pythons",
            multiple=True,
            metavar="VERSION|PATH",
            help="Compile for this Python, too: 3.12, or the path of an interpreter.  [default: the running one alone]",
        ),
        click.option("--entry", metavar="MODULE:FUNCTION", help="Where the program begins that the code is."),
        click.option(
            "--code",
            "packages",
            multiple=True,
            type=FILE,
            metavar="PACKAGE_DIR",
            help="The folder of a Python package, or a module. Its sources stay here.",
        ),
    ):
        function = option(function)
    return function


def compiled_code(
    packages: tuple[Path, ...], name: str, entry: str | None, pythons: tuple[str, ...], optimize: int
) -> Compiled | None:
    """What --code and its companions ask for; None without --code. Raises UsageError."""
    if packages:
        return compiling.compile_code(packages, name, entry, pythons, min(optimize, 2))
    if entry or pythons or optimize:
        raise UsageError(Reason.USAGE, "--entry, --python and -O are about code.", "Give --code PACKAGE_DIR with them.")
    return None


def pin_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--pin and --pin-file, for a PIN that the TPM will need."""
    asked = click.option(
        "--pin", "with_pin", is_flag=True, help="Ask for a PIN that the TPM will need at every opening."
    )
    return asked(secrets.pin_option(function))


def new_pin(pin_file: Path | None, *, with_pin: bool) -> Secret | None:
    """The PIN, if one was asked for. Raises UsageError where nobody can be asked."""
    if pin_file:
        return secrets.from_file(pin_file)
    found = secrets.from_prompt("New PIN", confirm=True) if with_pin else None
    if with_pin and found is None:
        raise UsageError(Reason.USAGE, "There is no terminal to ask for the PIN.", "Give --pin-file.")
    return found


def today() -> datetime.date:
    """In UTC."""
    return datetime.datetime.now(datetime.UTC).date()


def agreed_terms(path: Path) -> Terms:
    """The terms in a file; says what is odd about them. Raises UsageError."""
    with naming(path):
        agreed = parse_terms(text(path))
        odd = oddities(agreed, today())
    for each in odd:
        output.note(f"warning: {each}")
    return agreed


def read_manifest(path: Path, place: Folder) -> Manifest:
    """The manifest of a package of this vendor."""
    with naming(path):
        return packing.read_manifest(path, place.public)


def trusted(
    place: Folder,
    roots: tuple[str, ...],
    recorded: tuple[str, ...],
    token_roots: tuple[Path, ...] = (),
    tokens: tuple[str, ...] = (),
) -> evidence.Trusted:
    """Whom the options name, and the tokens that the folder knows."""
    return evidence.Trusted(
        roots=[root for spec in roots for root in _roots(spec)],
        recorded=[_hexadecimal(text, "the Name of an EK") for text in recorded],
        token_roots=[
            root
            for path in token_roots
            for root in certificates.read_pem(storage.read_limited(path, FILE_LIMIT), "token")
        ],
        tokens={
            *(_hexadecimal(text, "the fingerprint of a token's key") for text in tokens),
            *(evidence.fingerprint(record.key) for record in place.tokens()),
        },
    )


def examined(request: Path, believed: evidence.Trusted) -> evidence.Examined:
    """A request that holds."""
    with naming(request):
        now = datetime.datetime.now(datetime.UTC)
        return evidence.examine(storage.read_limited(request, FILE_LIMIT), believed, now)


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raises UsageError FILE_EXISTS, before a PIN or passphrase is asked for in vain."""
    if not force and target.exists():
        raise UsageError(
            Reason.FILE_EXISTS, f"{target} exists already.", "Give another name, or --force to replace it."
        )


def why_believed(binding: Binding) -> str:
    """Why the vendor takes this hardware for what it says it is."""
    if isinstance(binding, UsbBinding):
        return f"dongle {binding.dongle[:8]}: its answers are known here"
    name = "EK" if isinstance(binding, TpmBinding) else "token's key"
    root = binding.endorsement
    under = f"certificate under {root.root} ({root.root_class})" if isinstance(binding, TpmBinding) else root.root
    return f"{name}: {under if root.root else 'recorded by hand'}"


def text(path: Path) -> str:
    """A text file that people write."""
    try:
        return storage.read_limited(path, SIZE_LIMIT).decode()
    except UnicodeDecodeError:
        raise UsageError(Reason.USAGE, f"{path} is not a text file in UTF-8.", "Check the file's name.") from None


def _roots(spec: str) -> list[evidence.Root]:
    name, equals, path = spec.partition("=")
    if equals and name in evidence.ROOT_CLASSES:
        return evidence.read_roots(storage.read_limited(Path(path), FILE_LIMIT), evidence.ROOT_CLASSES[name])
    if equals and not Path(spec).exists():
        what = f"{name!r} is not a class of TPMs."
        raise UsageError(Reason.USAGE, what, f"Write one of {', '.join(evidence.ROOT_CLASSES)} before the equals sign.")
    return evidence.read_roots(storage.read_limited(Path(spec), FILE_LIMIT), "unknown")


def _hexadecimal(text: str, name: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        what = f"{text!r} is not {name}."
        raise UsageError(
            Reason.USAGE, what, "Give it in hexadecimal, as `hwlicense inspect REQUEST` shows it."
        ) from None
