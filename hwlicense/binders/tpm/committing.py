"""Putting a revision of a counted license in force: the counter to odd, its indexes anew, the counter to even.

Odd, nothing opens and indexes can be written; even, nothing can be written. Whatever was done before a power cut is
found and not done again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpm2_pytss import ESYS_TR, TPM2_EO, TPM2_SE, TPMA_SESSION, TPML_DIGEST, TSS2_Exception

from hwlicense.binders.tpm import capping, installing, opening, standing
from hwlicense.binders.tpm.counting import GONE, Indexes
from hwlicense.binders.tpm.failures import code
from hwlicense.core.tpm.composing import PLACES
from hwlicense.core.tpm.nv import counter_public, limit_data
from hwlicense.core.tpm.policy import PolicyNV, digest

if TYPE_CHECKING:
    from hwlicense.binders.tpm.connection import Work
    from hwlicense.binders.tpm.held import Held
    from hwlicense.binders.tpm.sealed import Sealed
    from hwlicense.core.documents import TpmCounter, TpmIndex
    from hwlicense.core.secret import Secret


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
        try:
            value = self._indexes.value(public)
        except TSS2_Exception as error:
            if code(error) not in GONE:
                raise
            raise standing.lost("its counter") from error
        if value > counter.value:
            raise standing.superseded()
        if value == counter.value:
            return
        self._check_state()
        for _ in range(counter.value - 1 - value):
            self._indexes.increment(public)
        self._remove_others(counter)
        for index in self._sealed.conditions.indexes:
            self._write(index)
        self._indexes.increment(public)

    def retire(self, counter: TpmCounter) -> None:
        """Take away counter and indexes. Whoever took them before is no error."""
        for handle in (counter.handle, *(counter.handle + place for place in PLACES.values())):
            if self._indexes.name(handle) is not None:
                self._indexes.undefine(handle)

    def _check_state(self) -> None:
        self._sealed.check_writes()
        cap = self._sealed.binding.cap
        if cap is not None and not capping.is_open(self._work, cap):
            raise capping.reboot_needed(cap)
        session = self._work.session(self._root, TPM2_SE.POLICY, TPMA_SESSION(0))
        opening.approved_state(self._work, session, self._sealed)
        self._work.flush(session)

    def _remove_others(self, counter: TpmCounter) -> None:
        """Indexes that this revision does without, or that are of another one."""
        wanted = {index.handle: self._sealed.conditions.public(index) for index in self._sealed.conditions.indexes}
        for handle in (counter.handle + place for place in PLACES.values()):
            name, public = self._indexes.name(handle), wanted.get(handle)
            if name is not None and (public is None or name not in (public.name, public.unwritten.name)):
                self._indexes.undefine(handle)

    def _write(self, index: TpmIndex) -> None:
        public = self._sealed.conditions.public(index)
        name = self._indexes.name(index.handle)
        if name == public.name:  # before a power cut: a write works once
            return
        if name is None:
            self._indexes.define(public)
        target = self._indexes.handle(public.unwritten)
        session = self._permitted(index)
        data = limit_data(index.limit)
        self._work.call("nv_write", target, data, auth_handle=target, session1=session)
        self._work.ended(session)

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
