"""What power cuts and kills cost of an account, and how often it writes: in simulated time, with the real account."""

from __future__ import annotations

import multiprocessing
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from benchmarks.measure import Failed
from hwlicense.core.account import Field
from hwlicense.core.errors import ExceededError
from hwlicense.device.ledger import Ledger
from tests.metered import Machine, abandon, grant, limited, spend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hwlicense.device.metering import Metering

RATE: Final = 30
_RECORD: Final = 4096
_DAY: Final = 86400


class _Scene:
    """A device with an account in a folder of its own, and how many records were written."""

    def __init__(self, machine: Machine, folder: Path, limits: list[tuple[int, int]]) -> None:
        self.machine, self._folder = machine, folder
        self.records = 0
        self._grant = grant(limited(*limits, inferences=10**12))

    def open(self) -> Metering:
        return self.machine.open(self._folder, self._grant)

    def passes(self, metering: Metering, seconds: int) -> None:
        """So much time, and what the account's own thread does then."""
        self.machine.passes(seconds)
        metering._tended.tend()  # noqa: SLF001  # no thread runs in simulated time

    def words(self, metering: Metering) -> Any:  # noqa: ANN401  # an array of numbers
        return metering._tended.snapshot()[0].words  # noqa: SLF001  # what no report shows


@contextmanager
def _scene(limits: list[tuple[int, int]], lapse: int = 4096) -> Iterator[_Scene]:
    record = Ledger._write  # noqa: SLF001

    def counted(ledger: Ledger, raw: bytes) -> None:
        scene.records += 1
        record(ledger, raw)

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "_write", counted)
        with Machine(lapse).running(patch) as machine:
            scene = _Scene(machine, Path(folder), limits)
            yield scene


def year(days: int, step: int = 5) -> dict[str, Any]:
    """A year of days of eight hours' use, each ended by a power cut."""
    chance, spent = random.Random(3), 0  # noqa: S311
    with _scene([(1000, 5), (200_000_000, _DAY)]) as scene:
        for _ in range(days):
            metering = scene.open()
            until = scene.machine.wall + 8 * 3600 + chance.uniform(0, 600)
            while scene.machine.wall < until:
                spent += spend(metering, RATE * step, RATE * step)
                scene.passes(metering, step)
            abandon(metering)
            scene.machine.restarts(16 * 3600, cut=True)
        metering = scene.open()
        words = scene.words(metering)
        used, lost = words[Field.USED], words[Field.LOST]
        abandon(metering)
        if used - lost > spent or used < spent:
            raise Failed("the account is wrong")
        return {
            "days": days,
            "inferences": spent,
            "lost": lost,
            "lost a cut": lost / days,
            "seconds of use a cut": lost / days / RATE,
            "part": lost / spent,
            "records a day": scene.records / days,
            "bytes synced a day": scene.records / days * _RECORD,
            "steps of the anchor a day": scene.machine.steps / days,
        }


class _Crash(NamedTuple):
    name: str
    lapse: int = 4096  # milliseconds
    killed: int | None = None  # seconds until it is opened again; None: the power is cut
    idle: int = 0  # seconds before


CRASHES: Final = (
    _Crash("power cut, the TPM keeps its clock each 4 s"),
    _Crash("power cut, each minute", lapse=60_000),
    _Crash("power cut, each ten minutes", lapse=600_000),
    _Crash("killed, opened again after 10 s", killed=10),
    _Crash("killed, after a minute", killed=60),
    _Crash("killed, after ten minutes", killed=600),
    _Crash("power cut after a minute without use", idle=60),
    _Crash("power cut after 5 min without use", idle=300),
)


def cost(crash: _Crash, count: int) -> dict[str, float]:
    """Seconds of use, at 30 inferences a second, that crashes at random moments cost."""
    chance, lost = random.Random(4), []  # noqa: S311
    with _scene([(1_000_000, 60)], crash.lapse) as scene:
        scene.machine.passes(3600)
        for _ in range(count):
            metering = scene.open()
            before, end = scene.words(metering)[Field.LOST], scene.machine.wall + 600 + chance.uniform(0, 1200)
            while scene.machine.wall < end:
                spend(metering, RATE)
                scene.passes(metering, 1)
            for _ in range(crash.idle):
                scene.passes(metering, 1)
            abandon(metering)
            if crash.killed is None:
                scene.machine.restarts(60, cut=True)
            else:
                scene.machine.passes(crash.killed)
            metering = scene.open()
            lost.append((scene.words(metering)[Field.LOST] - before) / RATE)
            metering.close()
    lost.sort()
    return {"least": lost[0], "median": lost[count // 2], "most": lost[-1]}


USES: Final = {
    "none, model open": (0, _DAY),
    "1 each 5 s": (1, 5),
    "1 each 15 s": (1, 15),
    "30 each second": (30, 1),
    "10 each 30 s": (10, 30),
    "40 each minute": (40, 60),
    "60 each 12 s": (60, 12),
    "200 each 10 min": (200, 600),
}
"""How many inferences at once, and how many seconds apart."""


def wear(count: int, apart: int) -> dict[str, float]:
    """Leases and records of a day of use."""
    with _scene([(10**8, _DAY)]) as scene:
        metering = scene.open()
        before = scene.machine.steps
        for second in range(_DAY):
            for _ in range(count if second % apart == 0 else 0):
                _spend(scene, metering)
            scene.passes(metering, 1)
        found: dict[str, float] = {"leases": scene.machine.steps - before, "records": scene.records}
        abandon(metering)
        return found


def measure(days: int, count: int) -> dict[str, Any]:
    """All of it, side by side: nothing here is timed, and the simulated device has a clock of its own."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        cuts = pool.submit(year, days)
        lost = {crash.name: pool.submit(cost, crash, count) for crash in CRASHES}
        worn = {name: pool.submit(wear, *use) for name, use in USES.items()}
        return {
            "power cuts": cuts.result(),
            "cost of a crash": {name: one.result() for name, one in lost.items()},
            "wear": {name: one.result() for name, one in worn.items()},
        }


def _spend(scene: _Scene, metering: Metering) -> None:
    try:
        metering.spend()
    except ExceededError:
        scene.passes(metering, 0)
        with suppress(ExceededError):
            metering.spend()
