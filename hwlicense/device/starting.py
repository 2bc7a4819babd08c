"""What an open model says of procedures: one that is under way, and whether one may start."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Final, NamedTuple

from hwlicense.core.durations import spelled
from hwlicense.core.errors import ExceededError, Reason, RefusedError, UsageError

if TYPE_CHECKING:
    from hwlicense.core.errors import HwlicenseError

_MOST: Final = 1 << 31
_OF_THE_CLOCK: Final = (Reason.CLOCK_SET_BACK, Reason.LICENSE_NOT_YET_VALID)


class Session(NamedTuple):
    """A procedure under way. The license keeps it from interruption for `continuity` seconds; None: to its end.

    `inferences` were reserved for it: what its thread spends beyond the license's limits is taken from them.
    """

    continuity: int | None
    inferences: int = 0


class Standing(NamedTuple):
    """What may start now: nothing, for the reason of `refusal`, or anything where that is None. True where it may.

    `present`: whether the hardware proved within its interval that it is here; not so while the grace bridges its
    absence, of which `grace_left` seconds are left. Without a presence term, opening was the proof.
    """

    refusal: HwlicenseError | None
    present: bool
    grace_left: float

    def __bool__(self) -> bool:
        return self.may_start

    @property
    def may_start(self) -> bool:
        """Whether `session` would begin."""
        return self.refusal is None

    @property
    def reason(self) -> Reason | None:
        """The stable code of the refusal."""
        return self.refusal.reason if self.refusal else None


def foremost(*refusals: HwlicenseError | None) -> HwlicenseError | None:
    """The first that waiting does not end; where all of them pass, the first. None where there is none."""
    found = [each for each in refusals if each]
    return next((each for each in found if not _passes(each)), found[0] if found else None)


def _passes(refusal: HwlicenseError) -> bool:
    if isinstance(refusal, ExceededError):
        return refusal.wait is not None
    return not isinstance(refusal, RefusedError) or refusal.reason in _OF_THE_CLOCK


def used_up(total: int) -> ExceededError:
    """What is said where nothing is left of a license's inferences."""
    what = f"The license's inferences are used up: it allowed {total:,}."
    return ExceededError(Reason.INFERENCES_EXHAUSTED, what, "Ask the vendor for a revision with more.")


def check_count(count: object, least: int = 1) -> None:
    """Raises UsageError where `count` is no whole number of inferences from `least` to 2^31 - 1."""
    if type(count) is not int or not least <= count < _MOST:
        what = f"{count!r} is no number of inferences."
        raise UsageError(Reason.USAGE, what, f"Give a whole number from {least} on.")


def check_seconds(seconds: float, said: str) -> None:
    """Raises UsageError where `seconds` are no duration; `said`: which one is wanted."""
    given: object = seconds
    if not isinstance(given, Real) or not seconds >= 0:
        raise UsageError(Reason.USAGE, f"{seconds!r} is no number of seconds.", f"Give {said}, from 0 on.")


def too_long(horizon: float, continuity: int | None) -> RefusedError | None:
    """Why no procedure of `horizon` seconds may start; None if one may. Raises UsageError for what is no duration."""
    check_seconds(horizon, "how many seconds the procedure takes at the most")
    if continuity is None or horizon <= continuity:
        return None
    what = f"The procedure would take longer than the {spelled(continuity)} that the license keeps from interruption."
    return RefusedError(Reason.CONTINUITY_TOO_SHORT, what, "Start a shorter one, or ask for another license.")
