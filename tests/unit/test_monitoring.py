"""The monitor: what it finds, what it does not, and what it keeps."""

import base64
import json
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwlicense.core.errors import DamagedError, Reason, UsageError
from hwlicense.core.limits import Distances, Monitor, Rate, Regularity
from hwlicense.core.monitoring import (
    CHECKS,
    CLASSES,
    VALUES,
    Observation,
    State,
    Verdict,
    check_features,
    fold,
    rehearse,
    verdict,
)
from hwlicense.core.regularity import spread

LASTING = 3600
REGULAR = Monitor(LASTING, Regularity(200, 250, 30_000, "throttle"), None, Rate(10, 60))
SIZE = 8
DISTANT = Monitor(LASTING, None, Distances(100, 930, SIZE, "deny"))
BOTH = Monitor(LASTING, REGULAR.regularity, DISTANT.distances, REGULAR.throttled)


def play(terms, calls, state=None, batch=32):
    state = state or State()
    for at in range(0, len(calls), batch):
        state = fold(terms, state, calls[at : at + batch])
    return state


def loop(number=600, interval=40.0, jitter=0.05, start=1000.0, seed=0, n=1):
    generator, now, calls = random.Random(seed), start, []
    for _ in range(number):
        now += interval * (1 + abs(generator.gauss(0, jitter)))
        calls.append(Observation(int(now), n))
    return calls


def people(number=3000, seed=0):
    """Seconds between two calls, and now and then minutes."""
    generator, now, calls = random.Random(seed), 0.0, []
    for _ in range(number):
        now += generator.lognormvariate(8.1, 0.6) + (generator.random() < 0.2) * generator.expovariate(1 / 300_000)
        calls.append(Observation(int(now)))
    return calls


def natural(number=600, seed=0):
    generator = random.Random(seed)
    return [
        Observation(at * 3000, 1, tuple(generator.gauss(0, 1) for _ in range(SIZE)), generator.randrange(3))
        for at in range(number)
    ]


def made(number=600, seed=0, step=0.1):
    """Each a step from one that was before."""
    generator = random.Random(seed)
    inputs = [one.features for one in natural(50, seed)]
    while len(inputs) < number:
        inputs.append(tuple(value + generator.choice((-step, step)) for value in generator.choice(inputs)))
    return [Observation(at * 3000, 1, features, 0) for at, features in enumerate(inputs)]


# ---- regularity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "calls",
    [
        loop(),
        loop(jitter=0.2),
        loop(interval=0.2),  # faster than the clock's milliseconds
        loop(interval=3.3),
        loop(interval=2000),
        loop(number=60, interval=900, n=32),
        sorted(call for seed in range(2) for call in loop(seed=seed, start=1000 + seed * 7)),
        sorted(call for seed in range(5) for call in loop(interval=35 + seed * 2, seed=seed, start=1000 + seed * 7)),
        sorted([*loop(), *[Observation(at * 900 + 7) for at in range(1, 30)]]),
    ],
    ids=["loop", "jitter", "fast", "3 ms", "slow", "32 a call", "two loops", "five loops", "loop and a person"],
)
def test_a_machine_is_found(calls):
    found = verdict(REGULAR, play(REGULAR, calls), calls[-1].time)
    assert (found.action, found.detectors) == ("throttle", ("regularity",))
    assert found.until is not None
    assert calls[0].time < found.until - LASTING * 1000 <= calls[-1].time


def test_a_late_call_now_and_then_hides_nothing():
    generator, calls, late = random.Random(3), [], 0
    for call in loop():
        late += generator.randrange(20_000) if generator.random() < 0.05 else 0
        calls.append(call._replace(time=call.time + late))
    assert verdict(REGULAR, play(REGULAR, calls), calls[-1].time).action == "throttle"


@pytest.mark.parametrize("seed", range(5))
def test_people_are_not_found(seed):
    calls = people(seed=seed)
    always = msgspec.structs.replace(REGULAR, regularity=Regularity(200, 250, 86_400_000, "throttle"))
    for terms in (REGULAR, always):
        assert not play(terms, calls).found
    generator, now = random.Random(seed), 0.0
    at_random = [Observation(int(now := now + generator.expovariate(1 / 2000))) for _ in range(3000)]
    assert not play(REGULAR, at_random).found


def test_what_a_pause_ends_is_no_run():
    batches = [call for part in range(20) for call in loop(190, start=part * 60_000, seed=part)]
    assert not play(REGULAR, batches).found
    assert play(REGULAR, [*batches, *loop(210, start=21 * 60_000)]).found
    short = msgspec.structs.replace(REGULAR, regularity=Regularity(200, 250, 500, "flag"))
    assert not play(short, loop(interval=1000)).found  # a machine's own cycle, longer than the pause
    assert play(short, loop()).found


def test_an_evener_share_of_calls_is_not_hidden_by_large_ones():
    assert not play(REGULAR, loop(number=20, n=1000)).found  # too few intervals to say
    assert play(REGULAR, loop(number=40, n=1000)).found


def test_spread_of_sums():
    assert spread([100] * 64) == 0
    assert spread([1] * 64) == 0
    assert spread([10, 190] * 100) == pytest.approx(0, abs=1e-9)  # two machines
    generator = random.Random(1)
    at_random = [round(generator.expovariate(1 / 1000)) for _ in range(1000)]
    assert 0.7 < spread(at_random) < 1.3


# ---- distances -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_inputs_that_are_made_from_one_another_are_found(seed):
    calls = made(seed=seed)
    found = verdict(DISTANT, play(DISTANT, calls), calls[-1].time)
    assert (found.action, found.detectors) == ("deny", ("distances",))


@pytest.mark.parametrize("seed", range(3))
def test_natural_inputs_are_not_found(seed):
    assert not play(DISTANT, natural(3000, seed)).found


def test_one_input_again_and_again_is_found():
    assert play(DISTANT, [Observation(at, 1, (1.0,) * SIZE) for at in range(200)]).found


def test_a_change_of_what_comes_is_not_found_at_once():
    calls = natural(400)
    other = [
        one._replace(time=one.time + 1_200_000, features=tuple(value + 9 for value in one.features))
        for one in natural(400, 1)
    ]
    assert not play(DISTANT, calls + other).found


def test_calls_without_features_and_of_another_length_are_passed_over():
    calls = natural(100)
    strange = [Observation(5), Observation(6, 1, ()), Observation(7, 1, (1.0,))]
    assert play(DISTANT, [*calls, *strange], batch=103) == play(DISTANT, calls, batch=100)


def test_extreme_values_are_borne():
    largest = 3.4e38
    corners = [Observation(at, 1, (largest if at % 2 else -largest,) * SIZE, at % 7) for at in range(300)]
    state = play(DISTANT, corners)
    assert State.decode(state.encode()) == state


# ---- verdict ---------------------------------------------------------------------------------------------


def test_the_strongest_action_is_in_force_until_it_lapses():
    state = State(found={"regularity": 5000, "distances": 3000})
    assert verdict(BOTH, state, 0) == Verdict("deny", ("distances", "regularity"), 3000)
    assert verdict(BOTH, state, 3000) == Verdict("throttle", ("regularity",), 5000)
    assert verdict(BOTH, state, 5000) == Verdict()
    assert verdict(DISTANT, State(found={"regularity": 5000}), 0) == Verdict()  # a revision dropped it


def test_each_finding_takes_evidence_of_its_own():
    calls = loop(205)
    state = play(REGULAR, calls, batch=1)
    first = state.found
    assert first
    state = play(REGULAR, loop(150, start=calls[-1].time), state)
    assert state.found == first
    assert play(REGULAR, loop(300, start=state.last), state).found != first


def test_a_rehearsal_says_what_the_terms_would_find():
    said = list(rehearse(BOTH, loop(205), batch=16))
    assert [one.action for one in said[:12]] == ["none"] * 12
    assert said[-1].action == "throttle"
    assert said[-1].variation == pytest.approx(0.03, abs=0.03)
    least = min(one.normality for one in rehearse(BOTH, natural(500)) if one.normality)
    assert least > 0.93


# ---- state -----------------------------------------------------------------------------------------------

VECTORS = st.tuples(*[st.floats(-1e6, 1e6) for _ in range(SIZE)])
CALLS = st.lists(
    st.builds(Observation, st.integers(0, 10_000), st.integers(1, 5000), st.none() | VECTORS, st.integers(0, 2**40)),
    max_size=120,
)


@given(CALLS, st.randoms())
@settings(max_examples=50)
def test_the_order_in_which_calls_are_given_does_not_matter(calls, generator):
    shuffled = calls[:]
    generator.shuffle(shuffled)
    assert fold(BOTH, State(), calls) == fold(BOTH, State(), shuffled)


@given(CALLS, st.integers(1, 50))
@settings(max_examples=50)
def test_restarts_change_nothing(calls, batch):
    whole, parts = sorted(calls, key=lambda one: (one.time, one.n, one.label, one.features or ())), State()
    for at in range(0, len(whole), batch):
        parts = State.decode(fold(BOTH, parts, whole[at : at + batch]).encode())
    assert parts == fold(BOTH, State(), whole)


def test_restarts_change_nothing_in_long_runs():
    calls = [one._replace(features=two.features) for one, two in zip(loop(1500), made(1500), strict=True)]
    whole, parts = fold(BOTH, State(), calls), State()
    for at in range(0, len(calls), 7):
        parts = State.decode(fold(BOTH, parts, calls[at : at + 7]).encode())
    assert parts == whole
    assert set(whole.found) == {"regularity", "distances"}


def test_processes_that_hand_in_late_hide_nothing():
    processes = [loop(400, seed=seed, start=1000 + 9 * seed) for seed in range(3)]
    late = [call for at in range(0, 400, 25) for calls in processes for call in calls[at : at + 25]]
    assert late != sorted(late)
    assert play(REGULAR, late, batch=25).found


def test_the_state_is_small_whatever_comes():
    widest = Monitor(LASTING, Regularity(4096, 1, 86_400_000, "flag"), Distances(4096, 1, 16, "flag"))
    generator, state = random.Random(1), State()
    for turn in range(40):
        batch = [
            Observation(
                (turn * 300 + at) * 86_400_000,
                generator.randrange(1, 2**40),
                tuple(generator.random() for _ in range(16)),
                generator.randrange(2**60),
            )
            for at in range(300)
        ]
        state = fold(widest, state, batch)
    assert len(state.kept) <= 4 * VALUES
    assert len(state.near) <= CLASSES
    assert len(state.judged) <= CHECKS
    assert len(state.encode()) < 120_000
    assert State.decode(state.encode()) == state


@pytest.mark.parametrize("size", [1, 3, 64, 255, 256])
def test_every_size_of_vector_fits(size):
    terms = Monitor(LASTING, None, Distances(20, 1, size, "flag"))
    generator = random.Random(size)
    calls = [
        Observation(at, 1, tuple(generator.random() for _ in range(size)), generator.randrange(200))
        for at in range(400)
    ]
    state = play(terms, calls)
    assert State.decode(state.encode()) == state
    assert state.near


def test_a_revision_that_asks_for_other_features_begins_anew():
    state = fold(BOTH, State(), [*natural(100), *loop(50)])
    other = msgspec.structs.replace(BOTH, distances=Distances(100, 930, 2, "flag"))
    after = fold(other, state, [Observation(10_000_000, 1, (1.0, 2.0))])
    assert (after.size, len(after.kept), after.distances) == (2, 8, b"")
    assert len(after.counts) == len(state.counts) + 4


def refused(raw):
    with pytest.raises(DamagedError) as caught:
        State.decode(raw)
    assert caught.value.reason == Reason.HOME_DAMAGED
    assert caught.value.hint


FULL = fold(BOTH, State(), [*natural(80), *loop(60)])


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"last": -1},
        {"last": 1.5},
        {"intervals": "AAAA"},
        {"counts": ""},
        {"kept": FULL.kept[:-4]},
        {"kept": b"\xff" * len(FULL.kept)},
        {"classes": b"\xff" * len(FULL.classes)},
        {"near": []},
        {"near": [{"joined": 1, "mean": 0.0, "variance": -1.0}]},
        {"distances": b"\x00\x00\x80\x7f"},
        {"distances": bytes(4 * 4098)},
        {"judged": [0.5] * 11},
        {"found": {"other": 1}},
        {"found": {"regularity": -1}},
        {"size": 0},
        {"size": 257},
        {"calls": -1},
        {"more": 1},
    ],
    ids=str,
)
def test_a_state_of_another_make_is_refused(changes):
    table = json.loads(FULL.encode())
    assert State.decode(FULL.encode()) == FULL
    table |= {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value for name, value in changes.items()
    }
    refused(json.dumps(table, separators=(",", ":")).encode())


def test_a_state_that_is_too_large_or_not_in_its_one_encoding_is_refused():
    refused(b" " * (300 << 10))
    refused(b"")
    refused(FULL.encode() + b"\n")
    refused(FULL.encode()[:-1])


@given(st.binary(max_size=200))
def test_no_bytes_upset_it(raw):
    refused(raw)


@given(st.data())
@settings(max_examples=200)
def test_a_changed_byte_is_refused_or_gives_a_whole_state(data):
    raw = bytearray(FULL.encode())
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        state = State.decode(bytes(raw))
    except DamagedError:
        return
    assert state.encode() == raw
    fold(BOTH, state, [*natural(60), *loop(60)])


# ---- features --------------------------------------------------------------------------------------------


def test_features_are_checked_when_they_are_given():
    assert check_features(DISTANT, [1] * SIZE) == (1.0,) * SIZE
    assert check_features(REGULAR, [1.0, 2.0]) == ()
    for wrong in ([1.0], [1.0] * (SIZE + 1), [float("nan")] * SIZE, [float("inf")] * SIZE, [1e39] * SIZE):
        with pytest.raises(UsageError) as caught:
            check_features(DISTANT, wrong)
        assert caught.value.reason == Reason.USAGE
