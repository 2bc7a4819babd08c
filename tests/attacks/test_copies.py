"""Copies of an account that are used beside it: together they spend no more than it grants, whatever is done."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwlicense.core.account import Field
from hwlicense.core.errors import HwlicenseError, Reason, StorageError
from hwlicense.device.ledger import Ledger
from tests.attacks.test_ledger import excess, used
from tests.metered import SECOND, Machine, abandon, grant, hold, limited, restore, save, spend

TOTAL = 1000


@pytest.fixture
def machine(monkeypatch):
    with Machine().running(monkeypatch) as machine:
        yield machine


def spend_all(machine, copies, *, rounds, each, seconds):
    """What copies spend that are held open together, a little in each round; and when."""
    times = []
    for _ in range(rounds):
        machine.passes(seconds)
        for metering in copies:
            with suppress(HwlicenseError):
                metering._tended.tend()
            times.append((machine.boot, spend(metering, each)))
    assert sum(count for _, count in times) > 0
    return times


def spend_beside(machine, copy, rounds, since, drawn):
    """What a copy spends, a second at a time, and what is `drawn` besides, from some second on; and when."""
    times = []
    for second in range(rounds):
        machine.passes(1)
        copy._tended.tend()
        times.append((machine.boot, spend(copy, 60)))
        if second >= since:
            times.append((machine.boot, int(drawn())))
    assert sum(count for _, count in times) > 0
    return times


@pytest.mark.parametrize(("each", "seconds"), [(3, 11), (1, 2), (40, 31)])
def test_copies_that_are_held_open_spend_no_more_together(machine, tmp_path, each, seconds):
    granted = grant(limited(inferences=TOTAL))
    copies = [machine.open(tmp_path / "0", granted)]
    times = [(machine.boot, spend(copies[0], 5))]
    for number in range(1, 5):
        save(tmp_path / "0", tmp_path / str(number))
        copies.append(machine.open(tmp_path / str(number), granted))
    times += spend_all(machine, copies, rounds=300, each=each, seconds=seconds)
    assert sum(count for _, count in times) <= TOTAL


@pytest.mark.parametrize("wait", [0, 60, 140])
def test_copies_that_are_held_open_keep_to_the_rates_together(machine, tmp_path, wait):
    granted = grant(limited((60, 60)))
    save(tmp_path / "0", tmp_path / "0")
    copies = [machine.open(tmp_path / "0", granted)]
    for number in range(1, 6):
        save(tmp_path / "0", tmp_path / str(number))
        copies.append(machine.open(tmp_path / str(number), granted))
    machine.passes(wait)
    times = spend_all(machine, copies, rounds=600, each=60, seconds=7)
    assert excess([(when, count) for when, count in times if count], 60, 60 * SECOND) <= 0


@pytest.mark.parametrize("since", [0, 30, 1000])
def test_one_that_was_stopped_does_not_spend_what_it_had_while_a_copy_goes_on(machine, tmp_path, since):
    """The copy's frames are kept free of what the other has reserved, for as long as that can be spent."""
    granted = grant(limited((60, 60)))
    stopped = machine.open(tmp_path / "0", granted)
    save(tmp_path / "0", tmp_path / "1")
    copy = machine.open(tmp_path / "1", granted)

    def drawn():
        with suppress(HwlicenseError):
            stopped.spend()  # nobody looks after it
            return True
        return False

    times = spend_beside(machine, copy, 1300, since, drawn)
    assert excess(times, 60, 60 * SECOND) <= 0


def test_a_session_of_one_copy_is_kept_free_in_another(machine, tmp_path):
    granted = grant(limited((60, 60)), continuity=600)
    machine.open(tmp_path / "0", granted).close()
    save(tmp_path / "0", tmp_path / "1")
    one = machine.open(tmp_path / "1", granted)
    for _ in range(50):
        machine.passes(10)
        one._tended.tend()
    hold(one, 60, 600)
    other = machine.open(tmp_path / "0", granted)
    times = spend_beside(machine, other, 1300, 501, lambda: one._spend_held(1))
    assert sum(count for _, count in times) > 200
    assert excess(times, 60, 60 * SECOND) <= 0


def fast(machine, metering, rounds):
    """As much as one lease gives in so many times ten seconds."""
    done = 0
    for _ in range(rounds):
        machine.passes(10)
        metering._tended.tend()
        done += spend(metering, 3900)
    return done


def test_leases_that_ended_with_power_cuts_are_charged_though_the_clock_knows_nothing_of_them(monkeypatch, tmp_path):
    granted, state, spent = grant(limited(inferences=10**6)), tmp_path / "state", 0
    with Machine(lapse=1 << 19).running(monkeypatch) as machine:
        machine.open(state, granted).close()
        save(state, tmp_path / "saved")
        for _ in range(8):
            metering = machine.open(state, granted)
            spent += fast(machine, metering, 26)
            abandon(metering)
            machine.restarts(cut=True)
        assert machine.clock < 1 << 19
        restore(state, tmp_path / "saved")
        assert used(machine.open(state, granted)) >= spent


def test_closing_does_not_hide_what_a_copy_spent_meanwhile(machine, tmp_path):
    granted = grant(limited(inferences=10**6))
    one = machine.open(tmp_path / "one", granted)
    save(tmp_path / "one", tmp_path / "other")
    other = machine.open(tmp_path / "other", granted)
    spent = fast(machine, other, 26)
    one.close()
    assert used(machine.open(tmp_path / "one", granted)) >= spent


def test_more_than_a_lease_is_charged_where_more_may_have_been_spent(machine, tmp_path):
    total = 1 << 34
    granted, state = grant(limited(inferences=total)), tmp_path / "state"
    metering = machine.open(state, granted)
    save(state, tmp_path / "saved")
    metering.close()
    machine.steps += 40  # leases of another copy
    machine.passes(86400)
    restore(state, tmp_path / "saved")
    metering = machine.open(state, granted)
    assert used(metering) >= 1 << 29
    metering.close()
    restore(state, tmp_path / "nowhere")
    assert spend(machine.open(state, granted), 1) == 0


def test_growth_on_one_branch_is_not_hidden_from_another(machine, tmp_path):
    """A small lease is no bound for those that were taken from an older record."""
    granted, state = grant(limited(inferences=10**6)), tmp_path / "state"
    metering = machine.open(state, granted)
    spent = 0
    for _ in range(20):
        spent += spend(metering, 3000)
        machine.passes(1)
        metering._tended.tend()
    save(state, tmp_path / "fast")
    metering.close()
    metering = machine.open(state, granted)
    for _ in range(100):
        machine.passes(60)
        metering._tended.tend()
    save(state, tmp_path / "slow")
    metering.close()
    restore(state, tmp_path / "fast")
    metering = machine.open(state, granted)
    spent += spend(metering, 3500)
    abandon(metering)
    restore(state, tmp_path / "slow")
    assert used(machine.open(state, granted)) >= spent


def test_a_session_ends_with_its_time(machine, tmp_path):
    metering = machine.open(tmp_path, grant(limited(inferences=TOTAL), continuity=60))
    session = hold(metering, 50, 60)
    assert metering._spend_held(10)
    machine.passes(61)
    assert not metering._spend_held(1)
    before = metering._tended.snapshot()[0].words[Field.USED]
    other = hold(metering, 20, 60)  # in the same place
    session.finish()
    assert metering._tended.snapshot()[0].words[Field.USED] == before + 20
    other.finish()
    assert metering._tended.snapshot()[0].words[Field.USED] == before


def test_a_session_that_began_after_the_record_is_kept_free(machine, tmp_path):
    granted = grant(limited((60, 60)), continuity=600)
    one = machine.open(tmp_path / "one", granted)
    one._tended.tend()
    save(tmp_path / "one", tmp_path / "other")
    session = hold(one, 15, 600)
    other = machine.open(tmp_path / "other", granted)
    times = spend_beside(machine, other, 1300, 451, lambda: session.draw(1, one._tended.now()))
    assert excess(times, 60, 60 * SECOND) <= 0


def test_another_boot_identifier_in_one_run_of_the_tpm_hides_nothing(machine, tmp_path):
    granted, state = grant(limited(inferences=10**6)), tmp_path / "state"
    metering = machine.open(state, granted)
    spent = fast(machine, metering, 3)
    save(state, tmp_path / "saved")
    spent += fast(machine, metering, 40)
    abandon(metering)
    restore(state, tmp_path / "saved")
    machine.boots += 1
    assert used(machine.open(state, granted)) >= spent


def test_a_deletion_does_not_hide_copies_from_each_other(machine, tmp_path):
    granted = grant(limited((60, 60)))
    machine.open(tmp_path / "0", granted).close()
    restore(tmp_path / "0", tmp_path / "nowhere")
    machine.open(tmp_path / "0", granted).close()
    machine.passes(2000)
    for number in range(1, 6):
        save(tmp_path / "0", tmp_path / str(number))
    copies = [machine.open(tmp_path / str(number), granted) for number in range(6)]
    times = spend_all(machine, copies, rounds=500, each=60, seconds=7)
    assert excess(times, 60, 60 * SECOND) <= 0


def test_clean_openings_after_a_crash_do_not_begin_its_charge_anew(machine, tmp_path):
    granted = grant(limited((60, 60)))
    metering = machine.open(tmp_path, granted)
    spend(metering, 5)
    abandon(metering)
    metering = machine.open(tmp_path, granted)
    until = metering._tended.snapshot()[0].words[Field.DOUBTED_NS]
    for _ in range(5):
        metering.close()
        machine.passes(10)
        metering = machine.open(tmp_path, granted)
        assert metering._tended.snapshot()[0].words[Field.DOUBTED_NS] == until > 0
    metering.close()


def test_what_nobody_waits_for_any_more_takes_no_leases(machine, tmp_path):
    metering = machine.open(tmp_path, grant(limited(inferences=TOTAL)))
    metering._tended.ask(TOTAL)
    spend(metering, 100)
    for _ in range(30):
        machine.passes(1)
        metering._tended.tend()
    steps = machine.steps
    for _ in range(300):
        machine.passes(1)
        metering._tended.tend()
    assert machine.steps == steps


def test_what_cannot_be_written_down_is_not_asked_of_the_anchor(machine, tmp_path, monkeypatch):
    metering = machine.open(tmp_path, grant(limited(inferences=10**6)))
    spend(metering, 20)
    for _ in range(6):  # the lease is settled: the next thing to do is a step
        machine.passes(10)
        metering._tended.tend()
    assert metering._tended.snapshot()[0].words[Field.SETTLED]
    steps = machine.steps

    def full(_ledger, _record):
        raise StorageError(Reason.STORAGE, "No space left.", "Free some.")

    monkeypatch.setattr(Ledger, "_write", full)
    for _ in range(300):
        machine.passes(3)
        metering._tended.tend()
        with suppress(HwlicenseError):
            metering.spend()
    assert machine.steps == steps


ACTIONS = st.lists(
    st.sampled_from(["spend", "spend", "pass", "wait", "tend", "close", "kill", "cut", "copy", "restore", "session"]),
    min_size=5,
    max_size=60,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS, seed=st.integers(0, 2**32), lapse=st.sampled_from([512, 4096, 262144]))
def test_no_sequence_of_events_with_copies_gains(monkeypatch, tmp_path_factory, actions, seed, lapse):  # noqa: C901, PLR0912
    """Copies that are made, held open, killed, restored and used beside each other."""
    chance, folder = random.Random(seed), tmp_path_factory.mktemp("device")
    rates = [(200, 60), (900, 3600)]
    granted = grant(limited(*rates, inferences=5000), continuity=120)
    spent, times, copies = 0, [], dict.fromkeys(range(3))
    held: dict[int, Any] = {}
    with Machine(lapse).running(monkeypatch) as machine:
        for action in actions:
            number = chance.randrange(3)
            state, metering = folder / str(number), copies[number]
            if action == "cut":
                for each in copies.values():
                    if each:
                        abandon(each)
                copies, held = dict.fromkeys(range(3)), {}
                machine.restarts(chance.uniform(0, 600), cut=True)
            elif action == "copy":
                save(state, folder / f"saved {chance.randrange(3)}")
            elif action == "restore" and metering is None:
                restore(state, folder / f"saved {chance.randrange(3)}")
            elif action in {"pass", "wait"}:
                machine.passes(chance.uniform(0, 15 if action == "pass" else 900))
            elif metering is None:
                with suppress(HwlicenseError):
                    copies[number] = machine.open(state, granted)
            elif action == "tend":
                metering._tended.tend()
            elif action in {"close", "kill"}:
                metering.close() if action == "close" else abandon(metering)
                copies[number] = None
                held.pop(number, None)
            elif action == "session":
                if number in held:
                    held.pop(number).finish()
                else:
                    with suppress(HwlicenseError):
                        held[number] = hold(metering, chance.randint(1, 30), 120)
            else:
                done = spend(metering, chance.randint(1, 100), chance.choice([1, 1, 3]))
                spent += done
                times.append((machine.wall * SECOND, done))
        assert spent <= 5000
        for limit, seconds in rates:
            assert excess(times, limit, seconds * SECOND) <= 0, (limit, seconds)
        for each in copies.values():
            if each:
                abandon(each)


def test_a_clock_of_ones_own_gives_no_reservation_sooner(tmp_path, monkeypatch):
    """In a time namespace, the system's clocks may be set on; the anchor's is asked before each reservation."""
    with Machine().running(monkeypatch) as machine:
        metering = machine.open(tmp_path, grant(limited(inferences=10**6)))
        for _ in range(30):
            spend(metering, 40)
            machine.passes(1)
            metering._tended.tend()
        real = machine.read()
        monkeypatch.setattr(machine, "read", lambda: real)
        reserved = []
        for _ in range(4):
            machine.passes(11)
            metering._tended.ask(3000)
            metering._tended.tend()
            reserved.append(metering._tended.snapshot()[0].words[Field.RESERVED])
        assert reserved == [reserved[0]] * 4
