"""Abnormal use is found by all processes together, and a restart, a deleted or restored state does not clear it."""

from __future__ import annotations

import shutil
from contextlib import suppress
from typing import Any

import pytest

from hwlicense.core.account import Account
from hwlicense.core.errors import ExceededError, Reason, UsageError
from hwlicense.core.limits import Distances, Limits, Monitor, Rate, Regularity, Use
from hwlicense.core.secret import Secret
from hwlicense.device import recovering, usage
from hwlicense.device.metering import Metering
from hwlicense.device.watching import Watch
from tests.metered import Machine, abandon, grant

REGULAR = Regularity(64, 250, 30_000, "deny")


@pytest.fixture
def machine(monkeypatch):
    with Machine().running(monkeypatch) as machine:
        yield machine


def use(action="deny", throttled=None) -> Use:
    regular = Regularity(REGULAR.calls, REGULAR.variation, REGULAR.pause, action)
    return Use(limits=Limits(inferences=10**6), monitor=Monitor(3600, regular, None, throttled))


def opened(machine, state, granted) -> Metering:
    folder = recovering.account_folder(state, granted)
    tended = recovering.open_account(folder, granted, Secret(bytearray(b"k" * 32)), machine, None)
    watch = Watch(folder / "monitor", granted.terms_of_use.monitor, Secret(bytearray(b"m" * 32)), tended)
    return Metering(granted, tended, watch)


def run(machine, metering, count, seconds=0.5) -> int:
    done = 0
    for _ in range(count):
        machine.passes(seconds)
        metering._tended.tend()
        try:
            metering.spend()
        except ExceededError as error:
            if error.reason == Reason.LEASE_PENDING:
                continue
            break
        done += 1
    return done


def test_a_machine_is_denied_and_for_how_long_is_said(machine, tmp_path):
    metering = opened(machine, tmp_path, grant(use()))
    assert 60 <= run(machine, metering, 500) < 200
    with pytest.raises(ExceededError) as error:
        metering.spend()
    assert error.value.reason == Reason.ABNORMAL_USE
    assert 0 < (error.value.wait or 0) <= 3600
    machine.passes(3601)
    metering._tended.tend()
    metering.spend()
    metering.close()


def test_a_restart_does_not_clear_it(machine, tmp_path):
    granted = grant(use())
    metering = opened(machine, tmp_path, granted)
    run(machine, metering, 500)
    metering.close()
    machine.restarts()
    metering = opened(machine, tmp_path, granted)
    with pytest.raises(ExceededError):
        metering.spend()
    metering.close()


def test_runs_that_are_cut_short_add_up(machine, tmp_path):
    granted, done = grant(use()), 0
    for _ in range(12):
        metering = opened(machine, tmp_path, granted)
        done += run(machine, metering, 20)
        metering.close()
    assert done < 200


@pytest.mark.parametrize("how", ["deleted", "restored", "changed"])
def test_a_state_that_was_tampered_with_has_found_all(machine, tmp_path, how):
    granted = grant(use())
    metering = opened(machine, tmp_path, granted)
    run(machine, metering, 10)
    metering.close()
    path = next(tmp_path.rglob("monitor"))
    shutil.copy(path, tmp_path / "saved")
    metering = opened(machine, tmp_path, granted)
    run(machine, metering, 10)
    metering.close()
    if how == "deleted":
        path.unlink()
    elif how == "restored":
        shutil.copy(tmp_path / "saved", path)
    else:
        raw = bytearray(path.read_bytes())
        raw[9] += 1  # of its number
        path.write_bytes(raw)
    metering = opened(machine, tmp_path, granted)
    with pytest.raises(ExceededError) as error:
        metering.spend()
    assert error.value.reason == Reason.ABNORMAL_USE
    metering.close()


def test_throttled_it_goes_on_slowly(machine, tmp_path):
    metering = opened(machine, tmp_path, grant(use("throttle", Rate(5, 60))))
    run(machine, metering, 150)
    machine.passes(120)
    metering._tended.tend()
    for _ in range(5):
        metering.spend()
    with pytest.raises(ExceededError) as error:
        metering.spend()
    assert error.value.reason == Reason.RATE_EXCEEDED
    metering.close()


def throttled(machine, state, *rates) -> tuple[Metering, Any]:
    """A license that is throttled to 3 in 10 s, for 15 s; in a process that was killed, and opened again."""
    regular = Regularity(REGULAR.calls, REGULAR.variation, REGULAR.pause, "throttle")
    granted = grant(Use(limits=Limits(rates=list(rates)), monitor=Monitor(15, regular, None, Rate(3, 10))))
    metering = opened(machine, state, granted)
    for _ in range(80):
        run(machine, metering, 1)
        if metering._watch.verdict.action == "throttle":
            break
    return metering, granted


def test_a_wait_is_no_longer_than_the_throttle_and_says_whose_rate_it_is(machine, tmp_path):
    metering, granted = throttled(machine, tmp_path, Rate(100_000, 3600))
    abandon(metering)
    metering = opened(machine, tmp_path, granted)
    assert metering.verdict.action == "throttle"
    with pytest.raises(ExceededError) as error:
        metering.spend()
    assert error.value.reason == Reason.RATE_EXCEEDED
    assert "the monitor holds it to 3/10s" in error.value.what
    assert "higher rate" not in error.value.hint
    wait = error.value.wait
    assert wait is not None
    assert 0 < wait <= 15
    machine.passes(wait)
    metering._tended.tend()
    metering.spend()
    metering.close()


def test_more_at_once_than_the_throttle_allows_waits_for_its_end(machine, tmp_path):
    metering, _ = throttled(machine, tmp_path, Rate(100_000, 3600))
    with pytest.raises(ExceededError) as error:
        metering.spend(4)
    wait = error.value.wait
    assert wait is not None
    assert 0 < wait <= 15
    machine.passes(wait)
    metering._tended.tend()
    metering.spend(4)
    metering.close()


def test_a_rate_that_says_no_for_longer_than_the_throttle_is_what_is_said():
    hourly, throttle, now = Rate(1, 3600), Rate(3, 10), 10**12
    account = Account(Limits(rates=[hourly]), throttle)
    account.advance(now)
    account.charge(1)
    assert account.check(now, 1, throttled=now + 15 * 10**9).rate is hourly
    account = Account(Limits(rates=[Rate(100, 3600)]), throttle)
    account.advance(now)
    account.charge(3)
    short = account.check(now, 1, throttled=now + 4 * 10**9)
    assert (short.rate, short.wait) == (throttle, 4 * 10**9)


def test_reports_show_the_throttled_rate(machine, tmp_path):
    metering, granted = throttled(machine, tmp_path, Rate(100_000, 3600))
    run(machine, metering, 2, seconds=5)
    metering.close()
    found = usage._monitor(usage.read(tmp_path, granted, None, None, granted.issued))
    assert found["in_force"] == "throttle"
    assert found["throttled"] == "3/10s"
    assert 0 <= found["left"] < 3
    assert 0 < found["refills_in"] <= found["for_seconds"] <= 15


def test_flagged_it_goes_on_and_says_so(machine, tmp_path):
    metering = opened(machine, tmp_path, grant(use("flag")))
    assert run(machine, metering, 300) == 300
    assert metering.verdict.action == "flag"
    assert metering.verdict.detectors == ("regularity",)
    metering.close()


def test_features_of_the_wrong_size_are_wrong_usage(machine, tmp_path):
    monitor = Monitor(3600, None, Distances(100, 950, 4, "flag"))
    metering = opened(machine, tmp_path, grant(Use(limits=Limits(inferences=100), monitor=monitor)))
    with pytest.raises(UsageError):
        metering.spend(1, [1.0, 2.0])
    with pytest.raises(UsageError):
        metering.spend(1, [1.0, 2.0, 3.0, float("nan")])
    with pytest.raises(UsageError):
        metering.spend(1, [1.0, 2.0, 3.0, 4.0], -1)
    metering.spend(1, [1.0, 2.0, 3.0, 4.0], 1)
    metering.close()


def test_a_denial_interrupts_no_session_and_starts_none(machine, tmp_path):
    metering = opened(machine, tmp_path, grant(use()))
    session = metering.hold(10, 3600)
    run(machine, metering, 500)
    assert metering.may_start(0).reason == Reason.ABNORMAL_USE
    session.finish()
    with pytest.raises(ExceededError):
        metering.spend()
    metering.close()


def test_refused_calls_are_not_seen(machine, tmp_path):
    """Who obeys the wait and asks again with the same input is no machine for that."""
    monitor = Monitor(3600, Regularity(64, 250, 30_000, "deny"))
    limits = Limits(rates=[Rate(5, 60)])
    metering = opened(machine, tmp_path, grant(Use(limits=limits, monitor=monitor)))
    for _ in range(300):
        machine.passes(0.5)
        with suppress(ExceededError):
            metering.spend()
        metering._tended.tend()
    assert metering.verdict.action == "none"
    metering.close()
