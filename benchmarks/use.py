"""Limits of use: whether they hold under load, sudden deaths and power cuts."""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

import hwlicense
from benchmarks import crashes
from benchmarks.measure import Failed
from hwlicense.core.account import Field
from hwlicense.device import instances

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.scene import Scene
    from hwlicense.device.metering import Metering

TERMS: Final = 'licensee = "Acme Robotics"\nproduct = "reader"\n[require]\nanchor = true\n[limits]\n'
AT_ONCE: Final = 4
SUDDEN: Final = 0.02
REFUSED: Final = 7
_NUMBER: Final = struct.Struct("<q")


class Limited:
    """A license with limits for the scene's TPM, in a home of its own."""

    def __init__(self, scene: Scene, name: str, limits: str) -> None:
        self.scene, self.home = scene, scene.folder / f"home-{name}"
        request, licensed, table = (scene.folder / f"{name}.{end}" for end in ("hwreq", "hwlic", "toml"))
        table.write_text(TERMS + limits)
        source = scene.folder / "weights.bin"
        source.write_bytes(bytes(4096))
        if not scene.package.exists():
            scene.hwlicense(
                "vendor", "pack", "--vendor", scene.vendor, "--name", "m", "--version", "1", "-o", scene.package, source
            )
        scene.hwlicense("device", "enroll", "--home", self.home, "--counted", "-o", request)
        issue = ("--request", request, "--package", scene.package, "--terms", table, "-o", licensed)
        scene.hwlicense(
            "vendor", "issue", "--vendor", scene.vendor, *issue, "--ek-root", f"virtual={scene.tpm.ek_root}"
        )
        scene.hwlicense("device", "trust", "--home", self.home, scene.vendor / "vendor.pub.json")
        scene.hwlicense("device", "install", "--home", self.home, licensed)

    def open(self, tcti: str | None = None) -> hwlicense.Model:
        """In this process."""
        return hwlicense.open(
            self.scene.package, vendor=self.scene.vendor_text, home=self.home, tpm=tcti or self.scene.tpm.tcti
        )

    def used(self) -> tuple[int, int]:
        """What the account says was booked, and what of it was lost."""
        with self.open() as model:
            words = metering(model)._tended.snapshot()[0].words  # noqa: SLF001  # what no report shows to the last one
            return words[Field.USED], words[Field.LOST]


def metering(model: hwlicense.Model) -> Metering:
    """What holds the model to its limits."""
    found = model._metering  # noqa: SLF001  # as above
    if found is None:
        raise Failed("the model is not metered")
    return found


class Counters:
    """Numbers that forked processes share."""

    def __init__(self, count: int) -> None:
        self._map = mmap.mmap(-1, 8 * count)

    def add(self, place: int, number: int = 1) -> None:
        """Each place has one writer."""
        before = _NUMBER.unpack_from(self._map, 8 * place)[0]
        _NUMBER.pack_into(self._map, 8 * place, before + number)

    @property
    def total(self) -> int:
        """Of all."""
        return sum(value for (value,) in _NUMBER.iter_unpack(self._map[:]))


def fork(work: Callable[[], None]) -> int:
    """A process that does that and nothing else."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    with suppress(BaseException):
        work()
        status = 0
    os._exit(status)


def spend_on(model: hwlicense.Model, count: int) -> None:
    """So many, waiting where that is asked for."""
    for _ in range(count):
        while True:
            try:
                model.spend()
            except hwlicense.ExceededError as error:
                if error.wait is None:
                    raise
                time.sleep(min(error.wait, 0.01))
            else:
                break


def kills(scene: Scene, count: int, seed: int = 1) -> dict[str, Any]:
    """Processes that open the license and spend, each killed at a random moment; what was granted, spent and lost."""
    license_ = Limited(scene, "kills", 'inferences = 1000000000000\nrates = ["1000000000/second", "50000000000/day"]\n')
    granted, damaged, chance = Counters(count + 8), 0, random.Random(seed)  # noqa: S311
    with license_.open() as model:
        model.spend()

    def work(place: int) -> None:
        with license_.open() as mine:
            while True:
                try:
                    mine.spend()
                except hwlicense.ExceededError:
                    time.sleep(0.0005)
                else:
                    granted.add(place)
                    time.sleep(0.0002)

    alive: dict[int, float] = {}
    done, opened = 0, 0
    while done < count:
        while len(alive) < AT_ONCE and opened < count:
            alive[fork(partial(work, opened))] = time.monotonic() + chance.uniform(0, 0.3)
            opened += 1
        pid = min(alive, key=alive.__getitem__)
        time.sleep(max(0.0, alive.pop(pid) - time.monotonic()))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        damaged += not os.WIFSIGNALED(status)  # it had ended by itself: something was refused
        done += 1
    used, lost = license_.used()
    seen = granted.total + 1
    return {
        "kills": done,
        "granted": seen,
        "spent": used,
        "lost": used - seen,
        "charged for crashes": lost,
        "gained": max(0, seen - used),
        "ended by themselves": damaged,
    }


PROMPT: Final = 1_000_000
RATES: Final = [(100_000, 1), (270_000, 3), (2_400_000, 30)]


def _timed(model: hwlicense.Model, count: int, path: Path) -> None:
    """Spend so many, and write down between which two times each was granted."""
    times = np.zeros((count, 2), np.int64)
    for at in range(count):
        while True:
            before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            try:
                model.spend()
            except hwlicense.ExceededError as error:
                time.sleep(min(error.wait or 0.01, 0.05))
            else:
                break
        times[at] = before, time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    times.tofile(path)


def soak(scene: Scene, count: int) -> dict[str, Any]:
    """Many inferences with several rates over four processes of two threads: the largest excess over any window."""
    texts = ", ".join(f'"{number}/{seconds}s"' for number, seconds in RATES)
    license_ = Limited(scene, "soak", f"rates = [{texts}]\n")
    each, parts = count // 8, [scene.folder / f"times-{place}" for place in range(8)]

    def process(number: int) -> None:
        with license_.open() as model:
            pair = parts[2 * number : 2 * number + 2]
            threads = [threading.Thread(target=_timed, args=(model, each, path)) for path in pair]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    begun = time.monotonic()
    for pid in [fork(partial(process, number)) for number in range(4)]:
        if os.waitpid(pid, 0)[1]:
            raise Failed("a process of the soak failed")
    passed = time.monotonic() - begun
    pairs = np.concatenate([np.fromfile(path, np.int64).reshape(-1, 2) for path in parts])
    # Of calls that were held up by other processes it is not known when they were granted: they are left out.
    times = np.sort(pairs[pairs[:, 1] - pairs[:, 0] <= PROMPT][:, 1])
    found: dict[str, Any] = {"inferences": len(pairs), "held up": len(pairs) - len(times), "seconds": passed}
    for number, seconds in RATES:
        inside = np.arange(len(times)) + 1 - np.searchsorted(times, times - (seconds * 10**9 - PROMPT), side="right")
        found[f"most in any {seconds} s, of {number}"] = int(inside.max())
        found[f"excess in any {seconds} s"] = max(0, int(inside.max()) - number)
    return found


def places(  # noqa: C901  # one loop that watches twenty processes
    scene: Scene, seconds: float, limit: int = 3, count: int = 20, seed: int = 5
) -> dict[str, Any]:
    """Twenty processes that start, end and are killed at random: the most that ever held a place."""
    folder, chance = scene.folder / "places", random.Random(seed)  # noqa: S311
    folder.mkdir()
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    holding: dict[int, bool] = {}
    worst, held, refused, killed, end = 0, 0, 0, 0, time.monotonic() + seconds

    def work() -> None:
        try:
            place = instances.Instance(folder, limit)
        except hwlicense.ExceededError:
            os._exit(REFUSED)
        os.write(ends[1], _NUMBER.pack(os.getpid()))
        time.sleep(chance.uniform(0, 2))
        os.write(ends[1], _NUMBER.pack(-os.getpid()))
        place.close()

    while time.monotonic() < end:
        while len(holding) < count:
            chance.random()
            holding[fork(work)] = False
        time.sleep(0.002)
        with suppress(BlockingIOError):
            for (number,) in _NUMBER.iter_unpack(os.read(ends[0], 1 << 13)):
                held += number > 0
                if abs(number) in holding:  # and not ended since
                    holding[abs(number)] = number > 0
        worst = max(worst, sum(holding.values()))
        for pid in list(holding):
            if holding[pid] and chance.random() < SUDDEN:
                os.kill(pid, signal.SIGKILL)
                killed += 1
                holding[pid] = False
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone:
                refused += os.WIFEXITED(status) and os.WEXITSTATUS(status) == REFUSED
                del holding[pid]
    for pid in holding:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return {"limit": limit, "held a place": held, "refused": refused, "killed": killed, "most at once": worst}


def measure(scene: Scene, options: Any) -> dict[str, Any]:  # noqa: ANN401  # the program's options
    """All of it; each part is shown as soon as it is known."""
    parts: list[Callable[[], dict[str, Any]]] = [
        lambda: {"kills": kills(scene, options.kills)},
        lambda: {"soak": soak(scene, options.inferences)},
        lambda: crashes.measure(options.cuts, options.crashes),
        lambda: {"instances": places(scene, min(60.0, options.seconds))},
    ]
    found: dict[str, Any] = {}
    for part in parts:
        some = part()
        found |= some
        print(*table(some), sep="\n", file=sys.stderr, flush=True)
    return found


def table(found: dict[str, Any]) -> list[str]:
    """For people."""
    lines = []
    for name, part in found.items():
        lines.append(name)
        for key, value in part.items():
            if isinstance(value, dict):
                shown = ", ".join(f"{inner} {number:,.1f}" for inner, number in value.items())
            else:
                shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value < 1 else f"{value:,.1f}"
            lines.append(f"  {key:<34} {shown}")
    return lines
