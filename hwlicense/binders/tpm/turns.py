"""One program at a time at a TPM: in turns at a simulator, and alone at a device for what is done once."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hwlicense.binders.tpm import answering, failures
from hwlicense.core.errors import HardwareError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterator

_turns: set[str] = set()  # sockets at which this process has its turn
_inherited: set[str] = set()  # and those at which its parent had, when it was forked: the parent may wait for the child


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
    try:
        if folder >= 0 and path not in _inherited:
            fcntl.flock(folder, fcntl.LOCK_EX)  # let go by the kernel when the process dies
            _turns.add(path)
        yield
    finally:
        _turns.discard(path)
        if folder >= 0:
            fcntl.flock(folder, fcntl.LOCK_UN)  # also for the copy that a child forked meanwhile may hold
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
        if node >= 0:
            _lock(node, path)
        yield
    finally:
        if node >= 0:
            fcntl.flock(node, fcntl.LOCK_UN)
            os.close(node)


def _lock(node: int, path: str) -> None:
    give_up, pause = time.monotonic() + answering.LIMIT, 0.001
    while True:
        try:
            fcntl.flock(node, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > give_up:
                what = f"Another program has kept {path} locked for {answering.LIMIT:g} s."
                raise HardwareError(Reason.TPM_BUSY, what, f"See which one that is (`lsof {path}`).") from error
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        else:
            return


def forget() -> None:
    """In a forked child: turns are the parent's, who may wait for the child."""
    _inherited.update(_turns)
    _turns.clear()
