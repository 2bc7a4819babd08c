"""Looking for abnormal use of an open model: what the terms' monitor sees, and what it has found.

Each process looks at its own calls at once, and at those of all others whenever the state is written down. The state
is authenticated by a key that comes from the license secret; the account says which is the latest.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import msgspec

from hwlicense import storage
from hwlicense.core import monitoring
from hwlicense.core.account import Field
from hwlicense.core.durations import waiting
from hwlicense.core.errors import DamagedError, ExceededError, HwlicenseError, Reason, UsageError
from hwlicense.core.monitoring import Observation, State, Verdict
from hwlicense.device.locking import Turn
from hwlicense.device.records import CODE, Records, unchecked

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hwlicense.core.limits import Monitor
    from hwlicense.core.secret import Secret
    from hwlicense.device.tending import Tended

WRITTEN: Final = 60.0
"""Seconds between writings of the state, while nothing is found."""

MOST: Final = 4096
"""Calls that a process keeps for the next writing: more are looked at, and not told to others."""

_WAITING: Final = 64  # calls after which they are looked at at once
_LIMIT: Final = 512 << 10
_PURPOSE: Final = b"monitor"
_MILLION: Final = 1_000_000


class Watch:
    """The monitor of one open license in one process."""

    def __init__(self, path: Path, terms: Monitor, key: Secret, tended: Tended) -> None:
        """`key` is taken over, and wiped by `close`. Raises StorageError."""
        self._path, self._terms, self._records, self._tended = path, terms, Records(key), tended
        self._new_process()
        self._state = State()
        self._merge()

    def _new_process(self) -> None:
        self._turn = Turn()
        self._waiting: list[Observation] = []
        self._untold: list[Observation] = []
        self._written = time.monotonic()

    def after_fork(self) -> None:
        """In a forked child: what the parent has seen, the parent tells."""
        self._new_process()

    def observation(self, now: int, count: int, features: Sequence[float] | None, label: int) -> Observation:
        """A call as it would be seen, `now` in nanoseconds of the meter's clock. Raises UsageError."""
        if type(label) is not int or label < 0:
            raise UsageError(Reason.USAGE, f"{label!r} is no label of a class.", "Give a number from 0 on.")
        seen = None if features is None else monitoring.check_features(self._terms, features)
        return Observation(now // _MILLION, count, seen, label)

    def saw(self, observation: Observation) -> None:
        """The call was granted."""
        self._waiting.append(observation)
        if len(self._waiting) == _WAITING:
            self._tended.wake()
        elif len(self._waiting) >= MOST:  # nobody looks after it: so be it here
            self._look()

    def throttled(self, now: int) -> int:
        """Until when use is throttled, `now` and then in nanoseconds of the meter's clock; 0 where it is not."""
        until = (self.verdict.until or 0) * _MILLION
        return until if self.verdict.action == "throttle" and until > now else 0

    def refusal(self, now: int) -> ExceededError | None:
        """Why use is denied now; None if it is not."""
        return denied(self.verdict, now // _MILLION)

    def present(self) -> Verdict:
        """What has been found and is in force now."""
        self._look()
        return self.verdict

    def tend(self) -> None:
        """Look at what came, and write the state down now and then. Raises HwlicenseError."""
        before = self.verdict.action
        self._look()
        found = self.verdict.action != before
        if self._untold and (found or time.monotonic() - self._written > WRITTEN):
            self._merge()

    def close(self) -> None:
        """Tell what was seen, and wipe the key. Raises HwlicenseError."""
        try:
            self._look()
            if self._untold:
                self._merge()
        finally:
            self._records.close()

    def _look(self) -> None:
        with self._turn:
            waiting, self._waiting = self._waiting, []
            if waiting:
                self._state = monitoring.fold(self._terms, self._state, waiting)
                self._untold = [*self._untold, *waiting][-MOST:]
            self._judge()

    def _judge(self) -> None:
        now = self._tended.now() // _MILLION
        self.verdict = monitoring.verdict(self._terms, self._state, now)

    def _merge(self) -> None:
        """What all processes have seen, written down."""
        with self._turn, self._tended.writing():
            account, now = self._tended.snapshot()
            number, state = self._read(account.words[Field.MONITOR], now // _MILLION)
            if self._untold:
                state = monitoring.fold(self._terms, state, self._untold)
                # What this process found stays found, though others' calls lie between its own now.
                found = {name: max(end, state.found.get(name, 0)) for name, end in self._state.found.items()}
                state = msgspec.structs.replace(state, found={**state.found, **found})
                storage.atomic_write(self._path, self._records.made(_PURPOSE, number + 1, state.encode()), 0o600)
                with self._tended.sharing() as (present, _):
                    present.words[Field.MONITOR] = number + 1
            self._state, self._untold, self._written = state, [], time.monotonic()
            self._judge()

    def _read(self, least: int, now: int) -> tuple[int, State]:
        """The state on the disk. One that is older than the account says, or gone, has found all that it could find."""
        try:
            if not least and not self._path.exists():
                return 0, State()
            record = self._records.opened(_PURPOSE, storage.read_limited(self._path, _LIMIT))
            if record and record[0] >= least:
                return record[0], State.decode(record[1])
        except (DamagedError, UsageError):
            pass  # as if it had been put back
        return least, _all_found(self._terms, now)


def denied(verdict: Verdict, now: int) -> ExceededError | None:
    """What is said where use is denied `now`, in milliseconds; None where it is not."""
    if verdict.until is None or verdict.action != "deny" or now >= verdict.until:
        return None
    wait = (verdict.until - now) / 1000
    what = f"Use is abnormal ({', '.join(verdict.detectors)}), so the license denies it for {waiting(wait)}."
    hint = "Wait, or ask the vendor for a revision with other terms."
    return ExceededError(Reason.ABNORMAL_USE, what, hint, wait)


def recorded(path: Path, terms: Monitor, least: int, now: int) -> State:
    """What the monitor has written down, unchecked: for reports. `least` and `now` (milliseconds) are the account's.

    What is older than the account says, or gone, counts as it will when the license is opened.
    """
    try:
        record = unchecked(storage.read_limited(path, _LIMIT)[:-CODE])
        if record and record[0] >= least:
            return State.decode(record[1])
    except HwlicenseError as error:
        if not least and error.reason == Reason.FILE_ABSENT:
            return State()
    return _all_found(terms, now)


def _all_found(terms: Monitor, now: int) -> State:
    until = now + terms.lasting * 1000
    return State(found={"regularity": until, "distances": until})


__all__ = ["Verdict", "Watch", "denied", "recorded"]
