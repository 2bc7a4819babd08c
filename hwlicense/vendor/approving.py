"""Platform states that a vendor approves for a product line."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

import msgspec

from hwlicense.core.documents import Approval, Pcr
from hwlicense.core.envelope import seal
from hwlicense.core.errors import Reason, RefusedError, UsageError
from hwlicense.core.schema import SCHEMA, check
from hwlicense.core.tpm.pcrs import BANKS, Selection, values_digest
from hwlicense.core.tpm.policy import approved_digest, platform_reference
from hwlicense.core.tpm.signatures import sign_approval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwlicense.core.documents import VendorPublic
    from hwlicense.vendor.signing import Keys


def approve(
    vendor: VendorPublic, keys: Keys, product: str, generation: int, pcrs: Sequence[Pcr]
) -> tuple[Approval, bytes]:
    """An approval and its envelope. Raises RefusedError PCR_UNUSABLE, UsageError."""
    if not pcrs:
        raise UsageError(
            Reason.USAGE, "An approval needs at least one PCR.", "Enroll or probe with --pcrs, such as sha256:7."
        )
    policy = approved_digest(pcrs)
    draft = Approval(SCHEMA, vendor.fingerprint, product, generation, list(pcrs), policy, b"")
    check(draft)
    signature = sign_approval(keys.policy, policy, platform_reference(product, generation))
    approval = msgspec.structs.replace(draft, signature=signature)
    return approval, seal(approval, keys.signers)


def current_generation(approvals: Sequence[Approval]) -> int:
    """The generation that new licenses name: the highest approved one, or 1."""
    return max((approval.generation for approval in approvals), default=1)


def matching(approvals: Sequence[Approval], pcrs: Sequence[Pcr], product: str) -> Approval:
    """The one of `approvals` that is of exactly these values. Raises RefusedError PLATFORM_UNAPPROVED."""
    policy = approved_digest(pcrs)
    for approval in approvals:
        if approval.policy == policy:
            return approval
    differing = sorted({f"{p.bank}:{p.index}" for a in approvals for p in a.pcrs if p not in pcrs})
    raise RefusedError(
        Reason.PLATFORM_UNAPPROVED,
        f"The request's platform state is not approved for {product!r} (PCRs that differ: {', '.join(differing)}).",
        "Find out why it booted otherwise; if that is right, approve it with `hwlicense vendor approve --request`.",
    )


def parse_pcrs(text: str) -> list[Pcr]:
    """PCR values as people write them: one TOML table a bank, PCR numbers as keys, values in hexadecimal.

    Raises UsageError, and RefusedError PCR_UNUSABLE for values that bind to nothing.
    """
    try:
        table = tomllib.loads(text)
        pcrs = [
            msgspec.convert(
                {"bank": bank, "index": int(index), "value": bytes.fromhex(value)}, Pcr, builtin_types=(bytes,)
            )
            for bank, values in table.items()
            for index, value in values.items()
        ]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        hint = f'Write a table [BANK] (BANK is {" or ".join(BANKS)}) with lines like 7 = "64 hexadecimal digits".'
        raise UsageError(Reason.USAGE, f"The file of PCR values cannot be used: {error}.", hint) from None
    values_digest(pcrs)
    ordered = list(Selection.of(pcrs))
    return sorted(pcrs, key=lambda pcr: ordered.index((pcr.bank, pcr.index)))
