"""Presence: when hardware counts as here, what the grace covers, and what an open model does meanwhile."""

import multiprocessing
import os
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwlicense import storage
from hwlicense.core.documents import ANSWER_LIMIT
from hwlicense.core.documents import Presence as Terms
from hwlicense.core.errors import AbsentError, HwlicenseError, Reason, RefusedError, StorageError
from hwlicense.core.presence import Proofs
from hwlicense.core.secret import Secret
from hwlicense.device import clock, grace
from hwlicense.device.grace import PresenceAccount
from hwlicense.device.pin_turn import PinTurn
from hwlicense.device.presence import Presence

if TYPE_CHECKING:
    from hwlicense.device.bound import Bound

GONE = AbsentError(Reason.DONGLE_ABSENT, "It is gone.", "Plug it in.")


# ---- the rules, without a clock ----


def test_a_proof_counts_from_when_it_was_asked_for():
    standing = Proofs(10, 100)
    standing.proven(105)
    standing.proven(104)  # a slow answer to an earlier question changes nothing
    assert standing.refusal(115) is None
    assert standing.refusal(115.001).reason == Reason.PRESENCE_UNPROVEN


def test_a_failed_proof_refuses_at_once_and_a_good_one_ends_that():
    standing = Proofs(10, 100)
    standing.failed(GONE, 100)
    assert standing.refusal(100.1).reason == GONE.reason
    standing.proven(103)
    assert standing.refusal(103) is None


def test_the_grace_bridges_until_it_ends():
    standing = Proofs(10, 100)
    standing.failed(GONE, 100)
    standing.bridged(107)
    assert standing.refusal(106.9) is None
    assert not standing.here(106.9)
    assert standing.refusal(107).reason == GONE.reason


@given(
    st.lists(
        st.tuples(st.sampled_from(["proven", "failed", "bridged"]), st.floats(0, 50), st.floats(0, 5)), max_size=30
    )
)
def test_nothing_starts_without_a_proof_within_the_interval_or_a_bridge(events):
    standing, now, last, bridge = Proofs(10, 0), 0.0, 0.0, 0.0
    for kind, after, extra in events:
        now += after
        if kind == "proven":
            standing.proven(now - min(extra, now))
            last = max(last, now - min(extra, now))
        elif kind == "failed":
            standing.failed(GONE, now)
        else:
            standing.bridged(now + extra)
            bridge = max(bridge, now + extra)
        assert standing.away_since(now) == now if standing.here(now) else standing.away_since(now) <= now
        if standing.refusal(now) is None:
            assert now <= last + 10 or now < bridge


# ---- the account ----


def key():
    return Secret(bytearray(b"k" * 32))


def account(folder, seconds=60, regain=None):
    made = PresenceAccount(folder, Terms(1, seconds, regain, repeat=True), key())
    made.prepare()
    return made


def test_absence_is_paid_for_once_and_to_the_end(tmp_path):
    now = time.monotonic()
    first, second = account(tmp_path), account(tmp_path)
    assert first.bridge(now, 10) == pytest.approx(now + 10, abs=0.01)
    assert second.bridge(now, 10) == pytest.approx(now + 10, abs=0.01)  # the same ten seconds
    assert first.grace_left == second.grace_left == pytest.approx(50, abs=0.01)
    assert first.bridge(now + 5, 10) == pytest.approx(now + 15, abs=0.01)
    assert first.bridge(now + 100, 1000) == pytest.approx(now + 145, abs=0.01)
    assert first.grace_left == pytest.approx(0, abs=0.01)
    assert first.bridge(now + 200, 10) == pytest.approx(now + 200, abs=0.01)


def test_a_new_process_finds_what_was_used(tmp_path):
    account(tmp_path).bridge(time.monotonic(), 45)
    assert account(tmp_path).grace_left == pytest.approx(15, abs=0.01)
    assert grace.recorded(tmp_path).used == pytest.approx(45_000, abs=10)


def test_after_a_restart_of_the_machine_nothing_is_paid_for_and_nothing_comes_back(tmp_path, monkeypatch):
    now = time.monotonic()
    account(tmp_path).bridge(now, 45)
    monkeypatch.setattr(clock, "boot_name", lambda: "another boot")
    later = account(tmp_path)
    assert later.grace_left == pytest.approx(15, abs=0.01)
    assert later.bridge(0.5, 10) == pytest.approx(10.5, abs=0.01)
    assert later.grace_left == pytest.approx(5, abs=0.01)


@pytest.mark.parametrize("change", [b"", b"{}", b"x" * 5000, "flip", "other key"])
def test_a_forged_account_has_no_grace(tmp_path, change):
    account(tmp_path).bridge(time.monotonic(), 1)
    path = tmp_path / "presence"
    if change == "other key":
        PresenceAccount(tmp_path, Terms(1, 60, None, repeat=True), Secret(bytearray(32)))._write(
            account(tmp_path)._read()
        )
    else:
        raw = bytearray(path.read_bytes())
        raw[15] ^= 1
        path.write_bytes(raw if change == "flip" else change)
    assert account(tmp_path).grace_left == 0


def test_grace_comes_back_by_proven_presence_alone_and_to_all_processes_together(tmp_path):
    now = time.monotonic()
    first, second = account(tmp_path, 60, 600), account(tmp_path, 60, 600)
    first.bridge(now, 30)
    first.credit(now + 30, now + 130)
    second.credit(now + 30, now + 130)  # the same hundred seconds
    assert first.grace_left == pytest.approx(40, abs=0.01)
    first.credit(now + 130, now + 10_000)
    assert first.grace_left == pytest.approx(60, abs=0.01)
    without = account(tmp_path / "other", 60)
    without.bridge(now, 30)
    without.credit(now, now + 10_000)
    assert without.grace_left == pytest.approx(30, abs=0.01)


def test_times_of_another_clock_pay_for_nothing_and_are_not_credited(tmp_path, monkeypatch):
    """A time namespace, which any user can make, moves the clock and leaves the boot's name as it is."""
    now = time.monotonic()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(time, "monotonic", lambda: now + 1e8)
        account(tmp_path, 60, 600).bridge(now + 1e8, 20)
    mine = account(tmp_path, 60, 600)
    assert mine.bridge(now, 10) == pytest.approx(now + 10, abs=0.01)
    assert mine.grace_left == pytest.approx(30, abs=0.01)
    for boot in ("a", "b", "c"):
        monkeypatch.setattr(clock, "boot_name", lambda boot=boot: boot)
        account(tmp_path, 60, 600).credit(now - 100, now)
    assert account(tmp_path, 60, 600).grace_left == pytest.approx(30, abs=0.01)


def test_what_a_process_has_seen_used_stays_used_though_the_file_goes(tmp_path):
    mine = account(tmp_path)
    mine.bridge(time.monotonic(), 45)
    mine.reserve_proofs()
    (tmp_path / "presence").unlink()
    assert mine.grace_left == pytest.approx(15, abs=0.01)
    assert mine.reserve_proofs().start == grace.BLOCK


def reserve(folder, out):
    out.put([list(account(folder).reserve_proofs()) for _ in range(5)])


def test_no_proof_is_given_to_two_processes(tmp_path):
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    workers = [context.Process(target=reserve, args=(tmp_path, out)) for _ in range(3)]
    for worker in workers:
        worker.start()
    numbers = [number for _ in workers for block in out.get(timeout=60) for number in block]
    for worker in workers:
        worker.join()
    assert len(numbers) == len(set(numbers)) == 3 * 5 * grace.BLOCK


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HwlicenseError) as caught:
        account(tmp_path / "file")
    assert caught.value.hint


# ---- the threads ----


class Hardware:
    """As much of `Bound` as presence asks for."""

    spends_proofs = False

    def __init__(self):
        self.problem = None
        self.numbers, self.closed = [], 0
        self.hanging = threading.Event()
        self.hanging.set()

    def present(self, number):
        self.hanging.wait(30)
        self.numbers.append(number)
        if isinstance(self.problem, HwlicenseError):
            raise self.problem.again()
        if self.problem:
            raise self.problem

    def close(self):
        self.closed += 1


class Guarded:
    def __init__(self):
        self.lost, self.regained, self.problem, self.asked, self.opened = [], 0, None, 0, 0
        self.locked = False

    def lose_keys(self, refusal):
        self.locked = True
        self.lost.append((time.monotonic(), refusal.reason))

    def reopen(self, _bound, *, ask):
        self.opened += 1
        self.asked += ask
        if self.problem:
            raise self.problem
        return "keys"

    def regain_keys(self, keys):
        assert keys == "keys"
        self.locked = False
        self.regained += 1


@pytest.fixture
def watched(tmp_path):
    made = []

    def make(interval=0.4, seconds=0.0, regain=None, answers=None, *, with_account=False):
        terms = Terms(interval, seconds, regain, answers is None)
        own = PresenceAccount(tmp_path, terms, key()) if with_account or seconds else None
        hardware, guarded = Hardware(), Guarded()
        presence = Presence(terms, cast("Bound", hardware), own, answers)
        presence.guard(guarded)
        made.append((presence, hardware, guarded))
        return made[-1]

    yield make
    for presence, hardware, _ in made:
        hardware.hanging.set()
        presence.close()
        assert hardware.closed == 1


def until(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def test_proofs_go_on_and_nothing_is_refused(watched):
    presence, _, guarded = watched()
    for _ in range(40):
        time.sleep(0.05)
        assert presence.refusal() is None
    assert presence.proofs >= 5
    assert guarded.lost == []


def test_a_pulled_dongle_is_refused_within_the_interval_and_its_keys_are_gone(watched):
    presence, hardware, guarded = watched()
    until(lambda: presence.proofs >= 2)
    pulled, hardware.problem = time.monotonic(), GONE
    until(presence.refusal)
    assert time.monotonic() - pulled < 0.4 + 1
    until(lambda: guarded.lost)
    assert [reason for _, reason in guarded.lost] == [Reason.DONGLE_ABSENT]
    hardware.problem = None
    until(lambda: presence.refusal() is None)
    assert guarded.regained == guarded.opened == 1
    assert len(guarded.lost) == 1


def test_hardware_that_hangs_is_refused_just_as_soon(watched):
    presence, hardware, guarded = watched()
    until(lambda: presence.proofs >= 2)
    hardware.hanging.clear()
    began = time.monotonic()
    until(presence.refusal)
    assert time.monotonic() - began < 0.4 + 1
    until(lambda: guarded.lost)
    assert guarded.lost[0][1] == Reason.PRESENCE_UNPROVEN
    hardware.hanging.set()
    until(lambda: presence.refusal() is None)
    assert guarded.regained >= 1


def test_the_grace_covers_an_absence_and_runs_out(watched):
    presence, hardware, guarded = watched(seconds=2)
    until(lambda: presence.proofs >= 1)
    hardware.problem = GONE
    until(lambda: not presence.here)
    began = time.monotonic()
    while time.monotonic() - began < 1.2:
        assert presence.refusal() is None
        assert not guarded.lost
        time.sleep(0.02)
    until(presence.refusal)
    assert 1.5 < time.monotonic() - began < 4
    until(lambda: guarded.lost)
    hardware.problem = None
    until(lambda: presence.refusal() is None)
    hardware.problem = GONE
    until(presence.refusal, 2)  # plugging it in again refilled nothing
    assert presence.grace_left < 0.5


def test_a_login_that_is_gone_is_made_again(watched):
    presence, hardware, guarded = watched()
    until(lambda: presence.proofs >= 1)
    hardware.problem = RefusedError(Reason.PIN_NEEDED, "It was away.", "Log in.")
    until(lambda: guarded.regained >= 1)
    assert presence.refusal() is None


@pytest.mark.parametrize("reason", [Reason.PIN_WRONG, Reason.PIN_LAST_TRY, Reason.PIN_NEEDED])
def test_a_pin_that_was_refused_is_not_tried_again(watched, reason):
    presence, hardware, guarded = watched()
    hardware.problem = GONE
    until(lambda: guarded.lost)
    guarded.problem, hardware.problem = RefusedError(reason, "No.", "Ask."), None
    until(lambda: guarded.opened >= 4)
    assert guarded.asked == 1
    assert presence.refusal().reason == reason
    guarded.problem = None  # other hardware of the license, which takes no PIN, opens it all the same
    until(lambda: presence.refusal() is None)
    assert guarded.asked == 1


def test_answers_that_serve_once_run_out(watched):
    _, hardware, guarded = watched(answers=3, with_account=True)
    hardware.spends_proofs = True
    until(lambda: None in hardware.numbers)
    assert set(hardware.numbers) == {0, 1, 2, None}
    assert guarded.lost == []  # it is for the hardware to say whether it can do without


def test_a_forked_child_watches_for_itself_and_leaves_the_parents_alone(watched):
    presence, hardware, guarded = watched(interval=1.0)
    until(lambda: presence.proofs >= 1)
    child = os.fork()
    if not child:
        status = 1
        try:
            presence.after_fork()
            time.sleep(1.2)  # longer than the interval: what the parent proved has lapsed
            assert presence.refusal(wait=True) is None
            hardware.problem = GONE
            until(lambda: presence.refusal() and guarded.lost)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert presence.refusal() is None
    assert guarded.lost == []


def test_nothing_waits_for_hardware(watched):
    presence, hardware, _ = watched(interval=0.3)
    until(lambda: presence.proofs >= 1)
    hardware.hanging.clear()
    until(presence.refusal)
    began = time.monotonic()
    for _ in range(100):
        assert presence.refusal(wait=True)
    assert time.monotonic() - began < 1
    presence.close()
    assert time.monotonic() - began < 4


def test_an_account_that_another_process_keeps_locked_keeps_no_keys_alive(watched, tmp_path):
    presence, hardware, guarded = watched(seconds=300)
    until(lambda: presence.proofs >= 1)
    with storage.exclusive(tmp_path):
        hardware.problem = GONE
        until(lambda: guarded.lost, 4)
        assert presence.refusal().reason == GONE.reason


def test_an_account_that_cannot_be_read_keeps_no_keys_alive(watched, monkeypatch):
    presence, hardware, guarded = watched(seconds=300)
    until(lambda: presence.proofs >= 1)

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", denied)
    hardware.problem = GONE
    until(lambda: guarded.lost, 4)
    monkeypatch.undo()
    hardware.problem = None
    until(lambda: presence.refusal() is None)


def test_a_full_disk_locks_nothing_while_the_hardware_is_here(watched, monkeypatch):
    monkeypatch.setattr(PresenceAccount, "_write", no_space)
    presence, hardware, guarded = watched(with_account=True)
    hardware.spends_proofs = True
    until(lambda: presence.proofs >= 5)
    assert presence.refusal() is None
    assert guarded.lost == []
    assert ANSWER_LIMIT in hardware.numbers  # which stands for any of the recorded ones


def no_space(*_):
    raise StorageError(Reason.STORAGE, "No space left on device.", "Free some space.")


def test_what_nobody_foresaw_is_no_proof_and_does_not_end_the_asking(watched):
    presence, hardware, guarded = watched()
    until(lambda: presence.proofs >= 1)
    hardware.problem = ZeroDivisionError("of a driver")
    until(lambda: guarded.lost)
    assert presence.refusal().reason == Reason.PRESENCE_UNPROVEN
    hardware.problem = None
    until(lambda: presence.refusal() is None)


def unforeseen(*_, **__):
    raise ZeroDivisionError("of nobody's")


@pytest.fixture
def printed(monkeypatch):
    """What threads would print to the user's stderr."""
    said: list[object] = []
    monkeypatch.setattr(threading, "excepthook", said.append)
    return said


def test_a_watch_that_fails_prints_nothing_and_leaves_no_keys_that_nobody_watches(watched, printed, monkeypatch):
    presence, hardware, guarded = watched()
    until(lambda: presence.proofs >= 1)
    monkeypatch.setattr(presence, "_watched", unforeseen)
    until(lambda: guarded.lost)
    assert [reason for _, reason in guarded.lost] == [Reason.PRESENCE_UNPROVEN]
    monkeypatch.undo()
    until(lambda: hardware.closed)
    time.sleep(1)
    assert (guarded.locked, guarded.regained) == (True, 0)
    assert printed == []


@pytest.mark.parametrize(
    ("of", "name", "fails"),
    [(PresenceAccount, "bridge", unforeseen), (Presence, "_start", no_space)],
    ids=["payment", "no thread to pay"],
)
def test_what_cannot_be_paid_prints_nothing_and_grants_nothing(watched, printed, monkeypatch, of, name, fails):
    presence, hardware, guarded = watched(seconds=300)
    until(lambda: presence.proofs >= 1)
    monkeypatch.setattr(of, name, fails)
    hardware.problem = GONE
    until(lambda: guarded.lost, 4)
    monkeypatch.undo()
    hardware.problem = None
    until(lambda: presence.refusal() is None)
    assert printed == []


def test_hardware_that_cannot_be_let_go_of_prints_nothing(printed, monkeypatch):
    hardware, guarded = Hardware(), Guarded()
    presence = Presence(Terms(1, 0, None, repeat=True), cast("Bound", hardware), None, None)
    presence.guard(guarded)
    until(lambda: presence.proofs >= 1)
    monkeypatch.setattr(hardware, "close", unforeseen)
    presence.close()
    assert (printed, guarded.lost) == ([], [])


def test_what_is_guarded_is_not_kept_alive():
    hardware, models = Hardware(), [Guarded()]
    presence = Presence(Terms(1, 0, None, repeat=True), cast("Bound", hardware), None, None)
    presence.guard(models[0])
    hardware.problem = GONE
    until(lambda: models[0].lost)
    watching = weakref.ref(models.pop())
    until(lambda: watching() is None)
    presence.close()


def test_unused_proofs_are_given_back(watched, tmp_path):
    presence, hardware, _ = watched(with_account=True)
    hardware.spends_proofs = True
    until(lambda: len(hardware.numbers) > 3)
    presence.close()
    used = len(set(hardware.numbers))
    assert account(tmp_path, 0).proofs in (used, used + 1)  # one may be asked for at the moment


def test_one_process_at_a_time_asks_for_a_pin_and_none_after_a_refusal():
    turn = PinTurn()
    assert turn.take()
    child = os.fork()
    if not child:
        os._exit(turn.take())
    assert os.waitpid(child, 0)[1] == 0
    turn.give_back()
    child = os.fork()
    if not child:
        os._exit(not turn.take())
    assert os.waitpid(child, 0)[1] == 0
    assert not turn.take()  # it went with that process
