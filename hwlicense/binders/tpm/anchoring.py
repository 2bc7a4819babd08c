"""The anchor of a license's ledger: an index of the TPM whose every use counts."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tpm2_pytss import TSS2_Exception

from hwlicense.binders.tpm import clock, opening
from hwlicense.binders.tpm.counting import GONE, Indexes
from hwlicense.binders.tpm.failures import code, tampered
from hwlicense.core.hardware import Reading
from hwlicense.core.tpm import standing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tpm2_pytss import ESYS_TR

    from hwlicense.binders.tpm.connection import Connection, Work
    from hwlicense.binders.tpm.held import Held
    from hwlicense.binders.tpm.sealed import Sealed
    from hwlicense.core.documents import TpmIndex
    from hwlicense.core.secret import Secret
    from hwlicense.core.tpm.quote import Time


class TpmAnchor:
    """An `Anchor`. Keeps nothing in the TPM, and no secret: `auth` gives the authValue for each use."""

    def __init__(
        self, connection: Connection, sealed: Sealed, held: Held, index: TpmIndex, auth: Callable[[], Secret]
    ) -> None:
        self._connection, self._sealed, self._held, self._index, self._auth = connection, sealed, held, index, auth
        self._lapse = 0

    def read(self) -> Reading:
        """The count as it is. Raises HardwareError, AbsentError, RefusedError LICENSE_SUPERSEDED, COUNTER_LOST."""
        asked = self._sealed.conditions
        with self._indexes() as (work, root, indexes):
            found = indexes.counted(asked.public(self._index), asked.branches(self._index))
            return self._reading(work, root, *found)

    def step(self) -> Reading:
        """Count one more, and read. Raises as `read`; the step may have been counted then."""
        with self._indexes() as (work, root, indexes):
            found = indexes.step(self._sealed.conditions.public(self._index))
            return self._reading(work, root, *found)

    def _reading(self, work: Work, root: ESYS_TR, steps: int, now: Time) -> Reading:
        if not self._lapse:
            self._lapse = clock.lapse(work, root)
        return Reading(steps, now.clock, now.uptime, self._lapse)

    @contextmanager
    def _indexes(self) -> Iterator[tuple[Work, ESYS_TR, Indexes]]:
        with self._auth() as auth, self._connection.work() as work:
            root = opening.storage_root_key(work, self._held)
            indexes = Indexes(work, root, auth)
            try:
                yield work, root, indexes
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
