"""The monitor: whether calls come as a machine makes them, and whether inputs are made from one another.

It sees times, counts and feature vectors, and says which detector the terms name has found something, and until when
that holds. What it keeps is a `State` of bounded size, which the metering keeps with the ledger. docs/monitor.md says
what it finds and what not.
"""

from __future__ import annotations

import bisect
import itertools
import math
import struct
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

import msgspec

from hwlicense.core import schema
from hwlicense.core.errors import DamagedError, Reason, UsageError
from hwlicense.core.normality import shapiro_wilk
from hwlicense.core.regularity import spread
from hwlicense.core.schema import SCHEMA, SIZE_LIMITS, Count, Document
from hwlicense.core.wording import quantity

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from hwlicense.core.limits import Action, Distances, Monitor, Regularity

VALUES: Final = 8192
"""Values of all feature vectors that are kept to measure distances to."""

CLASSES: Final = 64
"""Classes that are told apart, and fewer for long vectors; others share one."""

FEWEST: Final = 32
"""Intervals that it takes to call them regular, however many inferences each call has."""

CHECKS: Final = 10
"""How often a detector looks while what it looks at is replaced as a whole."""

_OUTLIER: Final = 3
_LARGEST: Final = 3.0e38
_LONGEST: Final = 2**32 - 1
_WEIGHT: Final = ("none", "flag", "throttle", "deny")

Detector = Literal["regularity", "distances"]


class Observation(NamedTuple):
    """One call: milliseconds of the meter's clock, `n` inferences, and of the input what the application tells.

    `label` is the class that the model gave, where the application tells it; 0 or more.
    """

    time: int
    n: int = 1
    features: tuple[float, ...] | None = None
    label: int = 0


class Verdict(NamedTuple):
    """What is in force: the strongest action of the `detectors` that found something, and until when (milliseconds).

    `variation` and `normality` are the last figures measured, None before the first.
    """

    action: Action | Literal["none"] = "none"
    detectors: tuple[Detector, ...] = ()
    until: int | None = None
    variation: float | None = None
    normality: float | None = None


_Time = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
_Figure = Annotated[float, msgspec.Meta(ge=0, le=1e100)]
_Window = Annotated[bytes, msgspec.Meta(max_length=4 * 4097)]


class Nearness(Document, frozen=True):
    """Of one class: how far those that joined the kept ones were from them, as a running mean and variance."""

    joined: Count = 0
    mean: _Figure = 0.0
    variance: _Figure = 0.0

    @property
    def threshold(self) -> float:
        """An input that is farther than this joins."""
        return self.mean - math.sqrt(self.variance)

    def after(self, distance: float, most: int) -> Nearness:
        """With one more; what came before the last `most` or so is forgotten."""
        joined = min(self.joined + 1, most)
        off = distance - self.mean
        mean = self.mean + off / joined
        return Nearness(joined, mean, self.variance + (off * (distance - mean) - self.variance) / joined)


class State(Document, frozen=True):
    """What is kept between calls and over restarts, at most about 100 kB. An empty one is `State()`.

    `last` is the time of the newest call; `intervals` lead to it (u32, milliseconds), `counts` are the inferences of
    each call (u32). `kept` holds feature vectors (f32, `size` each), oldest first, `classes` their class (u16), `near`
    what each class is judged by; `distances` the last ones (f32). All little-endian. `calls` and `inputs` count what
    came since a detector looked; `variation` and `normality` are what it saw last, `judged` the last statistics;
    `found` is until when a finding holds.
    """

    schema: Annotated[int, msgspec.Meta(ge=SCHEMA, le=SCHEMA)] = SCHEMA
    last: _Time = 0
    intervals: _Window = b""
    counts: _Window = b""
    calls: Count = 0
    variation: float | None = None
    size: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0
    kept: Annotated[bytes, msgspec.Meta(max_length=4 * VALUES)] = b""
    classes: Annotated[bytes, msgspec.Meta(max_length=2 * VALUES)] = b""
    near: Annotated[list[Nearness], msgspec.Meta(max_length=CLASSES)] = msgspec.field(default_factory=list)
    distances: _Window = b""
    inputs: Count = 0
    judged: Annotated[list[Annotated[float, msgspec.Meta(ge=0, le=2)]], msgspec.Meta(max_length=CHECKS)] = (
        msgspec.field(default_factory=list)
    )
    normality: float | None = None
    found: dict[Detector, _Time] = msgspec.field(default_factory=dict)

    def encode(self) -> bytes:
        """The one encoding."""
        return schema.encode(self)

    @classmethod
    def decode(cls, raw: bytes) -> State:
        """Raises DamagedError HOME_DAMAGED for all that `encode` does not write."""
        try:
            state = schema.decode(raw, cls)
        except DamagedError as error:
            raise _damaged(error.what) from None
        if not state.whole:
            raise _damaged("Its parts do not fit together.")
        return state

    @property
    def whole(self) -> bool:
        """Whether its parts fit together."""
        vectors, rest = divmod(len(self.classes), 2)
        return (
            not (rest or len(self.intervals) % 4 or len(self.distances) % 4)
            and len(self.counts) == len(self.intervals) + (4 if self.counts else 0)
            and sum(_unpack("I", self.intervals)) <= self.last
            and len(self.kept) == 4 * self.size * vectors
            and len(self.near) == (_classes(self.size) if self.size else 0)
            and all(code < len(self.near) for code in _unpack("H", self.classes))
            and all(map(math.isfinite, _unpack("f", self.kept)))
            and all(map(math.isfinite, _unpack("f", self.distances)))
        )


SIZE_LIMITS[State] = 256 << 10
schema.prepare(State)


def _damaged(why: str) -> DamagedError:
    hint = "Remove the monitor's state from the state folder; what it had found counts until it is found anew."
    return DamagedError(Reason.HOME_DAMAGED, f"The state of the monitor cannot be read. {why}", hint)


def check_features(terms: Monitor, features: Sequence[float]) -> tuple[float, ...]:
    """The features of an input as an observation has them. Raises UsageError USAGE for another number of them, or NaN.

    Empty where the terms do not ask for any.
    """
    if terms.distances is None:
        return ()
    size = terms.distances.size
    if len(features) != size:
        what = f"The feature vector has {quantity(len(features), 'value')}; the license's monitor compares {size}."
        raise UsageError(Reason.USAGE, what, "Give spend() the vector that the vendor's terms are made for.")
    values = tuple(map(float, features))
    if not all(-_LARGEST < value < _LARGEST for value in values):  # also false for NaN
        raise UsageError(Reason.USAGE, "The feature vector has values that are not numbers.", "Mend the features.")
    return values


def fold(terms: Monitor, state: State, observations: Sequence[Observation]) -> State:
    """The state after `observations`, in whatever order they are given; those of several processes become one row."""
    in_order = sorted(observations, key=lambda one: (one.time, one.n, one.label, one.features or ()))
    if terms.regularity and in_order:
        state = _Pace(terms.regularity, terms.lasting, state).after(in_order)
    if terms.distances:
        seen = [one for one in in_order if one.features and len(one.features) == terms.distances.size]
        if seen:
            state = _Space(terms.distances, terms.lasting, state).after(seen)
    return state


def verdict(terms: Monitor, state: State, now: int) -> Verdict:
    """What is in force at `now`, in milliseconds of the meter's clock. What the terms no longer name finds nothing."""
    named: dict[Detector, Regularity | Distances | None] = {
        "regularity": terms.regularity,
        "distances": terms.distances,
    }
    active = {
        name: (detector.action, state.found[name])
        for name, detector in named.items()
        if detector and state.found.get(name, 0) > now
    }
    if not active:
        return Verdict(variation=state.variation, normality=state.normality)
    action = max((one for one, _ in active.values()), key=_WEIGHT.index)
    until = max(end for one, end in active.values() if one == action)
    return Verdict(action, tuple(sorted(active)), until, state.variation, state.normality)


def rehearse(terms: Monitor, observations: Iterable[Observation], batch: int = 32) -> Iterator[Verdict]:
    """What the monitor would say of a recorded trace, after each `batch` of it: how a vendor chooses the terms."""
    state, waiting = State(), []
    for one in observations:
        waiting.append(one)
        if len(waiting) == batch:
            state, waiting = fold(terms, state, waiting), []
            yield verdict(terms, state, one.time)
    if waiting:
        yield verdict(terms, fold(terms, state, waiting), waiting[-1].time)


class _Pace:
    """Mechanical regularity."""

    def __init__(self, terms: Regularity, lasting: int, state: State) -> None:
        self.terms, self.lasting, self.state = terms, lasting, state
        self.counts = list(_unpack("I", state.counts))
        self.times = [state.last] if self.counts else []
        for interval in reversed(_unpack("I", state.intervals)):
            self.times.append(self.times[-1] - interval)
        self.times.reverse()
        self.total = sum(self.counts)
        self.fewest = min(FEWEST, terms.calls)
        self.calls, self.variation, self.found = state.calls, state.variation, state.found

    def after(self, observations: Sequence[Observation]) -> State:
        for one in observations:
            self._call(one)
        return msgspec.structs.replace(
            self.state,
            last=self.times[-1],
            intervals=_pack("I", [min(b - a, _LONGEST) for a, b in itertools.pairwise(self.times)]),
            counts=_pack("I", self.counts),
            calls=self.calls,
            variation=self.variation,
            found=self.found,
        )

    def _call(self, one: Observation) -> None:
        # Each process hands in what it saw when it has some of it: others may have been later and yet faster.
        at = bisect.bisect_right(self.times, one.time)
        count = min(one.n, self.terms.calls)  # more says nothing more
        self.times.insert(at, one.time)
        self.counts.insert(at, count)
        self.total += count
        self.calls += 1
        while len(self.times) > self.fewest + 1 and self.total - self.counts[0] >= self.terms.calls:
            del self.times[0]
            self.total -= self.counts.pop(0)
        if self.total >= self.terms.calls and self.calls > len(self.times) // CHECKS:
            self.calls = 0
            self._judge()

    def _judge(self) -> None:
        intervals = [b - a for a, b in itertools.pairwise(self.times)]
        pauses = (at for at in range(len(intervals) - 1, -1, -1) if intervals[at] > self.terms.pause)
        run = next(pauses, -1) + 1
        if sum(self.counts[run:]) < self.terms.calls or len(intervals) - run < self.fewest:
            return
        self.variation = spread(intervals[run:])
        if self.variation < self.terms.variation / 1000:
            self.found = {**self.found, "regularity": self.times[-1] + self.lasting * 1000}
            # Each finding takes evidence of its own
            del self.times[:-1], self.counts[:-1]
            self.total = self.counts[0]


class _Space:
    """The distribution of distances, as in PRADA: per class a growing set of inputs, and how far the next is from it.

    Where the paper keeps all, this keeps the newest: of a device's years the last inputs are what counts.
    """

    def __init__(self, terms: Distances, lasting: int, state: State) -> None:
        if state.size != terms.size:
            state = msgspec.structs.replace(
                state, size=terms.size, kept=b"", classes=b"", near=[], distances=b"", inputs=0, judged=[]
            )
        self.terms, self.lasting, self.state = terms, lasting, state
        self.room = VALUES // terms.size
        self.classes = list(_unpack("H", state.classes))
        values = _unpack("f", state.kept)
        self.kept = [values[at : at + terms.size] for at in range(0, len(values), terms.size)]
        self.near = list(state.near) or [Nearness()] * _classes(terms.size)
        self.distances = list(_unpack("f", state.distances))
        self.judged = list(state.judged)
        self.inputs, self.normality, self.found = state.inputs, state.normality, state.found

    def after(self, observations: Sequence[Observation]) -> State:
        for one in observations:
            self._input(one)
        return msgspec.structs.replace(
            self.state,
            kept=_pack("f", [value for vector in self.kept for value in vector]),
            classes=_pack("H", self.classes),
            near=self.near,
            distances=_pack("f", self.distances),
            inputs=self.inputs,
            judged=self.judged,
            normality=self.normality,
            found=self.found,
        )

    def _input(self, one: Observation) -> None:
        given = _rounded(one.features or ())
        label = one.label % len(self.near)
        least = min(
            (math.dist(given, kept) for kept, code in zip(self.kept, self.classes, strict=True) if code == label),
            default=None,
        )
        if least is None:
            self._join(given, label, 0.0)
            return
        least = _rounded((min(least, _LARGEST),))[0]
        if least > self.near[label].threshold:
            self._join(given, label, least)
        self.distances.append(least)
        self.inputs += 1
        del self.distances[: -self.terms.queries]
        if len(self.distances) == self.terms.queries and self.inputs >= self.terms.queries // CHECKS:
            self.inputs = 0
            self._judge(one.time)

    def _judge(self, now: int) -> None:
        mean = math.fsum(self.distances) / len(self.distances)
        deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in self.distances) / len(self.distances))
        usual = [one for one in self.distances if abs(one - mean) <= _OUTLIER * deviation]
        self.judged = [*self.judged, shapiro_wilk(usual)][-CHECKS:]
        if len(self.judged) < CHECKS:
            return
        # Natural inputs that change, as from one lot to the next, are odd for a while; made ones stay odd.
        self.normality = max(self.judged)
        if self.normality < self.terms.normality / 1000:
            self.found = {**self.found, "distances": now + self.lasting * 1000}
            self.distances.clear()
            self.judged = []

    def _join(self, given: tuple[float, ...], label: int, distance: float) -> None:
        if len(self.kept) == self.room:  # the oldest of the class that has most
            crowded, _ = max(Counter(self.classes).items(), key=lambda counted: (counted[1], counted[0]))
            at = self.classes.index(crowded)
            del self.kept[at], self.classes[at]
        self.kept.append(given)
        self.classes.append(label)
        self.near[label] = self.near[label].after(distance, self.room)


def _classes(size: int) -> int:
    return max(1, min(CLASSES, VALUES // size // 8))


def _pack(kind: str, values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}{kind}", *values)


def _unpack(kind: str, raw: bytes) -> tuple[Any, ...]:
    return struct.unpack(f"<{len(raw) // struct.calcsize(kind)}{kind}", raw)


def _rounded(values: tuple[float, ...]) -> tuple[float, ...]:
    """As they are kept: a state that was written and read again must go on as one that was not."""
    return _unpack("f", _pack("f", values))
