"""What spending costs: by threads and processes, beside durable counters, and at 1 kHz over slow TPMs."""

from __future__ import annotations

import os
import sqlite3
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

import hwlicense
from benchmarks.measure import Failed
from benchmarks.use import Limited, fork, metering, spend_on
from hwlicense.core.account import Field

if TYPE_CHECKING:
    from benchmarks.scene import Scene

FREE: Final = 'rates = ["1000000000/second", "10000000000/minute", "1000000000000/day"]\n'
THREADS: Final = (1, 8)
PROCESSES: Final = (1, 2, 4, 8)
GOAL: Final = 1000  # nanoseconds: "well under a microsecond" is promised
_MILLION: Final = 1_000_000


def measure(scene: Scene, runs: int, seconds: float) -> dict[str, Any]:
    """Nanoseconds a use (of all together), and beside them a counter in SQLite and one in the TPM."""
    license_ = Limited(scene, "costs", FREE)
    found: dict[str, Any] = {}
    with license_.open() as model:
        spend_on(model, 3_000_000)
        found["threads"] = {str(threads): _median(model, threads, 1, runs) for threads in THREADS}
        found["processes"] = {str(processes): _median(model, 1, processes, runs) for processes in PROCESSES}
    found["empty call"] = _empty()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as disk:  # memory has nothing to sync
        found["SQLite, synced"] = _sqlite(Path(disk) / "counter.db")
    found["NV increment"] = _increments(scene, license_)
    found["at 1 kHz"] = _steady(scene, license_, seconds)
    return found


def _median(model: hwlicense.Model, threads: int, processes: int, runs: int) -> float:
    return statistics.median(_nanoseconds(model, threads, processes) for _ in range(runs))


def _nanoseconds(model: hwlicense.Model, threads: int, processes: int, count: int = 1_000_000) -> float:
    each = count // threads // processes

    def work() -> None:
        workers = [threading.Thread(target=spend_on, args=(model, each)) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    begun = time.perf_counter()
    if processes == 1:
        work()
    else:
        for pid in [fork(work) for _ in range(processes)]:
            os.waitpid(pid, 0)
    return (time.perf_counter() - begun) / count * 1e9


def _empty() -> float:
    def nothing(count: int = 1) -> None:
        """Nothing."""

    begun = time.perf_counter()
    for _ in range(_MILLION):
        nothing()
    return (time.perf_counter() - begun) * 1e3


def _sqlite(path: Path, count: int = 300) -> float:
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA synchronous = FULL")
    database.execute("CREATE TABLE counter (used INTEGER)")
    database.execute("INSERT INTO counter VALUES (0)")
    begun = time.perf_counter()
    for _ in range(count):
        database.execute("UPDATE counter SET used = used + 1")
    passed = time.perf_counter() - begun
    database.close()
    return passed / count * 1e9


def _increments(scene: Scene, license_: Limited, count: int = 100) -> float:
    """A step of the anchor for each use: what a count in the TPM alone would cost, on a simulated one."""
    with license_.open(scene.tpm.tcti) as model:
        anchor = metering(model)._tended._anchor  # noqa: SLF001
        if anchor is None:
            raise Failed("the license is not anchored")
        begun = time.perf_counter()
        for _ in range(count):
            anchor.step()
        return (time.perf_counter() - begun) / count * 1e9


def _steady(scene: Scene, license_: Limited, seconds: float) -> dict[str, float]:
    """Microseconds a use in a 1 kHz loop: half of the time over a TPM that is slow, and half over one that hangs."""
    taken: list[float] = []
    refused = 0
    with scene.tpm.tapped(record=False) as wire, license_.open(wire.tcti) as model:
        spend_on(model, 20_000)
        wire.delay(0.3, times=1 << 30)
        begun = time.monotonic()
        hung = False
        for tick in range(int(seconds * 1000)):
            if not hung and time.monotonic() - begun > seconds / 2:
                hung = True
                wire.delay(3600, times=1 << 30)
            before = time.perf_counter()
            try:
                model.spend()
            except hwlicense.ExceededError:
                refused += 1
            taken.append(time.perf_counter() - before)
            time.sleep(max(0.0, begun + (tick + 1) / 1000 - time.monotonic()))
        steps = metering(model)._tended.snapshot()[0].words[Field.SERIAL]  # noqa: SLF001
    times = np.array(taken) * 1e6
    named = {"median": 50.0, "p99": 99.0, "p99.99": 99.99}
    found = {name: float(np.percentile(times, rank)) for name, rank in named.items()}
    return found | {"most": float(times.max()), "uses": len(taken), "refused": refused, "serial": steps}


def table(found: dict[str, Any]) -> list[str]:
    """For a person."""
    one = found["processes"]["1"]
    lines = [f"{'nanoseconds a use':<34}{'median':>14}{'to one':>12}"]
    for name in ("threads", "processes"):
        lines += [f"{f'{name}: {many}':<34}{cost:>14,.0f}{cost / one:>11,.2f}x" for many, cost in found[name].items()]
    for name in ("empty call", "SQLite, synced", "NV increment"):
        lines.append(f"{name:<34}{found[name]:>14,.0f}{found[name] / one:>11,.2f}x")
    steady = ", ".join(f"{name} {value:,.1f}" for name, value in found["at 1 kHz"].items())
    met = "" if one < GOAL else "  missed"
    return [*lines, f"at 1 kHz, microseconds: {steady}", f"goal of one process: under {GOAL:,} ns{met}"]
