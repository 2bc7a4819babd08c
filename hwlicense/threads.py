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

    others = min(threads, len(os.sched_getaffinity(0))) - 1
    if others < 1:
        work()
        return
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415  # slow to import, for much work alone

    with ThreadPoolExecutor(others) as pool:
        running = []
        with suppress(RuntimeError):  # the system allows no more threads: those that run do the work of all
            for _ in range(others):
                running.append(pool.submit(work))  # noqa: PERF401  # those before the failure count
        work()
        for each in running:
            each.result()


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
