"""One program at a time at a TPM: in turns at a simulator, and alone at a device for what is done once."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hwlicense.binders.tpm import answering, failures
from hwlicense.core.errors import HardwareError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOMENT: Final = 1.0
_turns: dict[int, tuple[str, int]] = {}  # of this process: its descriptor, the simulator's socket and the thread
_inherited: dict[str, float] = {}  # sockets at which the parent had its turn at the fork: how long to wait for its end


@contextmanager
def turn(tcti: str) -> Iterator[None]:
    """Wait until no other process or connection works with the simulator at this socket.

    A simulator takes commands of several clients in between each other, and has three places for objects: without turns
    one client's objects push out another's. A device needs none: the kernel lets one in, or manages them all.
    """
    path = dict(option.partition("=")[::2] for option in tcti.partition(":")[2].split(",")).get("path", "")
    try:
        folder = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if path else -1
    except OSError:  # nothing is there, which connecting reports
        folder = -1
    process = os.getpid()
    try:
        if folder >= 0:
            _turns[folder] = path, threading.get_ident()  # before it is had: a signal handler may fork at any moment
            patience = _inherited.get(path)
            if patience is None:
                fcntl.flock(folder, fcntl.LOCK_EX)  # let go by the kernel when the process dies
            elif _locked(folder, patience):
                _inherited.pop(path, None)
        yield
    finally:
        if folder >= 0 and os.getpid() == process:  # in a child that was forked meanwhile, it is closed
            fcntl.flock(folder, fcntl.LOCK_UN)
            del _turns[folder]
            os.close(folder)


@contextmanager
def alone(tcti: str) -> Iterator[None]:
    """Within a turn: keep others out who ask for the same. Raises AbsentError and HardwareError.

    TPM_BUSY where another program keeps the device for longer than a command may take.
    """
    kind, _, path = tcti.partition(":")
    try:
        node = os.open(path, os.O_RDWR | os.O_CLOEXEC) if kind == "device" else -1
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise failures.connect_error(error, tcti) from error
        node = -1  # the kernel lets one program in, and that is this one
    try:
        if node >= 0 and not _locked(node, answering.LIMIT):
            what = f"Another program has kept {path} locked for {answering.LIMIT:g} s."
            raise HardwareError(Reason.TPM_BUSY, what, f"See which one that is (`lsof {path}`).")
        yield
    finally:
        if node >= 0:
            fcntl.flock(node, fcntl.LOCK_UN)
            os.close(node)


def _locked(node: int, seconds: float) -> bool:
    """Whether it could be locked within that time."""
    give_up, pause = time.monotonic() + seconds, 0.001
    while True:
        try:
            fcntl.flock(node, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        else:
            return True


def forget() -> None:
    """In a forked child: turns are the parent's, and end with it, whatever becomes of the child.

    A thread in its turn ends that by itself; the one that forked may be waiting for the child.
    """
    for folder, (
        path,
        thread,
    ) in _turns.items():  # some may wait for it: the forking one counts
        patience = _MOMENT if thread == threading.get_ident() else answering.LIMIT
        _inherited[path] = min(patience, _inherited.get(path, patience))
        os.close(folder)
    _turns.clear()
