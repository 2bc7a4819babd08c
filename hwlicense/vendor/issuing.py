"""Making a license: from a request that holds, for packages of this vendor, under terms."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final, NamedTuple

from hwlicense.core.documents import SCHEMA, Credential, Grant, License, PackageReference, TpmBinding, check
from hwlicense.core.envelope import seal
from hwlicense.core.errors import Reason, RefusedError, UsageError
from hwlicense.core.keys import unwrap_for_vendor, wrap_content_keys, wrap_license_secret
from hwlicense.core.secret import Secret
from hwlicense.core.tpm import duplicate
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.tpm.policy import digest, platform_reference, sealed_steps
from hwlicense.core.tpm.signatures import policy_key_public
from hwlicense.vendor import approving

if TYPE_CHECKING:
    import datetime
    from collections.abc import Sequence

    from hwlicense.core.documents import Approval, Manifest, VendorPublic
    from hwlicense.core.terms import Terms
    from hwlicense.core.tpm.structures import Public
    from hwlicense.vendor.evidence import Examined
    from hwlicense.vendor.signing import Keys


APPROVAL_LIMIT: Final = 100
"""Approvals that a license can carry; it carries that of the request, and others as far as they fit."""


class Issued(NamedTuple):
    """The license with its envelope, and where it was a product's first, the approval that it made, with its own."""

    license: License
    raw: bytes
    approval: tuple[Approval, bytes] | None


def issue(  # noqa: PLR0913  # who, for what, under what: all of it
    vendor: VendorPublic,
    keys: Keys,
    examined: Examined,
    manifests: Sequence[Manifest],
    terms: Terms,
    approvals: Sequence[Approval],
    *,
    today: datetime.date,
    pin: Secret | None = None,
) -> Issued:
    """A license for the device of `examined`. `approvals` are those of the product that `terms` name.

    Raises RefusedError (WRONG_VENDOR, PLATFORM_UNAPPROVED, PCR_UNUSABLE), UsageError, DamagedError.
    """
    for manifest in manifests:
        if manifest.vendor != vendor.fingerprint:
            what = f"The package {manifest.name!r} is another vendor's."
            raise RefusedError(Reason.WRONG_VENDOR, what, "Issue with the vendor folder that packed it.")
    generation = approving.current_generation(approvals)
    usable, first = _platform(
        vendor, keys, examined, terms, [a for a in approvals if a.generation == generation], generation
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
    )
    policy_key = policy_key_public(keys.policy.public_key()) if usable else None
    platform = platform_reference(grant.product, grant.generation) if usable else None
    binding, member = _bind(examined, policy_key, platform, pin)
    content_keys = [unwrap_for_vendor(m.wrapped_content_key, m.content_key, keys.content) for m in manifests]
    with member, Secret.random() as secret:
        issued = License(
            schema=SCHEMA,
            grant=grant,
            bindings=[binding],
            need=1,
            wraps=wrap_license_secret(secret, [member], 1),
            keys=wrap_content_keys(secret, grant, content_keys),
            approvals=usable,
        )
    for content_key in content_keys:
        content_key.wipe()
    check(issued)
    return Issued(issued, seal(issued, keys.signers), first)


def _platform(
    vendor: VendorPublic,
    keys: Keys,
    examined: Examined,
    terms: Terms,
    approvals: Sequence[Approval],
    generation: int,
) -> tuple[list[Approval], tuple[Approval, bytes] | None]:
    """The approvals that the license carries. A product's first request makes its first approval."""
    if not terms.require.pcrs:
        return [], None
    wanted = set(terms.selection)
    pcrs = [pcr for pcr in examined.evidence.pcrs if (pcr.bank, pcr.index) in wanted]
    if len(pcrs) != len(wanted):
        held = str(Selection.of(examined.evidence.pcrs)) or "none"
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
    examined: Examined, policy_key: Public | None, platform: bytes | None, pin: Secret | None
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
