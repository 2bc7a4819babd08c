"""Work shared out over threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict

import pytest

from hwlicense.device import reading
from hwlicense.threads import share_out
from tests.packages import opened, pack


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))


def test_every_piece_once_and_neighbours_by_one_thread():
    taken, start = defaultdict(list), threading.Barrier(2)

    def worker():
        start.wait(10)  # so that both take part

        def handle(piece: int) -> None:
            taken[threading.get_ident()].append(piece)
            time.sleep(0.0005)

        return handle

    share_out(range(103), worker, run=4)
    assert len(taken) == 2
    assert sorted(piece for pieces in taken.values() for piece in pieces) == list(range(103))
    for pieces in taken.values():
        for at in range(0, len(pieces) - 4, 4):
            assert pieces[at] % 4 == 0
            assert pieces[at : at + 4] == list(range(pieces[at], pieces[at] + 4))


def test_two_threads_never_fill_one_huge_page(vendor, tmp_path, monkeypatch):
    """Both would clear it, and one of them in vain."""
    content = os.urandom((32 << 20) + 5)
    package, key, _ = pack(vendor, tmp_path, {"big": content}, chunk_size=1 << 20)
    filled, sealed = defaultdict(set), reading.PackageFile.sealed

    def watched(self, chunk, buffer):
        filled[chunk.key // 2].add(threading.get_ident())
        time.sleep(0.001)
        return sealed(self, chunk, buffer)

    monkeypatch.setattr(reading.PackageFile, "sealed", watched)
    with opened(vendor, package, key) as model:
        assert bytes(model.read("big")) == content
    assert len(set().union(*filled.values())) == 2
    assert all(len(threads) == 1 for threads in filled.values())


def test_the_first_error_ends_all_and_no_thread_stays():
    done = []

    def handle(piece: int) -> None:
        if piece == 5:
            raise OSError("piece 5")
        done.append(piece)
        time.sleep(0.0005)

    before = threading.active_count()
    with pytest.raises(OSError, match="piece 5"):
        share_out(range(1000), lambda: handle, run=4)
    assert len(done) < 100
    assert threading.active_count() == before


def test_no_thread_stays_however_often_it_is_interrupted():
    """What they work on is given back when this returns."""
    before, interrupts = threading.active_count(), []

    def interrupt(_signal: int, _frame: object) -> None:
        interrupts.append(1)
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    done: list[int] = []

    def handle(piece: int) -> None:
        until = time.monotonic() + 0.5
        while threading.current_thread() is not threading.main_thread() and time.monotonic() < until:
            time.sleep(0.01)
        done.append(piece)

    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            share_out(range(2), lambda: handle)
        assert threading.active_count() == before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert len(interrupts) > 2
    assert sorted(done) == [0, 1]


def test_an_interrupt_before_the_work_begins_ends_it(monkeypatch):
    starts = threading.Thread.start

    def interrupted(self) -> None:
        starts(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    done: list[int] = []

    def handle(piece: int) -> None:
        done.append(piece)
        time.sleep(0.001)

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        share_out(range(1000), lambda: handle)
    assert threading.active_count() == before
    assert len(done) < 100


def test_it_needs_no_file():
    """An application may have given up its rights, or have no descriptor left, when it reads a large member."""
    code = """
import os, resource
from hwlicense.threads import share_out
os.sched_getaffinity = lambda _: range(2)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
done = []
share_out(range(100), lambda: done.append)
print(len(done))
"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60).stdout == b"100\n"
