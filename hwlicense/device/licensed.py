"""What an open model says of the license it was opened under."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hwlicense.core.errors import Reason, RefusedError

if TYPE_CHECKING:
    from hwlicense.core.documents import Grant
    from hwlicense.core.monitoring import Verdict
    from hwlicense.device.metering import Metering


class Licensed:
    """Who, what, until when, and with which features: `grant`, None where nothing was said."""

    grant: Grant | None
    _metering: Metering | None

    @property
    def features(self) -> dict[str, int | bool | str]:
        """What the license's `[features]` are set to."""
        return dict(self.grant.terms_of_use.features) if self.grant else {}

    def require(self, feature: str) -> int | bool | str:
        """What a feature of the license is set to. Raises RefusedError FEATURE_ABSENT where it is not, or to false."""
        found = self.features.get(feature, False)
        if found is False:
            what = f"The license does not have the feature {feature!r}."
            raise RefusedError(Reason.FEATURE_ABSENT, what, "Ask the vendor for a revision with this feature.")
        return found

    @property
    def monitored(self) -> Verdict:
        """What the license's monitor has found, as far as it is in force."""
        from hwlicense.core import monitoring  # noqa: PLC0415  # most licenses have no monitor

        return self._metering.verdict if self._metering else monitoring.Verdict()
