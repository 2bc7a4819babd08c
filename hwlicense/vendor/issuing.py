"""Making a license: from requests that hold, for packages of this vendor, under terms."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from hwlicense.core import token
from hwlicense.core.documents import (
    BINDING_LIMIT,
    Binding,
    Credential,
    Grant,
    License,
    PackageReference,
    TokenBinding,
    TpmBinding,
    UsbBinding,
    UsbEvidence,
)
from hwlicense.core.envelope import seal
from hwlicense.core.errors import Reason, RefusedError, UsageError
from hwlicense.core.keys import unwrap_for_vendor, wrap_content_keys, wrap_license_secret
from hwlicense.core.schema import SCHEMA, check
from hwlicense.core.secret import Secret
from hwlicense.core.tpm import duplicate
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.tpm.policy import digest, platform_reference, sealed_steps
from hwlicense.core.tpm.signatures import policy_key_public
from hwlicense.core.uri import TokenUri
from hwlicense.vendor import approving
from hwlicense.vendor.evidence import DonglePart, TokenPart, TpmPart, identity

if TYPE_CHECKING:
    import datetime
    from collections.abc import Sequence

    from hwlicense.core.documents import Approval, Manifest, Pcr, VendorPublic
    from hwlicense.core.terms import Terms
    from hwlicense.core.tpm.structures import Public
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
) -> Issued:
    """A license for hardware of one or several requests. `approvals` are those of the product that `terms` name.

    `pin` is for the TPM; a token has its own. Raises RefusedError (WRONG_VENDOR, PLATFORM_UNAPPROVED, PCR_UNUSABLE,
    DONGLE_UNKNOWN, ANSWERS_EXHAUSTED), UsageError, DamagedError.
    """
    need = _needed(parts, terms, pin)
    for manifest in manifests:
        if manifest.vendor != vendor.fingerprint:
            what = f"The package {manifest.name!r} is another vendor's."
            raise RefusedError(Reason.WRONG_VENDOR, what, "Issue with the vendor folder that packed it.")
    generation = approving.current_generation(approvals)
    usable, first = _platform(
        vendor, keys, _pcrs(parts), terms, [a for a in approvals if a.generation == generation], generation
    )
    grant = Grant(
        license=secrets.token_hex(16),
        revision=1,
        vendor=vendor.fingerprint,
        licensee=terms.licensee,
        product=terms.product,
        generation=generation,
        packages=[PackageReference(m.name, m.version, m.content_key) for m in manifests],
        issued=today,
        not_before=terms.validity.not_before,
        not_after=terms.validity.not_after,
        pcrs=[str(terms.selection)] if terms.require.pcrs else [],
        presence=terms.granted_presence,
        continuity=terms.granted_continuity,
    )
    policy_key = policy_key_public(keys.policy.public_key()) if usable else None
    platform = platform_reference(grant.product, grant.generation) if usable else None
    bindings: list[Binding] = []
    members: list[Secret] = []
    content_keys = [unwrap_for_vendor(m.wrapped_content_key, m.content_key, keys.content) for m in manifests]
    try:
        for part in parts:
            binding, member = _bind(part, terms, policy_key, platform, pin, bind_dongle)
            bindings.append(binding)
            members.append(member)
        with Secret.random() as secret:
            issued = License(
                schema=SCHEMA,
                grant=grant,
                bindings=bindings,
                need=need,
                wraps=wrap_license_secret(secret, members, need),
                keys=wrap_content_keys(secret, grant, content_keys),
                approvals=usable,
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
    if terms.require.pcrs and (need < len(parts) or not _pcrs(parts)):
        what = "The terms require PCRs, to which only a TPM holds a license: it must be among the bindings, and needed."
        raise UsageError(Reason.TERM_INVALID, what, 'Enroll the TPM with --pcrs, and require.bindings = "all".')
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
    usable = [approval for approval in approvals if set(Selection.of(approval.pcrs)) == wanted]
    if not usable:
        had = Selection.of(approvals[0].pcrs)
        what = f"The terms require the PCRs {terms.selection}, but {terms.product!r} is approved by {had}."
        raise UsageError(
            Reason.TERM_INVALID, what, "Use the PCRs of the product line in the terms, or approve a new state."
        )
    present = approving.matching(usable, pcrs, terms.product)
    return [present, *(approval for approval in usable if approval != present)][:APPROVAL_LIMIT], None


def _bind(
    part: Part,
    terms: Terms,
    policy_key: Public | None,
    platform: bytes | None,
    pin: Secret | None,
    bind_dongle: BindDongle | None,
) -> tuple[Binding, Secret]:
    """A fresh member secret that only this piece of hardware gives out."""
    match part:
        case TpmPart():
            return _bind_tpm(part, policy_key, platform, pin)
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


def _bind_tpm(
    examined: TpmPart, policy_key: Public | None, platform: bytes | None, pin: Secret | None
) -> tuple[TpmBinding, Secret]:
    """A fresh member secret in three parts, each of which only this TPM gives out."""
    srk, ek, ak = examined.storage_root_key, examined.endorsement_key, examined.attestation_key
    with Secret.random() as value, Secret.random() as storage_share, Secret.random() as attestation_share:
        steps = sealed_steps(policy_key.name if policy_key else None, platform, pin=pin is not None)
        sealed = duplicate.seal(srk, digest(steps), value, pin)
        credentials = [
            Credential(*duplicate.make_credential(ek, key.name, share))
            for key, share in ((srk, storage_share), (ak, attestation_share))
        ]
        binding = TpmBinding(
            storage_root_key=srk.name,
            attestation_key=ak.name,
            endorsement_key=ek.name,
            endorsement=examined.endorsement,
            public=sealed.public,
            duplicate=sealed.duplicate,
            seed=sealed.seed,
            storage_credential=credentials[0],
            attestation_credential=credentials[1],
            policy_key=policy_key.raw if policy_key else None,
            platform=platform,
            pin=pin is not None,
        )
        return binding, duplicate.member_secret(value, storage_share, attestation_share)
