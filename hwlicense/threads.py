"""Threads: those that share out work on many pieces, and those that work beside the application's own."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

from hwlicense.core.errors import Reason, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    T = TypeVar("T")

THREADS: Final = 4
"""At most so many: more outrun no memory bus."""
THREADED: Final = 8 << 20
"""Bytes from which on several are worth their start."""


def threads_for(size: int) -> int:
    """How many to share out so many bytes to."""
    return THREADS if size >= THREADED else 1


def one_at_a_time(progress: Callable[[int], None] | None) -> Callable[[int], None]:
    """`progress`, if any, for several threads: a progress bar belongs to one of them at a time."""
    if progress is None:
        return lambda _done: None
    turn = threading.Lock()

    def report(done: int) -> None:
        with turn:
            progress(done)

    return report


def share_out(
    pieces: Iterable[T], worker: Callable[[], Callable[[T], object]], *, run: int = 1, threads: int = THREADS
) -> None:
    """Call what `worker` gives, once for each thread, with each of `pieces`; a thread takes `run` in a row.

    Any order. The first exception stops all of them, and is raised here. Reading, hashing and ciphers leave the
    interpreter's lock, so they do run side by side; they end before this returns: none is left for a fork to lose.
    """
    source, turn, stop = iter(pieces), threading.Lock(), threading.Event()

    def work() -> None:
        try:
            handle = worker()
            while not stop.is_set():
                with turn:
                    taken = list(islice(source, run))
                if not taken:
                    return
                for piece in taken:
                    if stop.is_set():
                        return
                    handle(piece)
        except BaseException:
            stop.set()
            raise

    beside = _Beside(work, stop)
    try:
        beside.begin(min(threads, len(os.sched_getaffinity(0))) - 1)
        work()
    except BaseException:
        stop.set()  # also where none of the work had begun
        raise
    finally:
        beside.end()
    try:
        if beside.failures:
            raise beside.failures[0]
    finally:
        beside.failures.clear()  # an error must not hold itself, and with it what was being worked on


class _Beside:
    """Threads that work beside the caller's, and have ended when it goes on, however often that is interrupted.

    They work on what it is about to wipe or to close. An interrupted `join` of Python 3.11 takes a thread for ended
    that is not, so each says so itself.
    """

    def __init__(self, work: Callable[[], None], stop: threading.Event) -> None:
        self.failures: list[BaseException] = []
        self._work, self._stop = work, stop
        self._turn, self._over = threading.Lock(), False
        self._working: list[threading.Event] = []
        self._started: list[threading.Thread] = []

    def begin(self, count: int) -> None:
        with suppress(RuntimeError):  # the system allows no more threads: those that run do the work of all
            for _ in range(count):
                thread = threading.Thread(target=self._run, name="hwlicense pieces")
                thread.start()
                self._started.append(thread)

    def end(self) -> None:
        with self._turn:
            self._over = True
        self._wait()
        for thread in self._started:
            thread.join()

    def _run(self) -> None:
        ended = threading.Event()
        with self._turn:
            if self._over:
                return
            self._working.append(ended)
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001  # raised in the caller's thread
            self.failures.append(error)
        finally:
            ended.set()

    def _wait(self) -> None:
        try:
            for ended in self._working:
                ended.wait()
        except BaseException:  # a second Ctrl-C
            self._stop.set()
            self._wait()
            raise


def begin(name: str, target: Callable[..., object], *arguments: object) -> threading.Thread:
    """A thread that runs `target` from now on, and ends with the process at the latest.

    Raises StorageError where the system gives none.
    """
    thread = threading.Thread(target=target, args=arguments, name=f"hwlicense {name}", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        what = f"The system gives the process no further thread, and the license's {name} needs one."
        raise StorageError(Reason.STORAGE, what, "Raise the limit of threads (`ulimit -u`).") from error
    return thread
