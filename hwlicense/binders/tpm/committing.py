"""Putting a revision of a counted license in force: the counter to odd, its indexes anew, the counter to even.

Odd, nothing opens and indexes can be written; even, nothing can be written. Whatever was done before a power cut is
found and not done again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpm2_pytss import ESYS_TR, TPM2_EO, TPM2_RC, TPM2_SE, TPMA_SESSION, TPML_DIGEST, TSS2_Exception

from hwlicense.binders.tpm import capping, installing, opening
from hwlicense.binders.tpm.counting import Indexes
from hwlicense.binders.tpm.failures import code
from hwlicense.core.secret import Secret
from hwlicense.core.tpm import standing
from hwlicense.core.tpm.composing import PLACES
from hwlicense.core.tpm.nv import counter_public, limit_data
from hwlicense.core.tpm.policy import PolicyNV, digest

if TYPE_CHECKING:
    from hwlicense.binders.tpm.connection import Work
    from hwlicense.binders.tpm.held import Held
    from hwlicense.binders.tpm.sealed import Sealed
    from hwlicense.core.documents import TpmCounter, TpmIndex


def retire(work: Work, counter: TpmCounter) -> None:
    """Take away a counter and its indexes. Whoever took them before is no error."""
    with Secret(bytearray()) as nothing:  # which the owner's authorization makes unnecessary
        indexes = Indexes(work, ESYS_TR.NONE, nothing)
        for handle in (counter.handle, *(counter.handle + place for place in PLACES.values())):
            if indexes.name(handle) is not None:
                indexes.undefine(handle)


class Commitment:
    """One revision and its TPM, within one work of a connection."""

    def __init__(self, work: Work, root: ESYS_TR, sealed: Sealed, held: Held, auth: Secret) -> None:
        self._work, self._root, self._sealed, self._held = work, root, sealed, held
        self._indexes = Indexes(work, root, auth)

    def commit(self, counter: TpmCounter) -> None:
        """Do what is missing. What can be refused is refused before the older revision ends.

        Raises RefusedError: LICENSE_SUPERSEDED, COUNTER_LOST, PCR_MISMATCH, REBOOT_NEEDED; DamagedError; HardwareError.
        """
        public = counter_public(counter.handle)
        value = self._indexes.found(counter)
        if value is None or value > counter.value:
            raise standing.refusal(standing.of(value, counter))
        if value == counter.value:
            self._check_written()
            return
        self._check_state()
        stale = self._make_room(counter)
        for _ in range(counter.value - 1 - value):
            self._indexes.increment(public)
        for handle in stale:
            self._indexes.undefine(handle)
        for index in self._sealed.conditions.indexes:
            self._write(index)
        self._indexes.increment(public)

    def _check_written(self) -> None:
        """That no index was taken away since, and all are its own: nothing can be written any more."""
        for index in self._sealed.conditions.indexes:
            name = self._indexes.name(index.handle)
            if name is None:
                raise standing.lost(f"its index ({index.purpose})")
            if name != self._sealed.conditions.public(index).name:
                raise standing.taken(f"The license's index ({index.purpose})")

    def _check_state(self) -> None:
        self._sealed.check_writes()
        cap = self._sealed.binding.cap
        if cap is not None and not capping.is_open(self._work, cap):
            raise capping.reboot_needed(cap)
        session = self._work.session(self._root, TPM2_SE.POLICY, TPMA_SESSION(0))
        opening.approved_state(self._work, session, self._sealed)
        self._work.flush(session)

    def _make_room(self, counter: TpmCounter) -> list[int]:
        """Make the indexes whose handles are free. Handles of those that another revision left, to be made again.

        So whatever the TPM refuses of it (no room, no such index, an owner's password) it refuses while the older
        revision is alive: an index is of use only when it is written.
        """
        stale = list[int]()
        wanted = {index.handle: self._sealed.conditions.public(index) for index in self._sealed.conditions.indexes}
        for handle in (counter.handle + place for place in PLACES.values()):
            name, public = self._indexes.name(handle), wanted.get(handle)
            if name is None and public is not None:
                self._indexes.define(public)
            elif name is not None and (public is None or name not in (public.name, public.unwritten.name)):
                stale.append(handle)
        if stale:
            session = self._work.session(self._root, TPM2_SE.POLICY, TPMA_SESSION(0))
            self._work.call("policy_secret", ESYS_TR.OWNER, session, expiration=0)
            self._work.flush(session)
        return stale

    def _write(self, index: TpmIndex) -> None:
        public = self._sealed.conditions.public(index)
        name = self._indexes.name(index.handle)
        if name == public.name:  # before a power cut: a write works once
            return
        if name is None:
            self._indexes.define(public)
        target, data = self._indexes.handle(public.unwritten), limit_data(index.limit)
        for last in (False, False, True):
            session = self._permitted(index)
            try:
                self._work.call("nv_write", target, data, auth_handle=target, session1=session)
            except TSS2_Exception as error:
                if last or code(error) != TPM2_RC.PCR_CHANGED:  # as where measurements go on
                    raise
                self._work.flush(session)
            else:
                self._work.ended(session)
                return

    def _permitted(self, index: TpmIndex) -> ESYS_TR:
        """A session that may write the index: the vendor's signature comes last, before the choice of the branch."""
        work, asked = self._work, self._sealed.conditions
        session = work.session(self._root, TPM2_SE.POLICY, TPMA_SESSION(0))
        approval = opening.approved_state(work, session, self._sealed)
        for step in asked.write(index):
            if isinstance(step, PolicyNV):
                proof = work.session(self._root, TPM2_SE.HMAC, TPMA_SESSION(0))
                known = self._indexes.handle(step.index)
                work.call("policy_nv", known, known, session, step.operand, TPM2_EO.EQ, session1=proof)
                work.ended(proof)
            else:
                opening.run(work, session, step, self._sealed, approval, self._held)
        policy, permitted = digest(asked.write(index)), asked.permitted(index)
        key = self._sealed.policy_key
        assert key is not None  # noqa: S101  # conditions with a counter have one
        ticket = installing.ticket(work, key, policy, permitted.reference, index.write)
        opening.authorize(work, session, permitted, policy, ticket)
        work.call("policy_or", session, TPML_DIGEST(list(asked.branches(index).branches)))
        return session
