"""Sealing a member secret to a TPM, under everything that the terms want the TPM itself to hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from hwlicense.core.documents import Credential, TpmBinding, TpmCounter, TpmIndex
from hwlicense.core.errors import Reason, UsageError
from hwlicense.core.secret import Secret
from hwlicense.core.tpm import duplicate
from hwlicense.core.tpm.composing import MILLISECONDS, PLACES, Conditions, write_reference
from hwlicense.core.tpm.nv import UNCOUNTABLE
from hwlicense.core.tpm.policy import digest, platform_reference
from hwlicense.core.tpm.signatures import policy_key_public, sign_approval
from hwlicense.vendor.evidence import TpmPart

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from hwlicense.core.documents import Grant
    from hwlicense.core.limits import Use
    from hwlicense.vendor.evidence import Part
    from hwlicense.vendor.signing import Keys


def check_countable(parts: Sequence[Part], need: int, use: Use) -> None:
    """That a TPM can hold what the terms want it to. Raises UsageError TERM_INVALID."""
    if not use.counted:
        return
    tpm = next((part for part in parts if isinstance(part, TpmPart)), None)
    if tpm is None or need < len(parts):
        what = "The terms have limits that a TPM holds: it must be among the bindings, and needed."
        raise UsageError(Reason.TERM_INVALID, what, 'Enroll the TPM with --counted, and require.bindings = "all".')
    if tpm.evidence.counter is None:
        what = "The terms have limits that a TPM holds, and the request names no counter for them."
        raise UsageError(Reason.TERM_INVALID, what, "Enroll the device again: hwlicense device enroll --counted.")


def counter_value(start: int, revision: int, since: int = 1) -> int:
    """The value of the counter at which a revision opens, where it was `start` (odd) for the revision `since`."""
    return start + 1 + 2 * (revision - since)


def conditions(part: TpmPart, grant: Grant, keys: Keys, *, pin: bool, since: int, needed: bool) -> Conditions:
    """What the TPM is to ask for. `needed`: whether the license opens without this TPM, too, says False."""
    use, start = grant.terms_of_use, part.evidence.counter
    platform = platform_reference(grant.product, grant.generation) if grant.pcrs else None
    metered = needed and start is not None and bool(use.metered or use.days)
    public = policy_key_public(keys.policy.public_key())
    if start is None or not (use.counted or metered):
        return Conditions(public if platform else None, platform, pin)
    counter = TpmCounter(start.handle, counter_value(start.value, grant.revision, since))
    asked: list[tuple[Literal["opens", "anchor"], int]] = []
    if use.limits.opens:
        asked.append(("opens", use.limits.opens))
    if use.anchor or metered:
        asked.append(("anchor", UNCOUNTABLE))
    indexes = [
        TpmIndex(
            purpose,
            counter.handle + PLACES[purpose],
            limit,
            write_reference(purpose, grant.vendor, grant.license, counter.value),
            b"",
        )
        for purpose, limit in asked
    ]
    deadline = part.clock + use.limits.hours * MILLISECONDS if use.limits.hours else None
    unsigned = Conditions(public, platform, pin, counter, indexes, deadline, use.cap)
    signed = [
        msgspec.structs.replace(index, write=sign_approval(keys.policy, digest(unsigned.write(index)), index.reference))
        for index in indexes
    ]
    return Conditions(public, platform, pin, counter, signed, deadline, use.cap)


def bind(part: TpmPart, asked: Conditions, pin: Secret | None) -> tuple[TpmBinding, Secret]:
    """A fresh member secret in three parts, each of which only this TPM gives out, under these conditions."""
    srk, ek, ak = part.storage_root_key, part.endorsement_key, part.attestation_key
    with Secret.random() as value, Secret.random() as storage_share, Secret.random() as attestation_share:
        sealed = duplicate.seal(srk, digest(asked.sealed), value, pin)
        credentials = [
            Credential(*duplicate.make_credential(ek, key.name, share))
            for key, share in ((srk, storage_share), (ak, attestation_share))
        ]
        binding = TpmBinding(
            storage_root_key=srk.name,
            attestation_key=ak.name,
            endorsement_key=ek.name,
            endorsement=part.endorsement,
            public=sealed.public,
            duplicate=sealed.duplicate,
            seed=sealed.seed,
            storage_credential=credentials[0],
            attestation_credential=credentials[1],
            policy_key=asked.policy_key.raw if asked.policy_key else None,
            platform=asked.platform,
            pin=asked.pin,
            counter=asked.counter,
            indexes=list(asked.indexes),
            deadline=asked.deadline,
            cap=asked.cap,
        )
        return binding, duplicate.member_secret(value, storage_share, attestation_share)
