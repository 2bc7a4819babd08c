"""What a grant says of use: limits, rates, features and the monitor, as the license carries them."""

# Annotations are no texts, as in `documents`

from typing import Annotated, Final, Literal

import msgspec

from hwlicense.core.schema import Document, Name, Positive

RATE_LIMIT: Final = 8
"""Rates that one license can have."""

LONGEST_WINDOW: Final = 366 * 86400
"""Seconds of the longest time frame of a rate."""

Permille = Annotated[int, msgspec.Meta(ge=1, le=1000)]
Action = Literal["flag", "throttle", "deny"]
Feature = Annotated[int, msgspec.Meta(ge=-(2**53) + 1, lt=2**53)] | bool | Annotated[str, msgspec.Meta(max_length=200)]
"""What a feature may be set to."""


class Rate(Document, frozen=True):
    """At most `count` inferences in any time frame of `seconds`."""

    count: Positive
    seconds: Annotated[int, msgspec.Meta(ge=1, le=LONGEST_WINDOW)]


class Limits(Document, frozen=True, omit_defaults=True):
    """`opens` is counted by the TPM; `hours` of powered-on time are held by its clock. The rest is the runtime's.

    All count from the installation of the revision, but hours: they count from the request.
    """

    opens: Annotated[int, msgspec.Meta(ge=1, lt=2**32)] | None = None
    inferences: Positive | None = None
    rates: Annotated[list[Rate], msgspec.Meta(max_length=RATE_LIMIT)] = msgspec.field(default_factory=list)
    hours: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    instances: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None


class Regularity(Document, frozen=True):
    """Calls that come as a machine makes them: the intervals of the last `calls` inferences vary too little.

    `variation`, in permille of their middle, is the least spread that intervals have in normal use (the range of their
    middle half, scaled to a standard deviation). Intervals longer than `pause` milliseconds begin a new run.
    """

    calls: Annotated[int, msgspec.Meta(ge=16, le=4096)]
    variation: Permille
    pause: Annotated[int, msgspec.Meta(ge=1, le=86_400_000)]
    action: Action


class Distances(Document, frozen=True):
    """Inputs whose distances to what came before are not distributed as natural ones are (PRADA, Juuti et al. 2019).

    `normality` is the Shapiro-Wilk statistic, in permille, of the last `queries` distances; where it stays below that
    for as many more, inputs count as made. `size` is the number of values of an input's features.
    """

    queries: Annotated[int, msgspec.Meta(ge=20, le=4096)]
    normality: Permille
    size: Annotated[int, msgspec.Meta(ge=1, le=256)]
    action: Action


class Monitor(Document, frozen=True, omit_defaults=True):
    """Detectors of abnormal use. What is detected holds for `lasting` seconds; `throttled` is the rate meanwhile."""

    lasting: Annotated[int, msgspec.Meta(ge=1, le=LONGEST_WINDOW)]
    regularity: Regularity | None = None
    distances: Distances | None = None
    throttled: Rate | None = None


class Use(Document, frozen=True, omit_defaults=True):
    """Terms of use, all of which this release enforces.

    `days` from first use; `anchor` asks for a ledger that the TPM anchors, `revocable` for a revision counter though
    nothing else needs one; `cap` is a PCR (sha256) that keeps sessions prepared in a write window from being used.
    """

    limits: Limits = msgspec.field(default_factory=Limits)  # which is always written, so that there is one encoding
    days: Annotated[int, msgspec.Meta(ge=1, le=36500)] | None = None
    features: Annotated[dict[Name, Feature], msgspec.Meta(max_length=100)] = msgspec.field(default_factory=dict)
    monitor: Monitor | None = None
    anchor: bool = False
    revocable: bool = False
    cap: Annotated[int, msgspec.Meta(ge=0, le=23)] | None = None

    @property
    def metered(self) -> bool:
        """Whether the device keeps an account of its use."""
        return bool(self.limits.inferences or self.limits.rates or self.monitor)

    @property
    def counted(self) -> bool:
        """Whether a TPM must keep a revision counter for it."""
        return bool(self.limits.opens or self.limits.hours or self.anchor or self.revocable)
