"""The TPM's own clock: read so that nobody between can change it, and set on after a power cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tpm2_pytss import ESYS_TR, TPM2_CAP, TPM2_PT, TPM2_SE, TPMA_SESSION, TSS2_Exception

from hwlicense.binders.tpm.failures import WRONG_AUTHORIZATION, code
from hwlicense.core.durations import spelled
from hwlicense.core.errors import HardwareError, Reason
from hwlicense.core.tpm.quote import Time, read_time

if TYPE_CHECKING:
    from hwlicense.binders.tpm.connection import Work

LONGEST_LAPSE: Final = 1 << 22
"""Milliseconds: no TPM updates the clock that it keeps over power cuts less often (Part 1, 36.3)."""


def time(work: Work, root: ESYS_TR) -> Time:
    """The TPM's time, which nobody between can change."""
    return read(work, work.session(root, TPM2_SE.HMAC, TPMA_SESSION.CONTINUESESSION))


def read(work: Work, session: ESYS_TR) -> Time:
    """The same over a session that is there, and ends."""
    work.call("trsess_set_attributes", session, TPMA_SESSION(0))
    attested, _ = work.call("get_time", ESYS_TR.NULL, b"", session1=session, session2=ESYS_TR.PASSWORD)
    work.ended(session)
    return read_time(bytes(attested.attestationData))


def lapse(work: Work, session: ESYS_TR) -> int:
    """How many milliseconds the TPM's clock can lose at a power cut, by a session for audit that goes on.

    Raises HardwareError TPM_UNSUPPORTED.
    """
    _, capability = work.call("get_capability", TPM2_CAP.TPM_PROPERTIES, TPM2_PT.CLOCK_UPDATE, 1, session1=session)
    facts = {int(fact.property): int(fact.value) for fact in capability.data.tpmProperties}
    found = facts.get(int(TPM2_PT.CLOCK_UPDATE), 0)
    if not 0 < found <= LONGEST_LAPSE:
        what = f"The TPM says that it keeps its clock every {found:,} ms, which no TPM should."
        raise HardwareError(Reason.TPM_UNSUPPORTED, what, "Update the TPM's firmware.")
    return found


def make_safe(work: Work, root: ESYS_TR) -> None:
    """After a power cut, set the clock on by as much as it can have lost: the TPM then vouches for it again at once.

    Takes the owner's authorization, and at most that time from the license.
    """
    goes_on = TPMA_SESSION.AUDIT | TPMA_SESSION.CONTINUESESSION
    session = work.session(root, TPM2_SE.HMAC, goes_on)
    forward, now = lapse(work, session), read(work, session)
    if now.safe:
        return
    session = work.session(root, TPM2_SE.HMAC, TPMA_SESSION(0))
    try:
        work.call("clock_set", now.clock + forward, session1=session)
    except TSS2_Exception as error:
        if code(error) not in WRONG_AUTHORIZATION:
            raise
        what = "After a power cut the TPM's clock is to be set on, and the TPM's owner hierarchy has a password."
        hint = f"Wait {spelled(forward / 1000)} with the TPM switched on, and try again."
        raise HardwareError(Reason.TPM_AUTHORIZATION, what, hint) from error
    work.ended(session)
