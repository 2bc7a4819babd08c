"""Recordings of what a model was given and what it said: `model.outputs(folder)`.

An application's thread makes a record, in memory, and goes on; one thread of the recording's own writes and signs. So
a slow disk, a slow TPM and a full disk are waited for by nobody but who asks to (`flush`, `close`).
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Self

from hwlicense.core.chain import Chain, Checkpoint, Heartbeat, Input, Output
from hwlicense.core.errors import ClosedError, HwlicenseError, Reason, StorageError, UsageError
from hwlicense.core.wording import quantity
from hwlicense.device import clock
from hwlicense.device.payloads import encoded, identified
from hwlicense.threads import begin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hwlicense.core.chain import Certificate, Closing, Sensor
    from hwlicense.device.log_files import LogFiles

_GATHERING: Final = 0.002
"""Seconds between two writes, so that records gather: what SIGKILL loses is about that, and one write."""

_AGAIN: Final = 1.0
"""Seconds until a disk that failed is tried again."""

_PATIENCE: Final = 30.0
"""Seconds for which `close` waits for a disk that does not answer."""

_REFUSED: Final = 5.0
"""Seconds for which it tries one that refuses, as a full disk does."""

Full = Literal["refuse", "drop"]


class Policy(NamedTuple):
    """How a recording is kept. Sizes in bytes, times in seconds; see `Recorder`, which has the defaults."""

    rotate: int | None
    every: int
    interval: float
    heartbeat: int
    full: Full
    buffer: int


class Recording:
    """One recording, until `close`. Threads share it; forked children have no part in it. A context manager.

    A record is in memory when `append` returns, in the kernel's hands a few milliseconds later, and signed at the next
    checkpoint. `problem` is what keeps the disk from taking records now, None where nothing does.
    """

    def __init__(
        self,
        chain: Chain,
        files: LogFiles,
        policy: Policy,
        sensors: dict[str, Sensor],
        certify: Callable[[Closing], Certificate],
        ended: Callable[[bytes | None], None],
        left: Callable[[], None],
    ) -> None:
        """The chain has its start, which the files hold. `ended` is called once, with the last digest.

        `left` is called in forked children.
        """
        self._chain, self._files, self._policy, self._sensors = chain, files, policy, sensors
        self._certify, self._ended, self._left = certify, ended, left
        self._dropped, self._part, self._part_total = 0, 1, 0
        self._written = chain.last.total
        self._closing = self._finished = self._foreign = self._busy = False
        self.problem: HwlicenseError | None = None
        self._refusal: HwlicenseError | None = None
        self._over = threading.Lock()  # taken by who lets log and hardware go
        self._renew()
        self._ending = 0.0
        begin("outputs", self._write_on)
        _open.add(self)

    def append(
        self,
        payload: object,
        *,
        input: bytes | None = None,  # noqa: A002  # the word of the field
        digest: bytes | None = None,
        sensor: str | None = None,
        signature: bytes = b"",
    ) -> int:
        """Record an output; returns its number. Touches neither disk nor hardware.

        `payload` is bytes, or what JSON can hold, 64 KiB at most. `input` is what it came from, or `digest` its
        SHA-256; `signature` over `input` by one of the recording's sensors is verified first. Where the buffer is full,
        raises StorageError OUTPUTS_FULL, or with full="drop" returns -1 and counts it in the chain.
        Raises DamagedError SIGNATURE_INVALID, UsageError, ClosedError.
        """
        return self._append(Output, payload, input, digest, sensor, signature)

    def append_input(
        self,
        input: bytes | None = None,  # noqa: A002  # the word of the field
        payload: object = None,
        *,
        digest: bytes | None = None,
        sensor: str | None = None,
        signature: bytes = b"",
    ) -> int:
        """Record that an input came, by its SHA-256, as `append`. `payload` says more about it."""
        return self._append(Input, payload, input, digest, sensor, signature)

    def flush(self, timeout: float | None = None) -> None:
        """Sign all that was appended, and wait until it is as safe as the recording's `sync` asks.

        Raises StorageError where the disk does not take it within `timeout` seconds, ClosedError.
        """
        with self._turn():
            self._check_open()
            self._note_dropped()
            if self._chain.last.closed < self._chain.last.number:
                self._chain.close_until_now(Checkpoint, *now())
            target = self._chain.last.number
        self._wake.set()
        self._wait(target, timeout)

    def close(self) -> None:
        """Write and sign what is left, have the hardware certify the count, and end. Again, it does nothing.

        Raises StorageError where the disk does not take it; else HardwareError or RefusedError where the hardware does
        not certify: then the end says so. Where a signal interrupts it, it waits no longer for the disk, or, before the
        hardware has answered, may be called again.
        """
        if self._foreign or self._over.locked() or not self._end():
            return
        try:
            self._await_writer(_PATIENCE + _AGAIN)
        except BaseException:  # of a signal: what is being written is the last
            self._ending -= _PATIENCE
            self._await_writer(_AGAIN)
            raise
        finally:
            self._let_go()
        if self._files.durable < self._chain.last.number:
            raise self._not_taken(self._chain.last.number)
        if self._refusal:
            raise self._refusal

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    # ---- making records

    def _append(
        self,
        kind: type[Output | Input],
        payload: object,
        input_: bytes | None,
        digest: bytes | None,
        sensor: str | None,
        signature: bytes,
    ) -> int:
        digest, signed = identified(self._sensors, input_, digest, sensor, signature)
        json, data = encoded(payload)
        with self._turn():
            self._check_open()
            chain = self._chain
            if chain.last.total - self._written > self._policy.buffer:
                return self._refuse()
            if self._dropped:
                self._note_dropped()
            if self._policy.rotate and chain.last.total - self._part_total > self._policy.rotate:
                self._part, self._part_total = self._part + 1, chain.last.total
                chain.begin_part(self._part, *now())
            number = chain.last.number
            chain.add(kind, *now(), json=json, data=data, input=digest, sensor=signed)
        if not self._wake.is_set():
            self._wake.set()
        return number

    def _refuse(self) -> int:
        if self._policy.full == "drop":
            self._dropped += 1
            return -1
        why = f" {self.problem.what}" if self.problem else " The disk is slower than the records."
        hint = self.problem.hint if self.problem else "Record less, give a larger buffer=, or full='drop'."
        raise StorageError(Reason.OUTPUTS_FULL, f"The buffer of the recording is full.{why}", hint)

    def _note_dropped(self) -> None:
        if self._dropped:
            self._chain.gap(self._dropped, *now())
            self._dropped = 0

    def _check_open(self) -> None:
        if self._foreign:
            what = "The recording is of the process that this one was forked from."
            raise UsageError(Reason.USAGE, what, "Begin another one here, in a log of its own (name=).")
        if self._closing:
            raise ClosedError(Reason.MODEL_CLOSED, "The recording was closed.", "Begin another one: model.outputs().")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One thread at a time. A signal handler cannot wait for its own thread: it is refused."""
        with self._lock:
            if self._busy:
                what = "The recording is in the middle of a record of this very thread: a signal handler came between."
                raise UsageError(Reason.USAGE, what, "Let the handler set a flag, and record when it has returned.")
            try:
                self._busy = True
                yield
            finally:
                self._busy = False

    # ---- the end

    @property
    def _stopping(self) -> bool:
        return self._chain.last.key is None

    def _end(self) -> bool:
        """Give the chain its end, once. False where another thread is at it."""
        mine, certificate, refusal = False, None, None
        try:
            with self._turn():
                if self._closing:
                    return self._stopping
                self._note_dropped()
                mine = self._closing = True  # the chain stays as it is from here on
                closing = self._chain.closing()
            try:
                certificate = self._certify(closing)
            except HwlicenseError as error:
                refusal = error
            with self._turn():
                self._refusal, self._ending = refusal, time.monotonic()
                self._chain.end(certificate, str(refusal.reason) if refusal else None, *now())
        finally:
            if mine:
                self._closing = self._stopping  # else a signal came: it may be closed again
        return True

    def _await_writer(self, seconds: float) -> None:
        self._stop.set()
        self._wake.set()
        with self._done:
            self._done.wait_for(lambda: self._finished, seconds)

    def _let_go(self) -> None:
        if self._over.acquire(blocking=False):
            _open.discard(self)
            written = self._files.durable >= self._chain.last.number
            self._ended(self._chain.last.head if written else None)

    # ---- the writer's thread

    def _write_on(self) -> None:
        try:
            self._keep_writing()
        except Exception as error:  # noqa: BLE001  # whoever waits for the disk must hear of it
            what = f"The recording's writer failed ({type(error).__name__}: {error})."
            self.problem = StorageError(Reason.INTERNAL, what, "Begin another recording; report it.")
            self.problem.__cause__ = error
            self._finish()

    def _finish(self) -> None:
        self._files.close()
        with self._done:
            self._finished = True
            self._done.notify_all()

    def _keep_writing(self) -> None:
        files = self._files
        checked = heard = moment = time.monotonic()
        while True:
            idle = self._chain.last.closed == self._chain.last.number
            due = heard + self._policy.heartbeat if idle else checked + self._policy.interval
            if self.problem:
                if self._stop.wait(_AGAIN):
                    self._stop.clear()
            elif self._wake.wait(max(0.0, due - time.monotonic())):
                self._wake.clear()
                rest = moment + _GATHERING - time.monotonic()
                if rest > 0 and not self._stopping:
                    time.sleep(rest)
            moment = time.monotonic()
            stopping = self._stopping  # if so, the chain has its end by now
            if not self.problem:
                self._sign_if_due(moment, checked, heard)
            # Without a turn: a thread that appends without pause would not let the writer have one
            files.links += self._chain.take()
            last = files.links[-1] if files.links else self._chain.last
            if last.closed == last.number:
                checked = heard = moment
            self._write()
            patience = _REFUSED if self.problem else _PATIENCE
            if stopping and (not files.links or time.monotonic() > self._ending + patience):
                self._finish()
                return

    def _sign_if_due(self, moment: float, checked: float, heard: float) -> None:
        last = self._chain.last
        unsigned = last.number - last.closed
        late = moment >= (checked + self._policy.interval if unsigned else heard + self._policy.heartbeat)
        if not late and unsigned < self._policy.every:
            return
        with self._turn():
            if self._closing:
                return
            if self._chain.last.number > self._chain.last.closed:
                self._note_dropped()
                self._chain.close_until_now(Checkpoint, *now())
            else:
                self._chain.close_until_now(Heartbeat, *now())

    def _write(self) -> None:
        """What is left for later stays with the files. `problem` says why."""
        try:
            self._files.write()
            self.problem = None
        except HwlicenseError as error:
            self.problem = error
        except MemoryError:
            self.problem = StorageError(Reason.STORAGE, "There is no memory left to write with.", "Free some.")
        with self._done:
            self._written = self._files.total
            self._done.notify_all()

    def _wait(self, target: int, timeout: float | None) -> None:
        with self._done:
            self._done.wait_for(lambda: self._files.durable >= target or self._finished, timeout)
        if self._files.durable < target:
            raise self._not_taken(target)

    def _not_taken(self, target: int) -> StorageError:
        left = target - self._files.durable
        why = f" {self.problem.what}" if self.problem else " The disk does not answer."
        hint = self.problem.hint if self.problem else "Look at the disk; `close` and `flush` wait for it."
        return StorageError(
            Reason.STORAGE, f"The disk has not taken the last {quantity(left, 'record')} of the recording.{why}", hint
        )

    # ---- forks and the end of the interpreter

    def _renew(self) -> None:
        self._lock = threading.RLock()
        self._busy = False
        self._wake, self._stop = threading.Event(), threading.Event()
        self._done = threading.Condition()

    def leave(self) -> None:
        """In a forked child: the recording is the parent's, keys and files included."""
        self._foreign = True
        self._renew()
        self._chain = Chain(b"")
        self._files.close()
        self._left()


_open: weakref.WeakSet[Recording] = weakref.WeakSet()


def _after_fork() -> None:
    for each in list(_open):
        each.leave()
    _open.clear()


def _at_exit() -> None:
    for each in list(_open):
        try:
            each.close()
        except HwlicenseError:  # nobody is left to be told; the log says that it was cut, or not certified
            continue


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)


def now() -> tuple[int, int]:
    """The wall clock and the time since the boot, in microseconds."""
    return time.time_ns() // 1000, clock.boot_time() // 1000
