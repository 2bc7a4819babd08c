"""The anchor of a license's ledger: an index of the TPM whose every use counts."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tpm2_pytss import TSS2_Exception

from hwlicense.binders.tpm import opening
from hwlicense.binders.tpm.counting import GONE, Indexes
from hwlicense.binders.tpm.failures import code, tampered
from hwlicense.core.hardware import Reading
from hwlicense.core.tpm import standing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hwlicense.binders.tpm.connection import Connection
    from hwlicense.binders.tpm.held import Held
    from hwlicense.binders.tpm.sealed import Sealed
    from hwlicense.core.documents import TpmIndex
    from hwlicense.core.secret import Secret
    from hwlicense.core.tpm.composing import Conditions
    from hwlicense.core.tpm.quote import Time


class _Kept:
    """What an anchor knows from one work to the next."""

    lapse = 0
    unused: tuple[int, int] | None = None  # the count of a step that was not given to whoever asked, and the process

    def tell(self, count: int) -> None:
        self.unused = count, os.getpid()


class TpmSteps:
    """A `Steps` within one work."""

    def __init__(self, indexes: Indexes, conditions: Conditions, index: TpmIndex, kept: _Kept) -> None:
        self._indexes, self._kept = indexes, kept
        self._public, self._branches = conditions.public(index), conditions.branches(index)

    def read(self) -> Reading:
        """The count as it is. Raises TSS2_Exception, HardwareError."""
        return self._reading(*self._indexes.read(self._public, self._branches))

    def step(self) -> Reading:
        """Count one more, and read. Raises as `read`."""
        # Not a parent's that forked in the middle of a step: it is given to the parent, and twice would be charged.
        if (unused := self._kept.unused) and unused[1] == os.getpid():
            found = self.read()
            self._kept.unused = None
            if found.steps == unused[0]:
                return found
        found = self._reading(*self._indexes.step(self._public, self._kept.tell))
        self._kept.unused = None
        return found

    def _reading(self, count: int, now: Time) -> Reading:
        self._kept.lapse = self._kept.lapse or self._indexes.lapse()
        return Reading(count, now.clock, now.uptime, self._kept.lapse)


class TpmAnchor:
    """An `Anchor`. Keeps nothing in the TPM, and no secret: `auth` gives the authValue for each use."""

    def __init__(
        self, connection: Connection, sealed: Sealed, held: Held, index: TpmIndex, auth: Callable[[], Secret]
    ) -> None:
        self._connection, self._sealed, self._held, self._index, self._auth = connection, sealed, held, index, auth
        self._kept = _Kept()

    def read(self) -> Reading:
        """The count as it is. Raises HardwareError, AbsentError, RefusedError LICENSE_SUPERSEDED, COUNTER_LOST."""
        with self.together() as steps:
            return steps.read()

    def step(self) -> Reading:
        """Count one more, and read. Raises as `read`; the step may have been counted then.

        A step whose answer came after its time is given now, unless another was counted since.
        """
        with self.together() as steps:
            return steps.step()

    @contextmanager
    def together(self) -> Iterator[TpmSteps]:
        """As one work, under one storage root key and with one session for what is read and counted."""
        with self._auth() as auth, self._connection.work() as work:
            indexes = Indexes(work, opening.storage_root_key(work, self._held), auth)
            try:
                yield TpmSteps(indexes, self._sealed.conditions, self._index, self._kept)
            except TSS2_Exception as error:
                if code(error) not in GONE:
                    raise
                state = indexes.standing(self._sealed.binding.counter)
                if state != "current":
                    raise standing.refusal(state) from error
                public = self._sealed.conditions.public(self._index)
                if indexes.name(public.handle) == public.name:
                    raise tampered() from error
                raise standing.lost(f"its index ({self._index.purpose})") from error
