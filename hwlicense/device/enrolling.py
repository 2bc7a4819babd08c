"""Asking for a license: what the hardware says of itself, signed by it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hwlicense.core.documents import SCHEMA, Request, check
from hwlicense.core.envelope import Signature, assemble, statement
from hwlicense.core.tpm.structures import Public

if TYPE_CHECKING:
    import datetime

    from hwlicense.core.hardware import Hardware
    from hwlicense.core.tpm.pcrs import Selection


def enroll(hardware: Hardware, selection: Selection, device: str, today: datetime.date) -> bytes:
    """A request, as the bytes of a `.hwreq` file. `device` is a label for people.

    Raises HardwareError, RefusedError PCR_UNUSABLE for PCRs that were never extended, UsageError for a bad label.
    """
    evidence = hardware.describe(selection)
    request = Request(SCHEMA, today, device, [evidence])
    check(request)
    proof = hardware.prove(evidence, statement(request))
    return assemble(request, [Signature(Public.parse(evidence.attestation_key).name.hex(), proof)])
