"""Traces of calls for benchmarks/monitor.py: days of three products, and labelling runs, all over real digits.

The digits are scikit-learn's copy of 1,797 handwritten ones (UCI, 8 x 8 pixels). A third trains the model, a third is
what the product sees, a third is the competitor's own. An input is one of them as a sensor gives it: shifted, turned,
scaled, brighter or darker, with noise, each time differently.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.random import Generator
    from numpy.typing import NDArray

    Rows = NDArray[np.float64]
    Labels = NDArray[np.int64]

SIDE: Final = 8
SEEDS: Final = 100
"""Natural inputs that a synthetic attack begins with."""
HOUR: Final = 3_600_000
DAY: Final = 24 * HOUR


class Trace(NamedTuple):
    """Calls in order: milliseconds, inferences of each, inputs, and the classes that the model gives."""

    times: Labels
    counts: Labels
    inputs: Rows
    labels: Labels


class World:
    """The data and the vendor's model. The split and the training are seeded."""

    def __init__(self) -> None:
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.data))
        rows, labels = digits.data[order] / 16, digits.target[order].astype(np.int64)
        third = len(rows) // 3
        self.seen, self.seen_labels = rows[third : 2 * third], labels[third : 2 * third]
        self.foreign = rows[2 * third :]
        shown = np.repeat(np.arange(third), 8)
        self.model = _trained(sensed(rows[shown], np.random.default_rng(0)), labels[shown], 64, 0)
        self.accuracy = float(self.model.score(sensed(self.seen, np.random.default_rng(1)), self.seen_labels))

    def called(self, times: Labels, inputs: Rows, counts: int = 1) -> Trace:
        """The trace of these inputs at these times."""
        return Trace(times, np.full(len(times), counts), inputs, self.model.predict(inputs))

    def natural(self, times: Labels, generator: Generator, *, foreign: bool = False, counts: int = 1) -> Trace:
        """Inputs drawn at random from what the product sees, or from the competitor's own."""
        source = self.foreign if foreign else self.seen
        return self.called(times, sensed(source[generator.integers(len(source), size=len(times))], generator), counts)

    def lots(self, times: Labels, generator: Generator) -> Trace:
        """A line: some hundred parts of one kind, then of another."""
        kinds = np.repeat(generator.integers(10, size=len(times) // 200 + 1), generator.integers(200, 1200))
        rows = [generator.choice(np.flatnonzero(self.seen_labels == kind)) for kind in kinds[: len(times)]]
        return self.called(times, sensed(self.seen[rows], generator))


def sensed(rows: Rows, generator: Generator) -> Rows:
    """As a sensor gives them."""
    number = len(rows)
    turn, scale = generator.normal(0, 0.12, (number, 1)), 1 + generator.normal(0, 0.08, (number, 1))
    shift = generator.normal(0, 0.4, (2, number, 1))
    middle = (SIDE - 1) / 2
    y, x = (axis.ravel() - middle for axis in np.mgrid[:SIDE, :SIDE])
    at_y = (np.cos(turn) * y + np.sin(turn) * x) / scale + shift[0] + middle
    at_x = (np.cos(turn) * x - np.sin(turn) * y) / scale + shift[1] + middle
    padded = np.pad(rows.reshape(number, SIDE, SIDE), ((0, 0), (4, 5), (4, 5)))
    at_y, at_x = np.clip(at_y, -4, SIDE + 3) + 4, np.clip(at_x, -4, SIDE + 3) + 4
    low_y, low_x = at_y.astype(int), at_x.astype(int)
    part_y, part_x = at_y - low_y, at_x - low_x
    every = np.arange(number)[:, None]
    upper = padded[every, low_y, low_x] * (1 - part_x) + padded[every, low_y, low_x + 1] * part_x
    lower = padded[every, low_y + 1, low_x] * (1 - part_x) + padded[every, low_y + 1, low_x + 1] * part_x
    clean = upper * (1 - part_y) + lower * part_y
    light = 1 + generator.normal(0, 0.1, (number, 1))
    given: Rows = np.clip(clean * light + generator.normal(0, 0.03, clean.shape), 0, 1)
    return given


# ---- days ------------------------------------------------------------------------------------------------


def camera(world: World, generator: Generator) -> Trace:
    """Two shifts of a line that makes a part every 2 s, give or take 5 %: stops of minutes, breaks, changes of lots."""
    intervals = generator.normal(2000, 100, 14 * 1800).clip(1700)
    stops = generator.random(len(intervals)) < 1 / 400
    intervals[stops] += generator.exponential(180_000, stops.sum())
    return world.lots(_within(intervals, 6 * HOUR, 20 * HOUR), generator)


def voice(world: World, generator: Generator) -> Trace:
    """A device that people talk to: bursts of a few commands, seconds apart, some minutes between bursts."""
    bursts = generator.exponential(6 * 60_000, 160)
    intervals = [np.append(first, generator.lognormal(8.1, 0.6, generator.geometric(0.25))) for first in bursts]
    return world.natural(_within(np.concatenate(intervals), 7 * HOUR, 22 * HOUR), generator)


def scanner(world: World, generator: Generator) -> Trace:
    """Batches of 1 to 200 pages at one each 0.8 s, as the feeder pulls them; minutes between batches."""
    batches = [
        np.append(30_000 + generator.exponential(5 * 60_000), generator.normal(800, 40, generator.integers(200)))
        for _ in range(90)
    ]
    return world.natural(_within(np.concatenate(batches), 8 * HOUR, 18 * HOUR), generator)


def _within(intervals: Rows, first: int, last: int) -> Labels:
    times = first + np.cumsum(intervals)
    return times[times < last].astype(np.int64)


def frames(world: World, generator: Generator) -> Trace:
    """The camera again, but with five frames of each part, which differ by noise alone: a vector badly chosen."""
    parts = camera(world, generator)
    inputs = np.repeat(parts.inputs[:2000], 5, axis=0)
    inputs = np.clip(inputs + generator.normal(0, 0.03, inputs.shape), 0, 1)
    times = (np.repeat(parts.times[:2000], 5) + np.tile(np.arange(5) * 33, 2000)).astype(np.int64)
    return world.called(times, inputs)


# ---- labelling runs --------------------------------------------------------------------------------------


def tight(generator: Generator, number: int, middle: float = 40) -> Labels:
    """One call after the other: what the model takes, 5 % more or less, with a hiccup now and then."""
    intervals = middle * (1 + np.abs(generator.normal(0, 0.05, number)))
    hiccups = generator.random(number) < 1 / 100
    intervals[hiccups] += generator.exponential(300, hiccups.sum())
    return np.cumsum(intervals).astype(np.int64)


def several(generator: Generator, number: int, processes: int = 4) -> Labels:
    """Tight loops side by side."""
    each = [
        tight(generator, number // processes, 40 * generator.uniform(0.9, 1.1)) + generator.integers(40)
        for _ in range(processes)
    ]
    return np.sort(np.concatenate(each))


def resting(generator: Generator, number: int, calls: int = 60, rest: int = 31_000) -> Labels:
    """A tight loop that rests for as long as people do between batches, and before it is as long as one."""
    return tight(generator, number) + np.arange(number) // calls * rest


def uneven(generator: Generator, number: int) -> Labels:
    """A loop that waits for a time drawn at random, a second in the middle."""
    return np.cumsum(generator.exponential(1000, number)).astype(np.int64)


def human(generator: Generator, number: int) -> Labels:
    """Replayed at the times of the voice device."""
    intervals = generator.lognormal(8.1, 0.6, number)
    rests = generator.random(number) < 1 / 4
    intervals[rests] += generator.exponential(6 * 60_000, rests.sum())
    return np.cumsum(intervals).astype(np.int64)


def synthetic(world: World, generator: Generator, number: int, step: Callable[[], float], *, jacobian: bool) -> Rows:
    """Inputs made from one another, as in Papernot et al. 2017: each round doubles them, a step away.

    The step follows the sign of the Jacobian of the attacker's own model, trained anew in each round, or random signs.
    """
    start = sensed(world.foreign[generator.integers(len(world.foreign), size=SEEDS)], generator)
    inputs = start
    while len(inputs) < number:
        signs = generator.choice([-1.0, 1.0], inputs.shape)
        if jacobian:
            labels = world.model.predict(inputs)
            copy = _trained(inputs, labels, 32, int(generator.integers(2**31)))
            signs = np.sign(_jacobian(copy, inputs, labels))
        sizes = np.array([step() for _ in inputs])[:, None]
        inputs = np.concatenate([inputs, np.clip(inputs + sizes * signs, 0, 1)])
    return inputs[:number]


def _jacobian(model: MLPClassifier, inputs: Rows, labels: Labels) -> Rows:
    """Of the given class's score, of a network with one hidden layer."""
    first, second = model.coefs_
    column = np.searchsorted(model.classes_, labels)
    active = inputs @ first + model.intercepts_[0] > 0
    result: Rows = (active * second.T[column]) @ first.T
    return result


def _trained(rows: Rows, labels: Labels, width: int, seed: int) -> MLPClassifier:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # good enough, and quick
        return MLPClassifier((width,), max_iter=60, random_state=seed).fit(rows, labels)
