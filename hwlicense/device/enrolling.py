"""Asking for a license: what the hardware says of itself, signed by it where it can sign."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from hwlicense.core.documents import Request, TpmEvidence
from hwlicense.core.envelope import Signature, assemble, statement
from hwlicense.core.hardware import Counting
from hwlicense.core.schema import SCHEMA, check
from hwlicense.core.tpm.structures import Public

if TYPE_CHECKING:
    import datetime
    from collections.abc import Sequence

    from hwlicense.core.hardware import AnyHardware
    from hwlicense.core.tpm.pcrs import Selection


def enroll(
    hardware: Sequence[AnyHardware],
    selection: Selection,
    device: str,
    today: datetime.date,
    *,
    counted: bool = False,
) -> bytes:
    """A request for all of `hardware`, as the bytes of a `.hwreq` file. `device` is a label for people.

    `counted` makes a counter in the TPM, for licenses with limits that a TPM holds.
    Raises HardwareError, RefusedError PCR_UNUSABLE for PCRs that were never extended, UsageError for a bad label.
    """
    evidence = [one.describe(selection) for one in hardware]
    if counted:
        evidence = [
            msgspec.structs.replace(found, counter=one.provide_counter()) if isinstance(one, Counting) else found
            for one, found in zip(hardware, evidence, strict=True)
        ]
    request = Request(SCHEMA, today, device, evidence)
    check(request)
    signatures = [
        Signature(Public.parse(found.attestation_key).name.hex(), one.prove(found, statement(request)))
        for one, found in zip(hardware, evidence, strict=True)
        if isinstance(found, TpmEvidence)
    ]
    return assemble(request, signatures)
