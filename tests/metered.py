"""A metered license on a device whose time stands still until it is told: the real account, over a simulated anchor."""

from __future__ import annotations

import datetime
import shutil
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hwlicense.core.documents import Grant, PackageReference
from hwlicense.core.errors import HwlicenseError, Reason
from hwlicense.core.hardware import Reading
from hwlicense.core.limits import Limits, Rate, Use
from hwlicense.core.secret import Secret
from hwlicense.device import clock, recovering, tending
from hwlicense.device import metering as metering_module
from hwlicense.device.metering import Metering

if TYPE_CHECKING:
    from pathlib import Path

SECOND = 10**9
ISSUED = datetime.date(2026, 6, 1)
NOON = 1_780_315_200  # of the day of issue


def grant(use: Use, revision: int = 1, **more) -> Grant:
    given = {"not_before": None, "not_after": None} | more
    return Grant(
        license="0" * 32,
        revision=revision,
        vendor="0" * 64,
        licensee="Acme Robotics",
        product="label-reader",
        generation=1,
        packages=[PackageReference("reader", "1.0", "0" * 32)],
        issued=ISSUED,
        pcrs=[],
        use=use,
        **given,
    )


def limited(*rates: tuple[int, int], **limits) -> Use:
    return Use(limits=Limits(rates=[Rate(*rate) for rate in rates], **limits))


class Machine:
    """Clocks and an anchor. Times in nanoseconds, but `wall` (seconds) and `lapse` (milliseconds)."""

    def __init__(self, lapse: int = 4096, *, anchored: bool = True) -> None:
        self.lapse, self.anchored = lapse, anchored
        self.wall, self.boot, self.on, self.boots, self.steps = float(NOON), 30 * SECOND, 0, 1, 0
        self.clock_base = 0  # powered-on time of former boots that the anchor remembers
        self.rtc = True
        self.failing: HwlicenseError | None = None

    @property
    def clock(self) -> int:
        return (self.clock_base + self.boot) // 1_000_000

    def read(self) -> Reading:
        if self.failing:
            raise self.failing
        return Reading(self.steps, self.clock, self.boot // 1_000_000, self.lapse)

    def step(self) -> Reading:
        if self.failing:
            raise self.failing
        self.steps += 1
        return self.read()

    @contextmanager
    def together(self):
        yield self

    def passes(self, seconds: float) -> None:
        self.boot += int(seconds * SECOND)
        self.wall += seconds

    def restarts(self, off: float = 60.0, *, cut: bool = False) -> None:
        """Off for so many seconds. A power cut may take as much from the clock as it had not saved yet."""
        lost = self.clock % self.lapse if cut else 0
        self.clock_base, self.boot = self.clock_base + self.boot - lost * 1_000_000, 20 * SECOND
        self.wall = self.wall + off + 20 if self.rtc else 20.0
        self.boots += 1

    @contextmanager
    def running(self, patch):
        """With the project's clocks replaced by these, and no thread."""
        with patch.context() as patched:
            patched.setattr(clock, "wall", lambda: int(self.wall))
            patched.setattr(clock, "boot_time", lambda: self.boot)
            patched.setattr(clock, "running_time", lambda: self.boot)
            patched.setattr(clock, "boot_identifier", lambda: (self.boots, self.boots))
            patched.setattr(tending.Tended, "start", lambda _tended: None)
            patched.setattr(time, "monotonic", lambda: self.boot / SECOND)
            patched.setattr(time, "sleep", self.passes)
            patched.setattr(metering_module, "clock_gettime_ns", lambda _clock: self.boot)
            yield self

    def open(self, state: Path, granted: Grant, reset=None) -> Metering:
        folder = recovering.account_folder(state, granted)
        key = Secret(bytearray(b"k" * 32))
        anchor = self if self.anchored else None
        return Metering(granted, recovering.open_account(folder, granted, key, anchor, reset))


def abandon(metering: Metering) -> None:
    """As SIGKILL would: nothing is written any more, and the kernel closes what was open."""
    metering._tended.closed = True
    metering._tended._ledger.close()


def spend(metering: Metering, count: int, each: int = 1) -> int:
    """As many as are granted now, in steps of `each`; the account is looked after where it must be."""
    done = 0
    for _ in range(400):
        try:
            while done < count:
                metering.spend(each)
                done += each
        except HwlicenseError as error:
            if error.reason != Reason.LEASE_PENDING:
                break
            metering._tended.tend()
    return done


def hold(metering: Metering, count: int, seconds: int):
    """A session, with the account looked after before."""
    metering._tended.ask(count)
    metering._tended.tend()
    return metering.hold(count, seconds)


def save(state: Path, where: Path) -> None:
    shutil.rmtree(where, ignore_errors=True)
    if state.exists():
        shutil.copytree(state, where, ignore=shutil.ignore_patterns("join"))


def restore(state: Path, where: Path) -> None:
    shutil.rmtree(state, ignore_errors=True)
    if where.exists():
        shutil.copytree(where, state)
