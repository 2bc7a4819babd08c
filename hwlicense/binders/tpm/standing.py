"""How a counted license stands with its TPM, and what is said where it does not open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tpm2_pytss import TSS2_Exception

from hwlicense.binders.tpm.counting import GONE
from hwlicense.binders.tpm.failures import code
from hwlicense.core.errors import ExceededError, HardwareError, Reason, RefusedError
from hwlicense.core.tpm.nv import counter_public

if TYPE_CHECKING:
    from hwlicense.binders.tpm.counting import Indexes
    from hwlicense.binders.tpm.sealed import Sealed

State = Literal["current", "superseded", "unfinished", "lost"]


def of(indexes: Indexes, sealed: Sealed) -> State:
    """By the value of the counter, which the TPM authenticates."""
    counter = sealed.binding.counter
    if counter is None:
        return "current"
    try:
        value = indexes.value(counter_public(counter.handle))
    except TSS2_Exception as error:
        if code(error) not in GONE:
            raise
        return "lost"
    if value > counter.value:
        return "superseded"
    return "current" if value == counter.value else "unfinished"


def refusal(state: State, sealed: Sealed) -> RefusedError:
    """What is said of a license that is not in force, or lacks an index."""
    match state:
        case "superseded":
            return superseded()
        case "unfinished":
            what = "The installation of this license was not finished: its TPM waits for the rest."
            return RefusedError(Reason.INSTALL_UNFINISHED, what, "Install the license file again.")
        case "lost":
            return lost("its counter")
        case "current":
            purposes = " and ".join(index.purpose for index in sealed.conditions.indexes)
            return lost(f"its index ({purposes})")


def superseded() -> RefusedError:
    """A later revision, or one whose installation has begun, has ended this one."""
    what = "A later revision of this license has ended it: its TPM has counted on."
    return RefusedError(Reason.LICENSE_SUPERSEDED, what, "Install the latest license file that the vendor sent.")


def lost(what: str) -> RefusedError:
    """Cleared, or taken away or replaced by the TPM's owner."""
    hint = "Enroll the device again (--counted) and ask the vendor for a license for it."
    return RefusedError(
        Reason.COUNTER_LOST, f"The TPM no longer has {what}: it was cleared, or that was removed.", hint
    )


def exhausted(sealed: Sealed) -> ExceededError:
    """All opens are spent. Nothing was spent by asking."""
    limit = next((index.limit for index in sealed.conditions.indexes if index.purpose == "opens"), 0)
    what = f"All {limit:,} opens of the license are spent."
    return ExceededError(Reason.OPENS_EXHAUSTED, what, "Ask the vendor for a revision of the license with more.")


def tampered() -> HardwareError:
    """An index is what it should be, and refuses what it should take."""
    what = "A command to the TPM was changed on its way: the TPM refuses its authentication."
    return HardwareError(Reason.TPM_ANSWER_FORGED, what, "Inspect the device: something tampers with its TPM's bus.")
