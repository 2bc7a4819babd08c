"""How a license stands with the TPM that counts it, and what is said where it does not open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hwlicense.core.errors import ExceededError, Reason, RefusedError

if TYPE_CHECKING:
    from hwlicense.core.documents import TpmCounter

State = Literal["current", "superseded", "unfinished", "lost"]
"""Usable; ended by a later revision; in the write window that an installation did not close; without its counter."""


def of(value: int | None, counter: TpmCounter) -> State:
    """By the value that the TPM's counter has; None where it is not there."""
    if value is None:
        return "lost"
    if value > counter.value:
        return "superseded"
    return "current" if value == counter.value else "unfinished"


def refusal(state: State) -> RefusedError:
    """What is said of a license that is not in force; of one that is, that it lacks an index."""
    match state:
        case "superseded":
            what = "A later revision, or one whose installation has begun, has ended this license: its TPM counted on."
            hint = "Install the latest license file that the vendor sent."
            return RefusedError(Reason.LICENSE_SUPERSEDED, what, hint)
        case "unfinished":
            what = "The installation of this license was not finished: its TPM waits for the rest."
            return RefusedError(Reason.INSTALL_UNFINISHED, what, "Install the license file again.")
        case "lost" | "current":
            return lost("the license's counter or an index of it")


def lost(what: str) -> RefusedError:
    """Cleared, or taken away or replaced by the TPM's owner."""
    hint = "Enroll the device again (--counted) and ask the vendor for a license for it."
    return RefusedError(
        Reason.COUNTER_LOST, f"The TPM no longer has {what}: it was cleared, or that was removed.", hint
    )


def taken(what: str) -> RefusedError:
    """The counter is at the license's value, and yet what lies beside it is not its own."""
    text = f"{what} in the TPM is another's: of a license that was made from the same request, as a rule."
    hint = "A request made with --counted is for one license: enroll again (--counted) and ask for one for that."
    return RefusedError(Reason.COUNTER_LOST, text, hint)


def exhausted(limit: int) -> ExceededError:
    """All opens are spent. Nothing was spent by asking."""
    what = f"All opens of the license are spent: it allowed {limit:,}."
    return ExceededError(Reason.OPENS_EXHAUSTED, what, "Ask the vendor for a revision of the license with more.")


def overdue() -> ExceededError:
    """The TPM's clock has reached the license's deadline."""
    hint = "Ask the vendor for a revision of the license with more hours."
    return ExceededError(Reason.HOURS_EXHAUSTED, "The license's hours of powered-on time are over.", hint)
