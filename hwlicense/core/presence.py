"""Whether hardware counts as here, from the proofs that were made of it. No clock: every time is told.

Times are seconds of one clock that never goes back. A proof counts from when it was asked for, as the hardware may be
pulled the moment after it answered: so with an interval of ten seconds nothing starts later than ten seconds after.
"""

from __future__ import annotations

from typing import Final

from hwlicense.core.durations import spelled
from hwlicense.core.errors import AbsentError, HwlicenseError, Reason

PROOFS_PER_INTERVAL: Final = 2
"""One in reserve: a proof that takes its time does not lock a license whose hardware is here."""


class Proofs:
    """What was proved of an open license's hardware, and what absence is paid for."""

    def __init__(self, interval: float, now: float) -> None:
        """`interval` in seconds; opening was the first proof."""
        self.interval = interval
        self.proven_at = now
        self.bridged_until = now
        self._problem: tuple[float, HwlicenseError] | None = None

    @property
    def period(self) -> float:
        """Seconds from one proof to the next."""
        return self.interval / PROOFS_PER_INTERVAL

    def proven(self, asked_at: float) -> None:
        """A proof that was asked for at `asked_at` holds."""
        self.proven_at = max(self.proven_at, asked_at)
        self._problem = None

    def failed(self, problem: HwlicenseError, now: float) -> None:
        """The hardware gave no proof."""
        self._problem = (self._problem[0] if self._problem else now), problem

    def bridged(self, until: float) -> None:
        """Absence is paid for from the grace, until then."""
        self.bridged_until = max(self.bridged_until, until)

    def here(self, now: float) -> bool:
        """Whether the last proof still holds."""
        return self._problem is None and now <= self.proven_at + self.interval

    def away_since(self, now: float) -> float:
        """When the last proof ended to hold; `now` while it holds."""
        lapsed = self.proven_at + self.interval
        return min(now, lapsed, self._problem[0] if self._problem else now)

    def refusal(self, now: float) -> HwlicenseError | None:
        """Why nothing may start; None if it may."""
        if self.here(now) or now < self.bridged_until:
            return None
        if self._problem:
            return self._problem[1].again()
        return AbsentError(
            Reason.PRESENCE_UNPROVEN,
            f"The license's hardware has not proved within {spelled(self.interval)} that it is here.",
            "Check that it is plugged in and that nothing else keeps it busy.",
        )
