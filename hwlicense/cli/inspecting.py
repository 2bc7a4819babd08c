"""`hwlicense inspect`: what a file of the project says, whoever wrote it."""

from __future__ import annotations

import datetime
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from cryptography.hazmat.primitives.asymmetric import rsa

from hwlicense import storage
from hwlicense.cli import inspecting_outputs, output
from hwlicense.core import code, dongle, package, token
from hwlicense.core.documents import (
    PAYLOAD_TYPES,
    Approval,
    Binding,
    ClockReset,
    Grant,
    License,
    Manifest,
    Request,
    TokenBinding,
    TokenEvidence,
    TpmBinding,
    TpmEvidence,
    UsbBinding,
    UsbEvidence,
    VendorPublic,
)
from hwlicense.core.durations import of_rate, spelled
from hwlicense.core.envelope import disassemble, unverified, verified
from hwlicense.core.errors import DamagedError, Reason, UsageError, naming
from hwlicense.core.keys import TAG_SIZE
from hwlicense.core.schema import FILE_LIMIT, Document, decode
from hwlicense.core.tpm.structures import Public
from hwlicense.core.wording import quantity
from hwlicense.device.reading import PackageFile, read_envelope

if TYPE_CHECKING:
    from collections.abc import Iterator


FILE = click.Path(path_type=Path, readable=False)


@click.command()
@click.argument("file", type=FILE)
@click.option(
    "--vendor", "vendor_file", type=FILE, metavar="VENDOR.pub.json", help="Check the signatures of this vendor."
)
@click.option("--json", "as_json", is_flag=True, help="Print the whole document as JSON.")
def inspect(file: Path, vendor_file: Path | None, as_json: bool) -> None:
    """Show what a package, request, license, approval, clock reset, vendor.pub.json or file of a signed log says.

    Without --vendor nothing is checked: anyone can have written what is shown.
    """
    vendor = decode(storage.read_limited(vendor_file, FILE_LIMIT), VendorPublic, spaced=True) if vendor_file else None
    with naming(file):
        if _is_of_a_log(file):
            _show_log(file, vendor, as_json=as_json)
            return
        document, signatures = _read(file, vendor)
    if as_json:
        output.emit({"type": type(document).__name__.lower(), "signatures": signatures, "document": _plain(document)})
        return
    output.columns([("file", f"{type(document).__name__} ({signatures})"), *_lines(document)])


def _is_of_a_log(file: Path) -> bool:
    with storage.OpenFile(file) as opened:
        return inspecting_outputs.begins(opened.read(32, 0))


def _show_log(file: Path, vendor: VendorPublic | None, *, as_json: bool) -> None:
    if vendor:
        what = f"{file} is of a signed log, which no vendor has signed."
        raise UsageError(Reason.USAGE, what, "Leave --vendor out; `hwlicense vendor verify-outputs` checks logs.")
    said = inspecting_outputs.document(file)
    if as_json:
        output.emit({"type": "recording", "signatures": inspecting_outputs.UNCHECKED, "document": said})
    else:
        kind = f"Recording ({inspecting_outputs.UNCHECKED})"
        output.columns([("file", kind), *inspecting_outputs.lines(said)])


def _read(file: Path, vendor: VendorPublic | None) -> tuple[Document, str]:
    with storage.OpenFile(file) as opened:
        start = opened.read(len(package.MAGIC), 0)
    if start == package.MAGIC:
        if vendor:
            with PackageFile(file, vendor) as signed:  # which sees whether it is as long as its manifest says
                return signed.manifest, f"signed by {vendor.name!r}"
        return _document(read_envelope(file), Manifest, vendor)
    raw = storage.read_limited(file, FILE_LIMIT)
    try:
        kinds = {payload_type: kind for kind, payload_type in PAYLOAD_TYPES.items()}
        kind = kinds.get(disassemble(raw).payloadType)
    except DamagedError as error:
        if b'"payloadType"' in raw:
            raise
        try:
            return decode(raw, VendorPublic, spaced=True), "not signed: it is the root of trust"
        except DamagedError:
            raise error from None
    if kind is None:
        raise UsageError(
            Reason.USAGE,
            f"{file} is not a file of hwlicense.",
            "Give a package, request, license, approval, clock reset or file of a signed log.",
        )
    return _document(raw, kind, vendor)


def _document(raw: bytes, kind: type[Document], vendor: VendorPublic | None) -> tuple[Document, str]:
    if kind is Request:
        return unverified(raw, kind)[0], "signature not checked: `vendor issue` and `vendor approve` do that"
    if vendor is None:
        return unverified(raw, kind)[0], "signatures not checked"
    return verified(raw, kind, vendor), f"signed by {vendor.name!r}"


def _plain(document: Document) -> Any:  # noqa: ANN401  # whatever JSON can hold
    return msgspec.to_builtins(document)


def _lines(document: Document) -> Iterator[tuple[str, str]]:
    if isinstance(document, VendorPublic):
        yield from [("name", document.name), ("fingerprint", document.fingerprint)]
    elif isinstance(document, Manifest):
        yield from _manifest(document)
    elif isinstance(document, Request):
        yield from _request(document)
    elif isinstance(document, License):
        yield from _license(document)
    elif isinstance(document, ClockReset):
        yield from [("vendor", document.vendor), ("license", document.license), ("time", _time(document.time))]
    elif isinstance(document, Approval):
        yield from [
            ("vendor", document.vendor),
            ("product", document.product),
            ("generation", str(document.generation)),
        ]
        yield from [(f"PCR {p.bank}:{p.index}", p.value.hex()) for p in document.pcrs]


def _manifest(manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield from [("name", manifest.name), ("version", manifest.version), ("vendor", manifest.vendor)]
    yield from [("content key", manifest.content_key), ("digests", manifest.algorithm)]
    sealed = [member for member in manifest.members if code.reserved(member.name)]
    files = [member for member in manifest.members if not code.reserved(member.name)]
    yield "files", f"{len(files):,}, {quantity(sum(m.size for m in files), 'byte')}"
    yield from [("", f"{member.size:>15,}  {member.name}") for member in files]
    if manifest.code:
        yield "code", f"for Python {', '.join(manifest.code.versions)}; {quantity(len(sealed), 'file')}"
        yield "", f"begins at {manifest.code.entry}" if manifest.code.entry else "no entry: it is imported"
        yield from [("", f"{member.size:>15,}  {member.name}") for member in sealed]


def _request(request: Request) -> Iterator[tuple[str, str]]:
    yield from [("device", request.device), ("created", str(request.created))]
    for evidence in request.hardware:
        match evidence:
            case TpmEvidence():
                yield from _tpm(evidence)
            case TokenEvidence():
                key = token.public_key(evidence.key)
                size = f"RSA-{key.key_size}" if isinstance(key, rsa.RSAPublicKey) else "P-256"
                yield "token", evidence.uri
                yield f"key {size}", hashlib.sha256(evidence.key).hexdigest()
                yield "", f"used by {evidence.mechanism}; {'a PIN is needed' if evidence.pin else 'no PIN'}"
                yield "", f"{quantity(len(evidence.certificates), 'certificate')} (nothing is checked here)"
            case UsbEvidence():
                touch = ", answers only when touched" if evidence.touch else ""
                yield "dongle", f"{evidence.dongle}, slot {evidence.slot}{touch}"
                yield (
                    "",
                    f"USB {evidence.product}, serial {evidence.serial or 'not told'}, firmware {evidence.firmware}",
                )


def _tpm(evidence: TpmEvidence) -> Iterator[tuple[str, str]]:
    yield "TPM", f"{evidence.manufacturer}, firmware {evidence.firmware}"
    for key in evidence.endorsement_keys:
        public = Public.parse(key.public)
        certified = "with certificate" if key.certificate else "without certificate"
        yield f"EK {public.type.name}-{public.bits}", f"{public.name.hex()} ({certified})"
    yield "SRK", Public.parse(evidence.storage_root_key).name.hex()
    yield "AK", Public.parse(evidence.attestation_key).name.hex()
    yield from [(f"PCR {p.bank}:{p.index}", p.value.hex()) for p in evidence.pcrs]


def _license(document: License) -> Iterator[tuple[str, str]]:
    grant = document.grant
    yield from [("license", grant.license), ("revision", str(grant.revision)), ("vendor", grant.vendor)]
    yield from [("licensee", grant.licensee), ("product", f"{grant.product}, generation {grant.generation}")]
    for reference in grant.packages:
        yield "package", f"{reference.name} {reference.version} ({reference.content_key})"
    yield "issued", str(grant.issued)
    yield "valid", f"{grant.not_before or 'from the start'} to {grant.not_after or 'no end'} (UTC, both days included)"
    yield "PCRs", ", ".join(grant.pcrs) or "none required"
    yield "needs", f"{document.need} of {quantity(len(document.bindings), 'binding')}"
    for place, binding in enumerate(document.bindings, 1):
        yield f"binding {place}", kind_and_name(binding)
        yield from [("", line) for line in _binding(binding)]
    yield from _presence(grant)
    yield from _use(grant)
    if document.enclosure:
        yield "encloses", f"{quantity(len(document.enclosure) - TAG_SIZE, 'byte')} for the application"
    yield from _process(grant)
    yield "approved states", str(len(document.approvals))


def kind_and_name(binding: Binding) -> str:
    """What a binding is to, in a few words."""
    match binding:
        case TpmBinding():
            return f"tpm, SRK {binding.storage_root_key.hex()}"
        case TokenBinding():
            return f"pkcs11, {binding.uri}"
        case UsbBinding():
            return f"usb, {binding.product}, serial {binding.serial or 'not told'}, slot {binding.slot}"


def _binding(binding: Binding) -> Iterator[str]:
    match binding:
        case TpmBinding():
            trust = binding.endorsement
            under = f"certificate under {trust.root}, class {trust.root_class}"
            yield f"EK {binding.endorsement_key.hex()} ({under if trust.root else 'recorded by hand'})"
            yield "a PIN is needed" if binding.pin else "no PIN"
        case TokenBinding():
            root = binding.endorsement.root
            yield f"key {hashlib.sha256(binding.key).hexdigest()} ({binding.mechanism})"
            yield f"attested under {root}" if root else "recorded by the vendor"
            yield "the token's PIN is needed" if binding.pin else "no PIN"
        case UsbBinding():
            yield f"dongle {binding.dongle}{', answers only when touched' if binding.touch else ''}"
            yield f"{quantity(dongle.answer_count(binding), 'recorded answer')} for proofs of presence"


def _presence(grant: Grant) -> Iterator[tuple[str, str]]:
    if terms := grant.presence:
        yield "presence", f"proved every {spelled(terms.interval)}"
        back = f", given back by {spelled(terms.regain)} of presence" if terms.regain else ""
        yield "", f"grace of {spelled(terms.grace)} in all{back}" if terms.grace else "no grace"
        if not terms.repeat:
            yield "", "each recorded answer of a dongle serves once"
    if grant.continuity:
        yield "continuity", f"sessions of up to {spelled(grant.continuity)} are kept from interruption"


def _use(grant: Grant) -> Iterator[tuple[str, str]]:
    use = grant.terms_of_use
    limits = use.limits
    numbers = (("opens", limits.opens), ("inferences", limits.inferences), ("powered-on hours", limits.hours))
    yield from [(name, f"{most:,}") for name, most in (*numbers, ("instances", limits.instances)) if most]
    yield from [("rate", of_rate(rate)) for rate in limits.rates]
    if use.days:
        yield "first use", f"opens for {quantity(use.days, 'day')} from then on"
    yield from [("feature", f"{name} = {msgspec.json.encode(value).decode()}") for name, value in use.features.items()]
    if use.anchor:
        yield "account", "must be anchored in a TPM"
    if use.revocable:
        yield "revocable", "a revision ends this one in the TPM"
    if use.cap is not None:
        yield "cap", f"PCR sha256:{use.cap}"
    if monitor := use.monitor:
        found = (("regularity", monitor.regularity), ("distances", monitor.distances))
        named = [f"{name}: {detector.action}" for name, detector in found if detector]
        throttled = f"; throttled: {of_rate(monitor.throttled)}" if monitor.throttled else ""
        yield "monitor", f"{', '.join(named)}, for {spelled(monitor.lasting)}{throttled}"


def _process(grant: Grant) -> Iterator[tuple[str, str]]:
    if guard := grant.guard:
        yield "guard", f"refuses {', '.join(guard.refuse)}; looks every {guard.interval:,} s"
    if application := grant.application:
        required = [file.name for file in application.files if file.required]
        yield "application", f"{quantity(len(application.files), 'file')} may be loaded"
        yield from [("", f"{name} must be") for name in required]


def _time(seconds: int) -> str:
    try:
        return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError):  # further off than dates go
        return f"{seconds:,} s after 1970"
