"""Whatever is done to a license's account, nobody spends more than it grants: deleted, restored, copied, cut."""

from __future__ import annotations

import random
from collections import deque
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwlicense.core.account import Account, Field
from hwlicense.core.errors import DamagedError, ExceededError, HwlicenseError, Reason, RefusedError
from hwlicense.device import recovering
from tests.metered import SECOND, Machine, abandon, grant, limited, restore, save, spend

TOTAL = 20_000


def used(metering):
    return metering._tended.snapshot()[0].words[Field.USED]


@pytest.fixture
def machine(monkeypatch):
    with Machine().running(monkeypatch) as machine:
        yield machine


def test_what_is_granted_is_what_the_total_says(machine, tmp_path):
    metering = machine.open(tmp_path, grant(limited(inferences=TOTAL)))
    assert spend(metering, 10 * TOTAL) == TOTAL
    with pytest.raises(ExceededError) as error:
        metering.spend()
    assert (error.value.reason, error.value.wait) == (Reason.INFERENCES_EXHAUSTED, None)


def test_closing_loses_nothing(machine, tmp_path):
    granted = grant(limited(inferences=TOTAL))
    for _ in range(20):
        metering = machine.open(tmp_path, granted)
        assert spend(metering, TOTAL // 20) == TOTAL // 20
        machine.passes(3)
        metering.close()
    with pytest.raises(ExceededError):
        machine.open(tmp_path, granted).spend()


def test_a_deleted_account_of_an_anchored_license_is_used_up(machine, tmp_path):
    granted = grant(limited((1000, 3600), inferences=TOTAL))
    metering = machine.open(tmp_path, granted)
    assert spend(metering, 10) == 10
    metering.close()
    restore(tmp_path, tmp_path / "nowhere")
    assert spend(machine.open(tmp_path, granted), 1) == 0


@pytest.mark.parametrize("after", [100, 900])
def test_an_account_that_is_put_back_is_charged_for_what_it_does_not_know(machine, tmp_path, after):
    granted, state = grant(limited(inferences=TOTAL)), tmp_path / "state"
    metering = machine.open(state, granted)
    spend(metering, 50)
    metering.close()
    save(state, tmp_path / "saved")
    metering = machine.open(state, granted)
    spent = 50 + spend(metering, after)
    metering.close()
    restore(state, tmp_path / "saved")
    metering = machine.open(state, granted)
    assert used(metering) >= spent
    assert spent + spend(metering, 10 * TOTAL) <= TOTAL


def test_put_back_within_one_lease_it_is_charged_for_the_time_since(machine, tmp_path):
    granted, state = grant(limited(inferences=10**9)), tmp_path / "state"
    metering = machine.open(state, granted)
    spent = spend(metering, 100)
    save(state, tmp_path / "saved")
    for _ in range(30):
        machine.passes(11)
        metering._tended.tend()
        spent += spend(metering, 40)
    serial = metering._tended.snapshot()[0].words[Field.SERIAL]
    abandon(metering)
    restore(state, tmp_path / "saved")
    machine.restarts(cut=True)
    metering = machine.open(state, granted)
    assert serial == machine.steps - 1, "all of that was one lease"
    assert used(metering) >= spent


def test_fast_use_within_one_lease_is_not_hidden_by_putting_the_account_back(machine, tmp_path):
    granted, state = grant(limited(inferences=10**9)), tmp_path / "state"
    metering = machine.open(state, granted)
    spent = spend(metering, 1)
    save(state, tmp_path / "saved")
    for _ in range(20):
        machine.passes(0.2)
        for _ in range(40):
            spent += spend(metering, 1)
        metering._tended.tend()
    abandon(metering)
    restore(state, tmp_path / "saved")
    machine.restarts(cut=True)
    assert used(machine.open(state, granted)) >= spent


def test_an_opening_that_is_refused_for_its_days_takes_no_lease(machine, tmp_path):
    granted = grant(msgspec_replace(limited(inferences=TOTAL), days=2))
    metering = machine.open(tmp_path, granted)
    spend(metering, 100)
    metering.close()
    steps = machine.steps
    machine.passes(3 * 86400)
    for _ in range(6):
        with pytest.raises(RefusedError):
            machine.open(tmp_path, granted)
    assert machine.steps == steps
    account = Account(granted.terms_of_use.limits)
    found = recovering.latest(recovering.account_folder(tmp_path, granted), account)
    assert found.words[Field.USED] == 100


def test_a_copy_that_is_used_beside_it_costs_both(machine, tmp_path):
    granted = grant(limited(inferences=TOTAL))
    one, other = tmp_path / "one", tmp_path / "other"
    metering = machine.open(one, granted)
    spent = spend(metering, 10)
    metering.close()
    save(one, other)
    for _ in range(5):
        for state in (one, other):
            metering = machine.open(state, granted)
            spent += spend(metering, 3000)
            metering.close()
    assert spent <= TOTAL


def test_without_an_anchor_what_was_reserved_before_a_crash_is_lost_and_nothing_else(monkeypatch, tmp_path):
    with Machine(anchored=False).running(monkeypatch) as machine:
        granted, spent = grant(limited(inferences=TOTAL)), 0
        for _ in range(10):
            metering = machine.open(tmp_path, granted)
            before = used(metering)
            assert before >= spent
            spent = before + spend(metering, 100)
            abandon(metering)
            machine.restarts()


def test_anchor_is_required_where_the_terms_say_so(monkeypatch, tmp_path):
    with Machine(anchored=False).running(monkeypatch) as machine, pytest.raises(RefusedError) as error:
        machine.open(tmp_path, grant(msgspec_replace(limited(inferences=5), anchor=True)))
    assert error.value.reason == Reason.NOT_ANCHORED


def msgspec_replace(use, **changes):
    import msgspec  # noqa: PLC0415

    return msgspec.structs.replace(use, **changes)


@pytest.mark.parametrize("place", [0, 100, 4096, 4200, 8192, 9000])
def test_a_changed_byte_gives_nothing(machine, tmp_path, place):
    granted = grant(limited((500, 60), (2000, 86400), inferences=TOTAL))
    metering = machine.open(tmp_path, granted)
    spent = spend(metering, 300)
    path = next(tmp_path.rglob("ledger"))
    raw = bytearray(path.read_bytes())
    raw[place % len(raw)] ^= 0x10
    path.write_bytes(raw)
    with suppress(DamagedError):
        spent += spend(metering, 100)
    abandon(metering)
    machine.restarts()
    metering = machine.open(tmp_path, granted)
    assert used(metering) >= spent


def excess(times: list[tuple[int, int]], limit: int, length: int) -> int:
    """By how much any window of so many nanoseconds holds more than its limit. `times` are (nanoseconds, how many)."""
    window, inside, worst = deque[tuple[int, int]](), 0, 0
    for when, count in times:
        window.append((when, count))
        inside += count
        while window[0][0] <= when - length:
            inside -= window.popleft()[1]
        worst = max(worst, inside - limit)
    return worst


ACTIONS = st.lists(
    st.sampled_from(
        ["spend", "burst", "pass", "hour", "tend", "close", "kill", "cut", "save", "restore", "delete", "rollback"]
    ),
    min_size=5,
    max_size=60,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS, seed=st.integers(0, 2**32), anchored=st.booleans(), lapse=st.sampled_from([512, 4096, 262144]))
def test_no_sequence_of_events_gains(  # noqa: C901, PLR0912, PLR0915  # one branch an event
    monkeypatch, tmp_path_factory, actions, seed, anchored, lapse
):
    """Spending, time, crashes, power cuts, and an attacker with copies of the state (where an anchor refuses them)."""
    chance, folder = random.Random(seed), tmp_path_factory.mktemp("device")
    state, saved = folder / "state", folder / "saved"
    rates = [(200, 60), (900, 3600)]
    granted = grant(limited(*rates, inferences=5000))
    spent, times, elapsed = 0, [], 0
    metering: Any = None
    with Machine(lapse, anchored=anchored).running(monkeypatch) as machine:
        for action in actions:
            if action in {"save", "restore", "delete"}:
                if action == "save":
                    save(state, saved)
                elif anchored and metering is None:
                    restore(state, saved if action == "restore" else folder / "nowhere")
                continue
            if metering is None:
                try:
                    metering = machine.open(state, granted)
                except HwlicenseError:
                    continue
                assert used(metering) >= spent, "what was spent is accounted for"
            if action == "rollback" and anchored:
                save(state, saved)
                for _ in range(chance.randint(1, 20)):
                    machine.passes(chance.choice([0.01, 1, 11]))
                    metering._tended.tend()
                    done = spend(metering, chance.randint(1, 60))
                    spent += done
                    times.append((machine.wall * 10**9, done))
                abandon(metering)
                metering = None
                restore(state, saved)
                machine.restarts(chance.uniform(0, 600), cut=True)
            if action in {"spend", "burst"}:
                done = spend(metering, chance.randint(1, 40 if action == "spend" else 400), chance.choice([1, 1, 1, 3]))
                spent += done
                times.append((machine.wall * 10**9, done))
            elif action in {"pass", "hour"}:
                machine.passes(chance.uniform(0, 15 if action == "pass" else 3600))
            elif action == "tend":
                metering._tended.tend()
            elif action == "close":
                metering.close()
                metering = None
            elif action in {"kill", "cut"}:
                abandon(metering)
                metering = None
                if action == "cut":
                    machine.restarts(chance.uniform(0, 600), cut=True)
        assert spent <= 5000
        for limit, seconds in rates:
            assert excess(times, limit, seconds * SECOND) <= 0, (limit, seconds, elapsed)
        if metering is not None:
            abandon(metering)
