"""Who asks for a PIN, where several processes have one open model."""

from __future__ import annotations

import os
import weakref

from hwlicense.storage import above_standard


class PinTurn:
    """The one turn at asking for a PIN that a model has among all processes that were forked with it.

    A byte in a pipe: taken by reading, and gone with a process that dies or is refused meanwhile.
    """

    def __init__(self) -> None:
        self._ends = [above_standard(end) for end in os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)]
        self.give_back()
        weakref.finalize(self, _close, self._ends)

    def take(self) -> bool:
        """Whether this is the one to ask."""
        try:
            return bool(os.read(self._ends[0], 1))
        except BlockingIOError:
            return False

    def give_back(self) -> None:
        """Let the next one ask."""
        os.write(self._ends[1], b"!")


def _close(ends: list[int]) -> None:
    for end in ends:
        os.close(end)
