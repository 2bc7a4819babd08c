"""Making a license: from requests that hold, for packages of this vendor, under terms."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from hwlicense.core import token
from hwlicense.core.documents import (
    BINDING_LIMIT,
    Binding,
    Grant,
    License,
    TokenBinding,
    UsbBinding,
    UsbEvidence,
)
from hwlicense.core.envelope import seal
from hwlicense.core.errors import Reason, RefusedError, UsageError
from hwlicense.core.keys import seal_enclosure, unwrap_for_vendor, wrap_content_keys, wrap_license_secret
from hwlicense.core.limits import Use
from hwlicense.core.schema import SCHEMA, check
from hwlicense.core.secret import Secret
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.uri import TokenUri
from hwlicense.vendor import approving, sealing
from hwlicense.vendor.basis import packaged
from hwlicense.vendor.evidence import DonglePart, TokenPart, TpmPart, identity

if TYPE_CHECKING:
    import datetime
    from collections.abc import Sequence

    from hwlicense.core.documents import Approval, Manifest, Pcr, VendorPublic
    from hwlicense.core.terms import Terms
    from hwlicense.vendor.basis import PackageBasis
    from hwlicense.vendor.evidence import Part
    from hwlicense.vendor.signing import Keys


APPROVAL_LIMIT: Final = 100
"""Approvals that a license can carry; it carries that of the request, and others as far as they fit."""


BindDongle = Callable[[UsbEvidence, int], tuple[UsbBinding, Secret]]
"""Binds to a dongle with so many recorded answers: the folder's part, as the answers are kept there."""


ANSWERS_LIMIT: Final = 64_000
"""Recorded answers that a license can carry: it is seen beforehand, as answers that were reserved are spent."""


class Issued(NamedTuple):
    """The license with its envelope, and where it was a product's first, the approval that it made, with its own."""

    license: License
    raw: bytes
    approval: tuple[Approval, bytes] | None


def issue(  # noqa: PLR0913  # who, for what, under what: all of it
    vendor: VendorPublic,
    keys: Keys,
    parts: Sequence[Part],
    manifests: Sequence[Manifest],
    terms: Terms,
    approvals: Sequence[Approval],
    *,
    today: datetime.date,
    pin: Secret | None = None,
    bind_dongle: BindDongle | None = None,
    enclosure: Secret | None = None,
) -> Issued:
    """A license for hardware of one or several requests. `approvals` are those of the product that `terms` name.

    `pin` is for the TPM; a token has its own. `enclosure`, up to 64 KiB, is for the application.

    Raises RefusedError (WRONG_VENDOR, PLATFORM_UNAPPROVED, PCR_UNUSABLE,
    DONGLE_UNKNOWN, ANSWERS_EXHAUSTED), UsageError, DamagedError.
    """
    for manifest in manifests:
        if manifest.vendor != vendor.fingerprint:
            what = f"The package {manifest.name!r} is another vendor's."
            raise RefusedError(Reason.WRONG_VENDOR, what, "Issue with the vendor folder that packed it.")
    return make(
        vendor,
        keys,
        parts,
        [packaged(manifest) for manifest in manifests],
        terms,
        approvals,
        today=today,
        pin=pin,
        bind_dongle=bind_dongle,
        enclosure=enclosure,
    )


def make(  # noqa: PLR0913  # as above
    vendor: VendorPublic,
    keys: Keys,
    parts: Sequence[Part],
    packages: Sequence[PackageBasis],
    terms: Terms,
    approvals: Sequence[Approval],
    *,
    today: datetime.date,
    license_id: str | None = None,
    revision: int = 1,
    since: int = 1,
    pin: Secret | None = None,
    bind_dongle: BindDongle | None = None,
    enclosure: Secret | None = None,
) -> Issued:
    """A license, or a revision of one: all its bindings are made anew. `license_id` None is a new license.

    `since` is the revision for which the request with the TPM's counter came in. Raises as `issue`, but WRONG_VENDOR.
    """
    need = _needed(parts, terms, pin)
    generation = approving.current_generation(approvals)
    current = [approval for approval in approvals if approval.generation == generation]
    if current and since < revision and terms.require.pcrs:  # what an earlier request measured is of no more interest
        usable, first = _of_selection(terms, current)[:APPROVAL_LIMIT], None
    else:
        usable, first = _platform(vendor, keys, _pcrs(parts), terms, current, generation)
    grant = Grant(
        license=license_id or secrets.token_hex(16),
        revision=revision,
        vendor=vendor.fingerprint,
        licensee=terms.licensee,
        product=terms.product,
        generation=generation,
        packages=[package.reference for package in packages],
        issued=today,
        not_before=terms.validity.not_before,
        not_after=terms.validity.not_after,
        pcrs=[str(terms.selection)] if terms.require.pcrs else [],
        presence=terms.granted_presence,
        continuity=terms.granted_continuity,
        use=terms.granted_use,
        guard=terms.granted_guard,
        application=terms.granted_application,
    )
    bindings: list[Binding] = []
    members: list[Secret] = []
    content_keys = [
        unwrap_for_vendor(package.wrapped_content_key, package.reference.content_key, keys.content)
        for package in packages
    ]
    try:
        for part in parts:
            if isinstance(part, TpmPart):
                needed = need == len(parts)
                asked = sealing.conditions(part, grant, keys, pin=pin is not None, since=since, needed=needed)
                bound: tuple[Binding, Secret] = sealing.bind(part, asked, pin)
            else:
                bound = _bind(part, terms, bind_dongle)
            bindings.append(bound[0])
            members.append(bound[1])
        with Secret.random() as secret:
            issued = License(
                schema=SCHEMA,
                grant=grant,
                bindings=bindings,
                need=need,
                wraps=wrap_license_secret(secret, members, need),
                keys=wrap_content_keys(secret, grant, content_keys),
                approvals=usable,
                enclosure=seal_enclosure(secret, grant, enclosure) if enclosure else b"",
            )
    finally:
        for spent in (*members, *content_keys):
            spent.wipe()
    check(issued)
    return Issued(issued, seal(issued, keys.signers), first)


def _needed(parts: Sequence[Part], terms: Terms, pin: Secret | None) -> int:
    """How many of the parts open the license. Raises UsageError where the terms ask for what these parts cannot do."""
    if len(parts) > BINDING_LIMIT or sum(isinstance(part, TpmPart) for part in parts) > 1:
        what = f"A license binds to at most {BINDING_LIMIT} pieces of hardware, of which one is a TPM."
        raise UsageError(Reason.USAGE, what, "Give the requests of one device and its tokens and dongles.")
    if len({identity(part.evidence) for part in parts}) != len(parts):
        what = "Two of the requests name the same piece of hardware."
        raise UsageError(Reason.USAGE, what, "Give each request once.")
    _check_apart(parts)
    need = terms.require.need(len(parts))
    if pin and not any(isinstance(part, TpmPart) for part in parts):
        what = "A license's PIN is checked by the TPM, and no request names one; a token has a PIN of its own."
        raise UsageError(Reason.USAGE, what, "Leave --pin and --pin-file out.")
    if terms.require.pcrs and need == len(parts) and not _pcrs(parts) and any(isinstance(p, TpmPart) for p in parts):
        what = f"The terms require the PCRs {terms.selection}; the TPM was enrolled without any."
        raise UsageError(Reason.TERM_INVALID, what, f"Enroll it again with --pcrs {terms.selection}.")
    if terms.require.pcrs and (need < len(parts) or not _pcrs(parts)):
        what = "The terms require PCRs, to which only a TPM holds a license: it must be among the bindings, and needed."
        raise UsageError(Reason.TERM_INVALID, what, 'Enroll the TPM with --pcrs, and require.bindings = "all".')
    sealing.check_countable(parts, need, terms.granted_use or Use())
    dongles = sum(isinstance(part, DonglePart) for part in parts)
    if terms.presence and dongles * terms.presence.answers > ANSWERS_LIMIT:
        what = f"The license would carry {dongles * terms.presence.answers:,} recorded answers."
        raise UsageError(Reason.TERM_INVALID, what, f"Ask for at most {ANSWERS_LIMIT:,} of all its dongles together.")
    for part in parts:
        if terms.presence and isinstance(part, DonglePart) and part.evidence.touch:
            what = "The terms ask for proofs of presence, and a dongle of the request answers only when it is touched."
            hint = "Program the dongle without touch, or leave [presence] out."
            raise UsageError(Reason.TERM_INVALID, what, hint)
    return need


def _check_apart(parts: Sequence[Part]) -> None:
    """That no piece of hardware counts twice, by two of its keys or slots. Raises UsageError. Requests may lie here."""
    places = [
        f"{part.evidence.product}:{part.evidence.serial}"
        if isinstance(part, DonglePart)
        else str(TokenUri.parse_hint(part.evidence.uri)._replace(object=None, id=None))
        for part in parts
        if isinstance(part, TokenPart) or (isinstance(part, DonglePart) and part.evidence.serial)
    ]
    if len(set(places)) != len(places):
        what = "Two of the requests name one piece of hardware by two of its keys or slots: it would count twice."
        raise UsageError(Reason.USAGE, what, "Give one request for each piece.")


def _pcrs(parts: Sequence[Part]) -> list[Pcr]:
    return [pcr for part in parts if isinstance(part, TpmPart) for pcr in part.evidence.pcrs]


def _platform(
    vendor: VendorPublic,
    keys: Keys,
    measured: Sequence[Pcr],
    terms: Terms,
    approvals: Sequence[Approval],
    generation: int,
) -> tuple[list[Approval], tuple[Approval, bytes] | None]:
    """The approvals that the license carries. A product's first request makes its first approval."""
    if not terms.require.pcrs:
        return [], None
    wanted = set(terms.selection)
    pcrs = [pcr for pcr in measured if (pcr.bank, pcr.index) in wanted]
    if len(pcrs) != len(wanted):
        held = str(Selection.of(measured)) or "none"
        what = f"The terms require the PCRs {terms.selection}; the request holds {held}."
        raise RefusedError(
            Reason.PCR_UNUSABLE, what, f"Enroll the device again with at least --pcrs {terms.selection}."
        )
    if not approvals:
        first = approving.approve(vendor, keys, terms.product, generation, pcrs)
        return [first[0]], first
    usable = _of_selection(terms, approvals)
    present = approving.matching(usable, pcrs, terms.product)
    return [present, *(approval for approval in usable if approval != present)][:APPROVAL_LIMIT], None


def _of_selection(terms: Terms, approvals: Sequence[Approval]) -> list[Approval]:
    """Those of `approvals`, of which there is one, that are of the PCRs in the terms. Raises UsageError."""
    wanted = set(terms.selection)
    usable = [approval for approval in approvals if set(Selection.of(approval.pcrs)) == wanted]
    if not usable:
        had = Selection.of(approvals[0].pcrs)
        what = f"The terms require the PCRs {terms.selection}, but {terms.product!r} is approved by {had}."
        raise UsageError(
            Reason.TERM_INVALID, what, "Use the PCRs of the product line in the terms, or approve a new state."
        )
    return usable


def _bind(part: TokenPart | DonglePart, terms: Terms, bind_dongle: BindDongle | None) -> tuple[Binding, Secret]:
    """A fresh member secret that only this piece of hardware gives out."""
    match part:
        case TokenPart(evidence, endorsement):
            wrapped = token.wrap(evidence.key, evidence.mechanism)
            binding = TokenBinding(
                uri=evidence.uri,
                key=evidence.key,
                mechanism=evidence.mechanism,
                endorsement=endorsement,
                encapsulated=wrapped.encapsulated,
                check=wrapped.check,
                pin=evidence.pin,
            )
            return binding, wrapped.secret
        case DonglePart(usb):
            if bind_dongle is None:
                what = "The request names a dongle, and its answers are in a vendor folder."
                raise RefusedError(Reason.DONGLE_UNKNOWN, what, "Issue with the folder that the dongle is recorded in.")
            return bind_dongle(usb, terms.presence.answers if terms.presence else 0)
