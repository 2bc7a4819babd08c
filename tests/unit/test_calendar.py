"""What day it is for a license, whatever the wall clock says."""

from __future__ import annotations

import datetime

import pytest

from hwlicense.core.documents import ClockReset
from hwlicense.core.errors import Reason, RefusedError
from hwlicense.core.limits import Limits, Rate, Use
from tests.metered import ISSUED, NOON, Machine, abandon, grant, spend

DAY = 86400


@pytest.fixture
def machine(monkeypatch):
    with Machine().running(monkeypatch) as machine:
        yield machine


def reset(time: int) -> ClockReset:
    return ClockReset(1, "0" * 64, "0" * 32, time)


def refused(machine, state, granted, reason, given=None):
    with pytest.raises(RefusedError) as error:
        machine.open(state, granted, given)
    assert error.value.reason == reason


USE = Use(limits=Limits(inferences=10_000))


def test_a_clock_that_is_set_back_is_refused_and_set_right_it_is_not(machine, tmp_path):
    granted = grant(USE, not_after=datetime.date(2026, 6, 30))
    machine.passes(20 * DAY)
    machine.open(tmp_path, granted).close()
    machine.wall -= 10 * DAY
    refused(machine, tmp_path, granted, Reason.CLOCK_SET_BACK)
    machine.restarts()
    refused(machine, tmp_path, granted, Reason.CLOCK_SET_BACK)
    machine.wall += 10 * DAY
    machine.open(tmp_path, granted).close()


def test_an_hour_back_is_a_correction(machine, tmp_path):
    granted = grant(USE)
    machine.open(tmp_path, granted).close()
    machine.wall -= 3500
    machine.open(tmp_path, granted).close()


def test_while_it_is_open_a_clock_that_is_set_back_refuses_what_starts_next(machine, tmp_path):
    machine.passes(10 * DAY)
    metering = machine.open(tmp_path, grant(USE))
    metering._tended.tend()
    assert metering.may_start(0) is None
    machine.wall -= 3 * DAY
    machine.passes(61)
    metering._tended.tend()
    assert metering.may_start(0).reason == Reason.CLOCK_SET_BACK
    metering.spend()  # what runs goes on
    machine.wall += 3 * DAY
    machine.passes(61)
    metering._tended.tend()
    assert metering.may_start(0) is None


def test_a_license_that_expires_while_it_is_open(machine, tmp_path):
    metering = machine.open(tmp_path, grant(USE, not_after=ISSUED))
    machine.passes(DAY)
    metering._tended.tend()
    assert metering.may_start(0).reason == Reason.LICENSE_EXPIRED


def test_without_a_clock_that_is_set_time_goes_on_with_the_anchors(machine, tmp_path):
    machine.rtc = False
    granted = grant(USE, not_after=ISSUED + datetime.timedelta(9))
    machine.restarts()
    assert machine.wall < DAY
    for _ in range(19):  # ten days, in half days
        metering = machine.open(tmp_path, granted)
        spend(metering, 1)
        machine.passes(DAY / 2)
        metering.close()
        machine.restarts()
    machine.passes(DAY)
    refused(machine, tmp_path, granted, Reason.LICENSE_EXPIRED)


def test_without_clock_and_anchor_time_goes_on_while_it_is_open(monkeypatch, tmp_path):
    with Machine(anchored=False).running(monkeypatch) as machine:
        machine.rtc = False
        machine.restarts()
        metering = machine.open(tmp_path, grant(USE, not_after=ISSUED))
        machine.passes(DAY + 60)
        metering._tended.tend()
        assert metering.may_start(0).reason == Reason.LICENSE_EXPIRED
        metering.close()
        machine.restarts()
        refused(machine, tmp_path, grant(USE, not_after=ISSUED), Reason.LICENSE_EXPIRED)


def test_far_forward_by_mistake_is_mended_by_a_clock_reset_once(machine, tmp_path):
    granted = grant(USE, not_after=datetime.date(2027, 1, 1))
    machine.open(tmp_path, granted).close()
    machine.wall += 4000 * DAY
    refused(machine, tmp_path, granted, Reason.LICENSE_EXPIRED)
    machine.wall -= 4000 * DAY
    refused(machine, tmp_path, granted, Reason.CLOCK_SET_BACK)
    mended = reset(NOON + 60)
    machine.open(tmp_path, granted, mended).close()
    machine.passes(100 * DAY)
    machine.open(tmp_path, granted, mended).close()
    machine.wall -= 90 * DAY
    refused(machine, tmp_path, granted, Reason.CLOCK_SET_BACK, mended)
    machine.open(tmp_path, granted, reset(NOON + 10 * DAY)).close()


def test_an_old_reset_does_not_count_again_after_a_crash(machine, tmp_path):
    granted = grant(USE)
    abandon(machine.open(tmp_path, granted, reset(NOON + 60)))
    machine.passes(50 * DAY)
    machine.open(tmp_path, granted, reset(NOON + 60)).close()
    machine.wall -= 40 * DAY
    refused(machine, tmp_path, granted, Reason.CLOCK_SET_BACK, reset(NOON + 60))


def test_days_from_first_use_begin_with_the_first_opening(machine, tmp_path):
    granted = grant(Use(days=30))
    machine.passes(200 * DAY)  # on the shelf
    machine.open(tmp_path, granted).close()
    machine.passes(30 * DAY)
    machine.open(tmp_path, granted).close()
    machine.passes(DAY)
    refused(machine, tmp_path, granted, Reason.LICENSE_EXPIRED)


def test_a_deleted_account_of_an_anchored_license_was_first_used_when_it_was_issued(machine, tmp_path):
    granted = grant(Use(days=30))
    machine.passes(200 * DAY)
    machine.open(tmp_path, granted).close()
    for path in tmp_path.rglob("ledger"):
        path.unlink()
    refused(machine, tmp_path, granted, Reason.LICENSE_EXPIRED)


def test_windows_go_on_over_restarts(machine, tmp_path):
    granted = grant(Use(limits=Limits(rates=[Rate(100, 3600)])))
    metering = machine.open(tmp_path, granted)
    assert spend(metering, 1000) == 100
    metering.close()
    machine.restarts(off=600)
    metering = machine.open(tmp_path, granted)
    assert spend(metering, 1) == 0
    metering.close()
    machine.restarts(off=3200)
    assert spend(machine.open(tmp_path, granted), 1000) == 100


def test_windows_do_not_run_out_while_a_machine_without_a_clock_is_off(machine, tmp_path):
    machine.rtc = False
    machine.restarts()
    granted = grant(Use(limits=Limits(rates=[Rate(100, 3600)])))
    metering = machine.open(tmp_path, granted)
    assert spend(metering, 1000) == 100
    metering.close()
    machine.restarts(off=10 * DAY)
    assert spend(machine.open(tmp_path, granted), 1) == 0


def test_the_wall_clock_gives_no_rate_back_while_it_is_open(machine, tmp_path):
    metering = machine.open(tmp_path, grant(Use(limits=Limits(rates=[Rate(100, 3600)]))))
    assert spend(metering, 1000) == 100
    machine.wall += 10 * DAY
    metering._tended.tend()
    assert spend(metering, 1) == 0
