"""What an open model says of the license it was opened under."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hwlicense.core.errors import Reason, RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwlicense.core.documents import Grant
    from hwlicense.core.keys import Content
    from hwlicense.core.monitoring import Verdict
    from hwlicense.device.bound import Bound
    from hwlicense.device.checks import Finding
    from hwlicense.device.guarding import Watch
    from hwlicense.device.instances import Instance
    from hwlicense.device.metering import Metering
    from hwlicense.device.presence import Presence
    from hwlicense.device.recorder import Recorder


class Conditions(NamedTuple):
    """What holds an open model to its license: each part is None where the license does not ask for it.

    `instance` is for a license that meters nothing. With `presence` comes what gives the content once more. `recorder`
    makes what `outputs` is.
    """

    grant: Grant | None = None
    presence: tuple[Presence, Callable[[Bound, bool], Content]] | None = None
    metering: Metering | None = None
    instance: Instance | None = None
    watch: Watch | None = None
    recorder: Callable[[], Recorder] | None = None


class Licensed:
    """Who, what, until when, and with which features: `grant`, None where nothing was said."""

    def __init__(self, conditions: Conditions) -> None:
        self.grant, presence, self._metering, self._instance, self._watch, self._recorder = conditions
        self._presence = presence[0] if presence else None
        self._content = presence[1] if presence else None

    @property
    def outputs(self) -> Recorder:
        """Begins recordings of inputs and outputs, signed under the word of the license's hardware."""
        assert self._recorder is not None  # noqa: S101  # opening gives one
        return self._recorder()

    @property
    def findings(self) -> list[Finding]:
        """What the guard's checks find in and around this process now, whether or not the license refuses it."""
        from hwlicense.device.checks import findings  # noqa: PLC0415  # for who asks

        return findings(objects=[self])

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
