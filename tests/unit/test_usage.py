"""What reports say of an account, as time goes on: what opening would say of clock, dates and use."""

from __future__ import annotations

import datetime
from contextlib import nullcontext

import pytest
from msgspec.structs import replace

from hwlicense import storage
from hwlicense.core import calendar
from hwlicense.core.account import Field
from hwlicense.core.documents import ClockReset
from hwlicense.core.errors import ExceededError, Reason
from hwlicense.core.hardware import Counted
from hwlicense.core.limits import Limits, Monitor, Regularity, Use
from hwlicense.core.secret import Secret
from hwlicense.device import clock, ledger, recovering, usage
from hwlicense.device.locking import LockedFile
from hwlicense.device.watching import Watch
from tests.forging import refused
from tests.metered import ISSUED, Machine, abandon, grant, limited, spend

DAY = 86400
USE = Use(limits=Limits(inferences=10_000))


@pytest.fixture
def machine(monkeypatch):
    with Machine().running(monkeypatch) as machine:
        yield machine


def read(state, granted, reset=None):
    return usage.read(state, granted, None, reset, calendar.day(clock.wall()))


def agrees(machine, state, granted, code):
    """Opening says the same, and what is said while it is not open costs nothing."""
    refusal = read(state, granted).refusal
    assert (refusal and refusal.reason) == code
    with refused(code) if code else nullcontext():
        machine.open(state, granted).close()


@pytest.mark.parametrize("restarted", [False, True])
def test_a_clock_that_was_set_back(machine, tmp_path, restarted):
    granted = grant(USE)
    machine.passes(9 * DAY)
    machine.open(tmp_path, granted).close()
    if restarted:
        machine.restarts()
    machine.wall -= 3 * DAY
    reset = ClockReset(1, "0" * 64, "0" * 32, int(machine.wall))
    assert read(tmp_path, granted, reset).refusal is None
    agrees(machine, tmp_path, granted, Reason.CLOCK_SET_BACK)
    machine.wall += 3 * DAY
    agrees(machine, tmp_path, granted, None)


@pytest.mark.parametrize("restarted", [False, True])
def test_days_from_first_use(machine, tmp_path, restarted):
    granted = grant(Use(days=30))
    assert read(tmp_path, granted).state == "absent"
    machine.open(tmp_path, granted).close()
    if restarted:
        machine.restarts()
    machine.passes(30 * DAY)
    assert usage._days(30, read(tmp_path, granted)) == 0
    agrees(machine, tmp_path, granted, None)
    machine.passes(DAY)
    agrees(machine, tmp_path, granted, Reason.LICENSE_EXPIRED)


def test_a_clock_that_was_never_set_is_no_reason(machine, tmp_path):
    granted = grant(USE, not_before=ISSUED, not_after=ISSUED + datetime.timedelta(9))
    machine.wall = 20.0
    assert read(tmp_path, granted).refusal is None
    machine.open(tmp_path, granted).close()
    machine.rtc = False
    machine.restarts()
    agrees(machine, tmp_path, granted, None)


def test_frames_run_out_while_the_device_is_off(machine, tmp_path):
    granted = grant(limited((100, 3600)))
    metering = machine.open(tmp_path, granted)
    assert spend(metering, 101) == 100
    metering.close()

    def left():
        account = read(tmp_path, granted).account
        return next(account.rooms(account.words[Field.NEWEST_NS]))[1]

    machine.restarts()
    assert left() == 0
    machine.restarts(off=4000)
    assert left() == 100


def test_what_the_monitor_found_is_unknown_without_an_account(machine, tmp_path):
    regular = Regularity(64, 250, 30_000, "flag")
    granted = grant(Use(limits=Limits(inferences=10_000), monitor=Monitor(3600, regular)))
    unknown = {"in_force": None, "found_by": None}
    assert usage._monitor(read(tmp_path, granted)) == unknown, "absent"
    machine.open(tmp_path, granted).close()
    assert usage._monitor(read(tmp_path, granted)) == {"in_force": "none", "found_by": []}
    ledger_file = next(tmp_path.rglob("ledger"))
    ledger_file.write_bytes(b"x" * ledger_file.stat().st_size)
    assert read(tmp_path, granted).state == "unreadable"
    assert usage._monitor(read(tmp_path, granted)) == unknown
    ledger_file.unlink()
    counted = Counted("current", 3, 9, 0, None)
    missing = usage.read(tmp_path, granted, counted, None, calendar.day(clock.wall()))
    assert (missing.state, usage._monitor(missing)) == ("missing", unknown)
    never = usage.read(tmp_path, granted, replace(counted, opens=0), None, calendar.day(clock.wall()))
    assert usage._monitor(never)["in_force"] == "none"


@pytest.mark.parametrize("rates", [((100, 60), (1000, 3600)), ()])
def test_no_more_is_charged_in_doubt_than_could_be_spent(machine, tmp_path, rates):
    regular = Regularity(64, 250, 30_000, "flag")
    granted = grant(Use(limits=limited(*rates).limits, monitor=Monitor(3600, regular)))
    machine.open(tmp_path, granted).close()
    for path in tmp_path.rglob("ledger"):
        path.unlink()
    machine.open(tmp_path, granted).close()
    account = read(tmp_path, granted).account
    assert account.words[Field.LOST] == (1000 if rates else 0)
    assert all(room == 0 for _, room, _ in account.rooms(account.words[Field.NEWEST_NS]))


# ---- what was left open ----


def charged(machine, state, granted):
    """What the next opening charges, by the account's own count."""
    before = read(state, granted).account.words[Field.LOST]
    machine.open(state, granted).close()
    return read(state, granted).account.words[Field.LOST] - before


def due(state, granted, *, anchored=True):
    return usage.uncharged(granted, read(state, granted), with_anchor=anchored)


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("later", [0, 20, 300, 86400])
def test_what_was_left_open_will_be_charged(machine, tmp_path, later, anchored):
    machine.anchored, granted = anchored, grant(limited(inferences=1_000_000))
    metering = machine.open(tmp_path, granted)
    for _ in range(30):
        machine.passes(1)
        assert spend(metering, 30) == 30
        metering._tended.tend()
    assert due(tmp_path, granted) is None, "it is open"
    abandon(metering)
    machine.passes(later)
    now, most, kept_free_for = due(tmp_path, granted)
    assert 0 < now <= most <= 1_000_000
    assert kept_free_for is None, "it has no rates"
    assert charged(machine, tmp_path, granted) == now
    assert due(tmp_path, granted) is None


@pytest.mark.parametrize("cut", [False, True])
def test_what_a_restart_left_open_is_told_at_its_most(machine, tmp_path, cut):
    granted = grant(limited(inferences=1_000_000))
    metering = machine.open(tmp_path, granted)
    assert spend(metering, 30) == 30
    abandon(metering)
    machine.restarts(cut=cut)
    now, most, _ = due(tmp_path, granted)
    assert now is None
    assert 0 < charged(machine, tmp_path, granted) <= most


@pytest.mark.parametrize(
    ("anchored", "restarted", "kept_free_for", "words"),
    [
        (True, False, 320, "frames of rates have no room for these for 5 min 20 s, and count them from then on"),
        (False, False, 0, "frames of rates count these from then on"),
        (True, True, 0, "frames of rates count these from then on"),
    ],
)
def test_what_becomes_of_the_rates_is_told_before(machine, tmp_path, anchored, restarted, kept_free_for, words):
    machine.anchored, granted = anchored, grant(limited((600, 60), inferences=5_000), continuity=20)
    metering = machine.open(tmp_path, granted)
    for _ in range(30):
        machine.passes(1)
        assert spend(metering, 9) == 9
        metering._tended.tend()
    abandon(metering)
    machine.restarts() if restarted else machine.passes(200)
    found = due(tmp_path, granted, anchored=anchored)
    assert found.kept_free_for == kept_free_for
    assert words in usage.left_open(*found)
    machine.open(tmp_path, granted).close()
    account = read(tmp_path, granted).account
    assert bool(account.words[Field.DOUBTED]) == bool(kept_free_for)
    ((_, room, wait),) = account.rooms(account.words[Field.NEWEST_NS])
    if kept_free_for:
        assert room == 0
        assert wait >= (kept_free_for + 60) * 10**9, "when they are over, they count in the frame for its length"
    machine.passes(wait / 1e9)
    metering = machine.open(tmp_path, granted)
    assert spend(metering, 1) == 1
    metering.close()


def test_no_more_is_to_be_charged_than_is_left(machine, tmp_path):
    granted = grant(limited(inferences=100))
    metering = machine.open(tmp_path, granted)
    assert spend(metering, 95) == 95
    abandon(metering)
    machine.passes(600)
    left = read(tmp_path, granted).account.remaining
    assert due(tmp_path, granted) == (left, left, None)
    assert charged(machine, tmp_path, granted) == left


def test_a_process_that_does_not_answer_has_it_open(machine, tmp_path):
    granted = grant(USE)
    metering = machine.open(tmp_path, granted)
    (recovering.account_folder(tmp_path, granted) / "join").unlink()
    assert due(tmp_path, granted) is None
    abandon(metering)
    assert due(tmp_path, granted)


def test_asking_whether_it_is_open_keeps_nobody_from_opening_it(machine, tmp_path, monkeypatch):
    granted = grant(USE)
    machine.open(tmp_path, granted).close()
    folder = recovering.account_folder(tmp_path, granted)
    file = LockedFile.opened(folder / "ledger", 0)
    with file.locked(), monkeypatch.context() as patched:
        looked, tried = [], storage.taken

        def taken(fd, path):
            looked.append(path.name)
            return tried(fd, path)

        patched.setattr(storage, "taken", taken)
        assert ledger.is_open(folder)
        assert looked == ["ledger"], "whoever works there may be about to see whether `alive` is free"
    file.close()


def test_use_that_the_monitor_denies(machine, tmp_path):
    monitor = Monitor(3600, Regularity(16, 250, 30_000, "deny"))
    granted = grant(Use(monitor=monitor))
    folder = recovering.account_folder(tmp_path, granted)
    key = Secret(bytearray(b"k" * 32))
    tended = recovering.open_account(folder, granted, key, machine, None)
    watch = Watch(folder / "monitor", monitor, Secret(bytearray(b"m" * 32)), tended)
    for _ in range(20):
        machine.passes(1)
        watch.saw(watch.observation(tended.now(), 1, None, 0))
    watch.tend()
    watch.close()
    tended.close(lambda _account: None)
    refusal = usage.over(granted, read(tmp_path, granted))
    assert (refusal.reason, 3000 < refusal.wait <= 3600) == (Reason.ABNORMAL_USE, True)
    (folder / "monitor").rename(folder / "kept")
    assert usage.over(granted, read(tmp_path, granted)).reason == Reason.ABNORMAL_USE, "as opening takes it"
    (folder / "kept").rename(folder / "monitor")
    machine.restarts(off=4000)
    assert usage.over(granted, read(tmp_path, granted)) is None


def test_more_than_a_lease_ever_holds_is_refused_at_once(machine, tmp_path):
    """Not told to try again, which would never help; the bound itself is granted, and by one call."""
    metering = machine.open(tmp_path, grant(USE))
    never = machine.boot
    for act in (lambda: metering.spend(8193), lambda: metering.hold(8193, 9)):
        with pytest.raises(ExceededError, match="8,193 inferences at once") as caught:
            act()
        assert (caught.value.reason, caught.value.wait) == (Reason.RATE_EXCEEDED, None)
        assert "Ask for 8,192 at a time" in caught.value.hint
    assert metering.may_start(8193).reason == Reason.RATE_EXCEEDED
    assert machine.boot == never
    assert spend(metering, 8192, each=8192) == 8192
    metering.close()


def test_without_an_anchor_all_of_a_total_may_be_spent_at_once(monkeypatch, tmp_path):
    with Machine(anchored=False).running(monkeypatch) as machine:
        metering = machine.open(tmp_path, grant(USE))
        assert spend(metering, 10_000, each=10_000) == 10_000
        metering.close()


@pytest.mark.parametrize("total", [1, 3, 64, 100, 128, 129, 1000])
def test_of_a_small_total_all_may_be_spent_at_once(machine, tmp_path, total):
    metering = machine.open(tmp_path, grant(Use(limits=Limits(inferences=total))))
    assert spend(metering, total, each=total) == total
    metering.close()
