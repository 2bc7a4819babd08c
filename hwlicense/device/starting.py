"""What an open model says of procedures: one that is under way, and whether one may start."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from hwlicense.core.errors import HwlicenseError, Reason


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
