"""The monitor: normal days that are flagged, and labelling runs that are caught, after how many inferences.

Each device runs for days in a row with one state, written and read again each night; each labelling run comes after
one of its days. Every number is drawn from a generator seeded with what it is for, so a second run gives the same.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from benchmarks import traces
from benchmarks.traces import DAY, Trace, World
from hwlicense.core.monitoring import Detector, Observation, State, fold
from hwlicense.core.terms import parse_terms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.random import Generator

    from hwlicense.core.limits import Monitor

DEVICES: Final = 5
QUERIES: Final = 3000
"""Of a labelling run."""
BATCH: Final = 32
DETECTORS: Final[tuple[Detector, ...]] = ("regularity", "distances")


class Product(NamedTuple):
    """How it is used on a day, and the [monitor] that its vendor chose by what its own days look like."""

    day: Callable[[World, Generator], Trace]
    pause: str
    calls: int
    features: str = "pixels"

    def terms(self) -> Monitor:
        """Of its license."""
        size = VECTORS[self.features][1]
        text = (
            'licensee = "A"\nproduct = "P"\n[monitor]\nlasting = "1h"\n'
            f'[monitor.regularity]\npause = "{self.pause}"\ncalls = {self.calls}\n'
            f"[monitor.distances]\nfeatures = {size}\n"
        )
        use = parse_terms(text).granted_use
        assert use
        assert use.monitor
        return use.monitor


_PROJECTION: Final = np.random.default_rng(16).normal(0, 1 / 4, (64, 16))
VECTORS: Final[dict[str, tuple[Callable[[Trace], tuple[traces.Rows, traces.Labels]], int]]] = {
    "pixels": (lambda trace: (trace.inputs, trace.labels), 64),
    "pixels, no label": (lambda trace: (trace.inputs, 0 * trace.labels), 64),
    "16 projections": (lambda trace: (trace.inputs @ _PROJECTION, trace.labels), 16),
}

PRODUCTS: Final = {
    "camera on a line": Product(traces.camera, "500ms", 200),
    "voice device": Product(traces.voice, "30m", 200),
    "document scanner": Product(traces.scanner, "10s", 250),
}
MISTAKES: Final = {
    "camera, pause longer than its cycle": Product(traces.camera, "30s", 200),
    "camera, a vector of each frame": Product(traces.frames, "10ms", 200),
}


def _kinds(world: World) -> dict[str, Callable[[Generator], Trace]]:
    """Labelling runs."""

    def made(generator: Generator, step: Callable[[], float], *, jacobian: bool, natural: int = 0) -> Trace:
        inputs = traces.synthetic(world, generator, QUERIES // (natural + 1), step, jacobian=jacobian)
        trace = world.natural(traces.human(generator, len(inputs) * (natural + 1)), generator, foreign=True)
        trace.inputs[:: natural + 1] = inputs
        return world.called(trace.times, trace.inputs)

    def real(pace: Callable[[Generator, int], traces.Labels], counts: int = 1) -> Callable[[Generator], Trace]:
        return lambda generator: world.natural(
            pace(generator, max(300, QUERIES // counts)), generator, foreign=True, counts=counts
        )

    return {
        "natural data, tight loop": real(traces.tight),
        "natural data, four loops at once": real(traces.several),
        "natural data, loop of 32 a call": real(lambda g, n: traces.tight(g, n, 900), 32),
        "natural data, rests after each 60": real(traces.resting),
        "natural data, loop at random, 1 s": real(traces.uneven),
        "natural data, human pace": real(traces.human),
        "Jacobian, step 0.1, human pace": lambda g: made(g, lambda: 0.1, jacobian=True),
        "Jacobian, step 0.2, human pace": lambda g: made(g, lambda: 0.2, jacobian=True),
        "random signs, step 0.1, human pace": lambda g: made(g, lambda: 0.1, jacobian=False),
        "random signs, step 0.2, human pace": lambda g: made(g, lambda: 0.2, jacobian=False),
        "Jacobian, steps drawn from 0 to 0.4": lambda g: made(g, lambda: g.uniform(0, 0.4), jacobian=True),
        "Jacobian, step 0.1, among as many natural": lambda g: made(g, lambda: 0.1, jacobian=True, natural=1),
        "Jacobian, step 0.1, among 4 times as many": lambda g: made(g, lambda: 0.1, jacobian=True, natural=4),
    }


def measure(days: int, runs: int) -> dict[str, Any]:
    """`days` of each product over five devices, and `runs` of each kind of labelling against each of them."""
    world = World()
    started, kinds = time.perf_counter(), _kinds(world)
    attacks = {name: [make(_generator("run", name, str(run))) for run in range(runs)] for name, make in kinds.items()}
    found: dict[str, Any] = {
        "model_accuracy": world.accuracy,
        "queries": QUERIES,
        "days": {name: _days(world, name, product, days) for name, product in (PRODUCTS | MISTAKES).items()},
        "runs": {name: _runs(world, name, product, attacks) for name, product in PRODUCTS.items()},
        "vectors": {},
    }
    for vector in VECTORS:
        product = PRODUCTS["voice device"]._replace(features=vector)
        found["vectors"][vector] = {
            "days": _days(world, "voice device", product, days),
            "runs": _runs(world, "voice device", product, attacks),
        }
    found["cost"] = _cost()
    found["seconds"] = time.perf_counter() - started
    return found


def _generator(*names: str) -> Generator:
    return np.random.default_rng([ord(letter) for letter in "/".join(names)])


def _observations(product: Product, trace: Trace, start: int) -> Iterator[Observation]:
    vectors, labels = VECTORS[product.features][0](trace)
    rows = zip(trace.times.tolist(), trace.counts.tolist(), vectors.tolist(), labels.tolist(), strict=True)
    for at, count, vector, label in rows:
        yield Observation(start + at, count, tuple(vector), label)


def _play(terms: Monitor, state: State, calls: Iterator[Observation]) -> Iterator[tuple[State, int]]:
    """The state after each batch, and the inferences until then."""
    spent = 0
    while batch := list(itertools.islice(calls, BATCH)):
        state = fold(terms, state, batch)
        spent += sum(one.n for one in batch)
        yield state, spent


def _day(world: World, name: str, product: Product, state: State, device: int, day: int) -> State:
    trace = product.day(world, _generator("day", name, str(device), str(day)))
    *_, (last, _) = _play(product.terms(), state, _observations(product, trace, day * DAY))
    return State.decode(last.encode())  # the nightly restart


def _days(world: World, name: str, product: Product, days: int) -> dict[str, Any]:
    """Days on which a detector found anything."""
    flagged: dict[Detector, int] = dict.fromkeys(DETECTORS, 0)
    for device in range(DEVICES):
        state = State()
        for day in range(days // DEVICES):
            before = state.found
            state = _day(world, name, product, state, device, day)
            for detector in DETECTORS:
                flagged[detector] += state.found.get(detector) != before.get(detector)
    calls = len(product.day(world, _generator("day", name, "0", "0")).times)
    return {"days": days // DEVICES * DEVICES, "calls_of_the_first_day": calls, "flagged": flagged}


def _runs(world: World, name: str, product: Product, attacks: dict[str, list[Trace]]) -> dict[str, Any]:
    """Labelling runs that a detector found, and after how many inferences."""
    terms, found = product.terms(), {}
    used = [_day(world, name, product, State(), device, 0) for device in range(DEVICES)]
    for kind, made in attacks.items():
        after: dict[Detector, list[int]] = {detector: [] for detector in DETECTORS}
        for run, trace in enumerate(made):
            state = used[run % DEVICES]
            before, waiting = state.found, set[Detector](DETECTORS)
            for now, spent in _play(terms, state, _observations(product, trace, DAY)):
                caught = {one for one in waiting if now.found.get(one) != before.get(one)}
                waiting -= caught
                for detector in caught:
                    after[detector].append(spent)
        found[kind] = {
            "runs": len(made),
            **{
                str(detector): {
                    "caught": len(spent),
                    "median": statistics.median(spent) if spent else None,
                    "most": max(spent, default=None),
                }
                for detector, spent in after.items()
            },
        }
    return found


def _cost() -> dict[str, Any]:
    """Microseconds of one observation, and bytes of a state, by the length of the vector; one class, the dearest."""
    found = {}
    generator = _generator("cost")
    for size in (16, 64, 256):
        product = f'[monitor.regularity]\npause = "30s"\n[monitor.distances]\nfeatures = {size}\n'
        use = parse_terms(f'licensee = "A"\nproduct = "P"\n{product}').granted_use
        assert use
        assert use.monitor
        rows = generator.random((3000, size)).tolist()
        calls = [Observation(at * 50, 1, tuple(row)) for at, row in enumerate(rows)]
        state, times = State(), []
        for batch in range(0, len(calls), BATCH):
            started = time.perf_counter()
            state = fold(use.monitor, state, calls[batch : batch + BATCH])
            times.append((time.perf_counter() - started) / BATCH * 1e6)
        found[str(size)] = {"microseconds": statistics.median(times[-30:]), "bytes": len(state.encode())}
    return found


def table(found: dict[str, Any]) -> list[str]:
    """For people."""
    lines = [f"{'normal days flagged':<44} {'regularity':>14} {'distances':>14}"]
    for name, one in found["days"].items():
        parts = [f"{one['flagged'][detector]}/{one['days']}" for detector in DETECTORS]
        lines.append(f"{name:<44} {parts[0]:>14} {parts[1]:>14}")
    against: dict[str, dict[str, Any]] = found["runs"] | {
        f"voice device, {name}": one["runs"] for name, one in found["vectors"].items() if name != "pixels"
    }
    for name, runs in against.items():
        lines += ["", f"{'labelling runs, ' + name:<52} {'regularity':>18} {'distances':>18}"]
        for kind, one in runs.items():
            parts = [_caught(one[detector], one["runs"]) for detector in DETECTORS]
            lines.append(f"  {kind:<50} {parts[0]:>18} {parts[1]:>18}")
    lines += ["", "caught/runs, median of inferences until then"]
    for name, one in found["vectors"].items():
        lines.append(f"voice days flagged, {name}: {one['days']['flagged']['distances']}/{one['days']['days']}")
    for size, one in found["cost"].items():
        lines.append(f"{size} values: {one['microseconds']:.0f} us an observation, state of {one['bytes']:,} bytes")
    return lines


def _caught(one: dict[str, Any], runs: int) -> str:
    after = f", {one['median']:,.0f}" if one["caught"] else ""
    return f"{one['caught']}/{runs}{after}"
