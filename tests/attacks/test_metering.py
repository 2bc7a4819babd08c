"""Spending by threads, forks and processes, and their sudden deaths: nothing is spent twice, no rate is exceeded."""

from __future__ import annotations

import datetime
import fcntl
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from hwlicense.core.account import SESSIONS, Account, Booked, Field
from hwlicense.core.errors import (
    ClosedError,
    ExceededError,
    HwlicenseError,
    Reason,
    StorageError,
    UsageError,
)
from hwlicense.core.hardware import Reading
from hwlicense.core.limits import Limits, Rate, Use
from hwlicense.core.secret import Secret
from hwlicense.device import recovering
from hwlicense.device.metering import BATCH, Metering
from tests.attacks.test_ledger import excess
from tests.metered import grant

_RECORD = struct.Struct("<q")


class FileAnchor:
    """A count that all processes share, as a TPM's."""

    def __init__(self, path) -> None:
        self.path, self.delay, self.failing = path, 0.0, False

    def _change(self, by: int) -> Reading:
        time.sleep(self.delay)
        if self.failing:
            raise StorageError(Reason.STORAGE, "The anchor is gone.", "")
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            steps = by + (_RECORD.unpack(os.pread(fd, 8, 0) or bytes(8))[0])
            os.pwrite(fd, _RECORD.pack(steps), 0)
        finally:
            os.close(fd)
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 10**6
        return Reading(steps, now, now, 4096)

    def step(self) -> Reading:
        return self._change(1)

    def read(self) -> Reading:
        return self._change(0)

    @contextmanager
    def together(self):
        yield self


PROMPT = 1_000_000
"""Nanoseconds within which a granted inference is told, or else not counted in windows."""


class Shop:
    """A device's license and its anchor; and what was spent, told over a pipe by whoever spends."""

    def __init__(self, folder, use: Use, *, anchored: bool = True) -> None:
        self.state, self.granted = folder / "state", grant(use)
        self.anchor = FileAnchor(folder / "anchor") if anchored else None
        self.ends = os.pipe()
        os.set_blocking(self.ends[0], False)

    def open(self) -> Metering:
        folder = recovering.account_folder(self.state, self.granted)
        key = Secret(bytearray(b"k" * 32))
        return Metering(self.granted, recovering.open_account(folder, self.granted, key, self.anchor, None))

    def used(self) -> int:
        metering = self.open()
        try:
            return metering._tended.snapshot()[0].words[Field.USED]
        finally:
            metering.close()

    def child(self, work) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        with suppress(BaseException):
            signal.alarm(60)
            work()
            status = 0
        os._exit(status)

    def tell(self, since: int | None = None) -> None:
        """The time; 0 where more than `PROMPT` passed since, so that it is not known when in between."""
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        os.write(self.ends[1], _RECORD.pack(now if since is None or now - since <= PROMPT else 0))

    def told(self) -> list[int]:
        raw = b""
        with suppress(BlockingIOError):
            while piece := os.read(self.ends[0], 1 << 16):
                raw += piece
        return sorted(when for (when,) in _RECORD.iter_unpack(raw))


def spend_patiently(metering: Metering, count: int) -> int:
    """So many, waiting for leases; fewer where the license says no."""
    for done in range(count):
        while True:
            try:
                metering.spend()
            except ExceededError as error:
                if error.reason != Reason.LEASE_PENDING:
                    return done
                time.sleep(0.002)
            else:
                break
    return count


@pytest.mark.parametrize("anchored", [True, False])
def test_a_child_that_leaves_a_session_gives_nothing_back(tmp_path, anchored):
    """The tickets of a session are the parent's: in a child there are none to give back."""
    shop = Shop(tmp_path, Use(limits=Limits(inferences=1000)), anchored=anchored)
    metering = shop.open()
    session = metering.hold(40, 3600)

    def work() -> None:
        session.finish()
        os.write(shop.ends[1], _RECORD.pack(spend_patiently(metering, 900)))
        metering.close()

    assert os.waitpid(shop.child(work), 0)[1] == 0
    child, held = sum(shop.told()), 0
    while metering._spend_held(1):
        held += 1
    rest = spend_patiently(metering, 1000)
    assert (child, held, child + held + rest) == (900, 40, 1000)
    metering.close()


@pytest.mark.parametrize("anchored", [True, False])
def test_threads_spend_exactly_the_total(tmp_path, anchored):
    shop = Shop(tmp_path, Use(limits=Limits(inferences=50_000)), anchored=anchored)
    metering, done = shop.open(), []
    threads = [threading.Thread(target=lambda: done.append(spend_patiently(metering, 20_000))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(done) == 50_000
    metering.close()


@pytest.mark.parametrize("anchored", [True, False])
def test_forks_and_openings_share_one_account(tmp_path, anchored):
    shop = Shop(tmp_path, Use(limits=Limits(inferences=30_000)), anchored=anchored)
    metering = shop.open()
    spend_patiently(metering, 500)

    def forked() -> None:
        os.write(shop.ends[1], _RECORD.pack(spend_patiently(metering, 20_000)))
        metering.close()

    def opened() -> None:
        mine = shop.open()
        os.write(shop.ends[1], _RECORD.pack(spend_patiently(mine, 20_000)))
        mine.close()

    pids = [shop.child(work) for work in (forked, opened, forked, opened)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    rest = spend_patiently(metering, 20_000)
    assert 500 + sum(shop.told()) + rest == 30_000
    metering.close()
    assert shop.used() == 30_000


def test_a_fork_in_the_middle_of_spending_by_threads(tmp_path):
    shop = Shop(tmp_path, Use(limits=Limits(inferences=10**9)))
    metering, stop = shop.open(), threading.Event()

    def busy() -> None:
        while not stop.is_set():
            spend_patiently(metering, 100)

    def spend_and_close() -> None:
        spend_patiently(metering, 2000)
        metering.close()

    threads = [threading.Thread(target=busy) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            pid = shop.child(spend_and_close)
            assert os.waitpid(pid, 0)[1] == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    metering.close()


@pytest.mark.parametrize("anchored", [True, False])
def test_sudden_deaths_lose_and_never_gain(tmp_path, anchored):
    rates = [Rate(400, 1), Rate(900, 3)]
    shop = Shop(tmp_path, Use(limits=Limits(inferences=10**7, rates=rates)), anchored=anchored)

    def work() -> None:
        metering = shop.open()
        while True:
            before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            try:
                metering.spend()
            except ExceededError:
                time.sleep(0.001)
            else:
                shop.tell(before)

    told: list[int] = []
    chance, children, end = random.Random(4), [], time.monotonic() + 8
    while time.monotonic() < end:
        children.append(shop.child(work))
        time.sleep(chance.uniform(0.001, 0.05))
        if len(children) > 3:
            victim = children.pop(chance.randrange(len(children)))
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
        told += shop.told()
    for victim in children:
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
    told += shop.told()
    assert len(told) > 100
    assert shop.used() >= len(told)
    prompt = sorted(when for when in told if when)
    for rate in rates:
        assert excess([(when, 1) for when in prompt], rate.count, rate.seconds * 10**9 - PROMPT) <= 0


def test_a_process_that_is_killed_loses_a_batch_and_others_go_on(tmp_path):
    shop = Shop(tmp_path, Use(limits=Limits(inferences=10**6)))
    metering = shop.open()
    spend_patiently(metering, 1)

    def work() -> None:
        for _ in range(3000):
            spend_patiently(metering, 1)
        time.sleep(0.3)  # killed while it takes a lease, it would lose what one may have reserved
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(shop.child(work), 0)
    spend_patiently(metering, 99)
    metering.close()
    assert 3100 <= shop.used() <= 3100 + BATCH


def test_a_slow_anchor_holds_up_nobody_who_spends(tmp_path):
    shop = Shop(tmp_path, Use(limits=Limits(inferences=10**9)))
    metering = shop.open()
    spend_patiently(metering, 5000)
    shop.anchor.delay, worst = 0.7, 0.0
    end = time.monotonic() + 2
    while time.monotonic() < end:
        before = time.perf_counter()
        with suppress(ExceededError):
            metering.spend()
        worst = max(worst, time.perf_counter() - before)
        time.sleep(0.0005)
    assert worst < 0.5, "far less than one step takes"
    metering.close()


def test_a_reserved_session_gets_what_was_reserved(tmp_path):
    shop = Shop(tmp_path, Use(limits=Limits(rates=[Rate(100, 3600)])), anchored=False)
    metering = shop.open()
    session = metering.hold(40, 60)
    assert spend_patiently(metering, 200) == 100, "60 by the rate, and 40 that were reserved"
    session.finish()
    with pytest.raises(ExceededError) as error:
        metering.spend()
    assert error.value.reason == Reason.RATE_EXCEEDED
    assert 3000 < (error.value.wait or 0) <= 3800
    metering.close()


def test_what_a_session_does_not_use_is_given_back(tmp_path):
    shop = Shop(tmp_path, Use(limits=Limits(inferences=1000, rates=[Rate(100, 3600)])), anchored=False)
    metering = shop.open()
    session = metering.hold(90, 60)
    assert metering.may_start(20).reason == Reason.RATE_EXCEEDED
    with pytest.raises(ExceededError):
        metering.hold(20, 60)
    session.finish()
    assert metering.may_start(20) is None
    assert spend_patiently(metering, 200) == 100
    metering.close()
    assert shop.used() == 100


def test_a_session_of_another_thread_is_not_for_this_one(tmp_path):
    shop = Shop(tmp_path, Use(limits=Limits(rates=[Rate(10, 3600)])), anchored=False)
    metering, sessions = shop.open(), []
    thread = threading.Thread(target=lambda: sessions.append(metering.hold(4, 60)))
    thread.start()
    thread.join()
    assert spend_patiently(metering, 20) == 6
    sessions[0].finish()
    assert spend_patiently(metering, 20) == 4
    metering.close()


@pytest.mark.parametrize("count", [0, -1, 1.0, True, "1", None, 1 << 40])
def test_what_is_no_number_of_inferences(tmp_path, count):
    metering = Shop(tmp_path, Use(limits=Limits(inferences=10)), anchored=False).open()
    with pytest.raises(UsageError):
        metering.spend(count)
    metering.spend()
    metering.close()


def test_more_at_once_than_ever_allowed(tmp_path):
    metering = Shop(tmp_path, Use(limits=Limits(rates=[Rate(10, 60)])), anchored=False).open()
    with pytest.raises(ExceededError) as error:
        metering.spend(11)
    assert (error.value.reason, error.value.wait) == (Reason.RATE_EXCEEDED, None)
    metering.spend(10)
    with pytest.raises(ExceededError) as error:
        metering.spend()
    assert 55 < (error.value.wait or 0) <= 62
    metering.close()


def test_a_closed_account_gives_nothing(tmp_path):
    metering = Shop(tmp_path, Use(limits=Limits(inferences=10)), anchored=False).open()
    metering.spend()
    metering.close()
    metering.close()
    with pytest.raises(ClosedError):
        metering.spend()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    shop = Shop(tmp_path, Use(limits=Limits(inferences=10)), anchored=False)
    shop.state.write_text("a file")
    with pytest.raises(HwlicenseError):
        shop.open()


def test_a_failing_anchor_is_said_and_gotten_over(tmp_path):
    shop = Shop(tmp_path, Use(limits=Limits(inferences=10**6)))
    metering = shop.open()
    shop.anchor.failing = True
    pending = None
    for _ in range(200_000):
        try:
            metering.spend()
        except ExceededError as error:
            pending = error
            if "gone" in error.what:
                break
            time.sleep(0.002)
    assert pending is not None
    assert pending.reason == Reason.LEASE_PENDING
    assert "The anchor is gone." in pending.what
    shop.anchor.failing, metering._tended._retry_at = False, 0.0
    metering._tended.tend()
    assert spend_patiently(metering, 10) == 10
    metering.close()


def test_a_child_that_cannot_open_files_for_itself_spends_nothing(tmp_path):
    """What it has of the parent's, locks included, would be the parent's."""
    shop = Shop(tmp_path, Use(limits=Limits(inferences=1000)))
    metering = shop.open()
    spend_patiently(metering, 20)

    def work() -> None:
        with pytest.raises(StorageError, match="forked"):
            metering.spend()
        with pytest.raises(StorageError):
            metering.hold(5, 10)
        assert metering.may_start(0) is not None
        metering.close()
        shop.tell()

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # whatever threads open and close meanwhile
    try:
        child = shop.child(work)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert os.waitpid(child, 0)[1] == 0
    assert len(shop.told()) == 1
    assert spend_patiently(metering, 980) == 980
    metering.close()


def test_sessions_that_begin_and_end_in_many_threads(tmp_path):
    shop = Shop(tmp_path, Use(limits=Limits(inferences=10**6)), anchored=False)
    metering, failed = shop.open(), []

    def work() -> None:
        for _ in range(30):
            try:
                metering.hold(1, 60).finish()
            except ExceededError:
                time.sleep(0.001)
            except Exception as error:  # noqa: BLE001  # any of them is wrong
                failed.append(error)

    for _ in range(10):
        threads = [threading.Thread(target=work) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    metering.close()


@pytest.mark.parametrize("anchored", [True, False])
def test_a_fork_in_a_signal_handler_gives_no_batch_twice(tmp_path, anchored, monkeypatch):
    """The handler interrupts a booking: the child goes on in the middle of it."""
    shop = Shop(tmp_path, Use(limits=Limits(inferences=3000)), anchored=anchored)
    metering, parent, children = shop.open(), os.getpid(), list[int]()
    book = Account.book

    def interrupted(account, *arguments, **keywords):
        result = book(account, *arguments, **keywords)
        if os.getpid() == parent and len(children) < 3 and isinstance(result, Booked) and result.taken > 1:
            children.append(os.fork())
        return result

    monkeypatch.setattr(Account, "book", interrupted)
    spent, refused = 0, ""
    try:
        spent += spend_patiently(metering, 3000)
    except BaseException as error:
        if os.getpid() == parent:
            raise
        refused = str(error)
    if os.getpid() != parent:
        status = 1
        with suppress(BaseException):
            signal.alarm(20)
            assert "was forked in the middle" in refused
            os.write(shop.ends[1], _RECORD.pack(spend_patiently(metering, 3000)))
            metering.close()
            status = 0
        os._exit(status)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3
    spent += spend_patiently(metering, 3000)  # what the children gave back
    assert spent + sum(shop.told()) == 3000
    metering.close()


def test_what_cannot_be_looked_after_keeps_nothing_else_from_it(tmp_path):
    shop = Shop(tmp_path, Use(limits=Limits(inferences=10**6)), anchored=False)
    metering = shop.open()
    tended = metering._tended

    def fails() -> None:
        raise StorageError(Reason.STORAGE, "The monitor cannot be written.", "")

    tended.on_round = fails
    tended._grant = grant(Use(limits=Limits(inferences=10**6)), not_after=datetime.date(2026, 6, 2))
    tended._calendar_at = 0.0
    assert tended.tend()
    assert tended.refusal.reason == Reason.LICENSE_EXPIRED
    assert tended.problem.what == "The monitor cannot be written."
    tended.on_round = lambda: None
    assert tended.tend()
    metering.close()


def test_without_an_anchor_no_lease_is_pending(tmp_path):
    """What another thread reserved just now is there to be booked."""
    shop = Shop(tmp_path, Use(limits=Limits(inferences=10**7)), anchored=False)
    metering = shop.open()
    for _ in range(20_000):
        metering.spend()  # its own thread reserves, too
    metering.close()


def test_a_session_is_refused_beforehand_where_none_is_free(tmp_path):
    shop = Shop(tmp_path, Use(limits=Limits(inferences=10**6)), anchored=False)
    metering = shop.open()
    sessions = [metering.hold(1, 60) for _ in range(SESSIONS)]
    refusal = metering.may_start(1)
    assert refusal.reason == Reason.RATE_EXCEEDED
    assert 59 < refusal.wait <= 60
    assert metering.may_start(0) is None
    sessions.pop().finish()
    assert metering.may_start(1) is None
    metering.close()


def test_a_silent_anchor_is_named(tmp_path, monkeypatch):
    shop = Shop(tmp_path, Use(limits=Limits(inferences=10**6)))
    metering = shop.open()
    monkeypatch.setattr(type(metering._tended), "silence", 30.0)
    error = metering._pending()
    assert (error.reason, error.wait) == (Reason.LEASE_PENDING, 5.0)
    assert "has not answered for 30 s" in error.what
    metering.close()


CHECK = """
from hwlicense.device import clock
try:
    clock.check_shared()
except clock.RefusedError as error:
    print(error.reason)
else:
    print("shared")
"""


@pytest.mark.parametrize(
    ("around", "before", "said"),
    [
        ([], "", "shared"),
        (["--time"], "", "shared"),  # a namespace of its own, whose clocks are the machine's
        (["--time", "--boottime", "1000"], "", "CLOCK_SET_BACK"),
        (["--time", "--monotonic", "1000"], "", "CLOCK_SET_BACK"),
        (
            ["--time", "--boottime", "1000"],
            "mount --bind /proc/1/timens_offsets /proc/$$/timens_offsets",
            "CLOCK_SET_BACK",
        ),
        (["--time", "--boottime", "1000"], "mount -t tmpfs none /proc/$$/ns", "CLOCK_SET_BACK"),
        (["--time", "--boottime", "1000"], "mount -t tmpfs none /proc", "CLOCK_SET_BACK"),
        ([], "mount -t tmpfs none /proc", "CLOCK_SET_BACK"),
    ],
)
def test_a_time_namespace_is_no_way_around_frames(around, before, said):
    """Hidden or not."""
    command = ["unshare", "--user", "--map-root-user", "--mount", *around, "sh", "-ec"]
    program = f'{before}\nexec "$0" -c "$1"'
    done = subprocess.run(
        [*command, program, sys.executable, CHECK], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.strip(), done.stderr) == (said, "")
