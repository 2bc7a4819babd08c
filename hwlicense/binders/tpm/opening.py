"""Unsealing: alone, seven commands without limits and twelve with all, where the storage root key is persistent.

What can be wrong is found before the last step of the policy, which is the only one that costs the license an open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tpm2_pytss import (
    ESYS_TR,
    TPM2_EO,
    TPM2_RC,
    TPM2_SE,
    TPM2B_PRIVATE,
    TPMA_SESSION,
    TPML_DIGEST,
    TPMT_TK_VERIFIED,
    TSS2_Exception,
)

from hwlicense.binders.tpm import capping, clock, installing, keys
from hwlicense.binders.tpm.counting import GONE, Indexes
from hwlicense.binders.tpm.failures import NOT_ITS_OWN, WRONG_AUTHORIZATION, code, tampered
from hwlicense.core.errors import DamagedError, HardwareError, Reason, RefusedError
from hwlicense.core.tpm import standing
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.tpm.policy import (
    SAFE,
    PolicyAuthorize,
    PolicyAuthValue,
    PolicyCommandCode,
    PolicyCounterTimer,
    PolicyCpHash,
    PolicyNV,
    PolicyOR,
    PolicyPCR,
    PolicySecret,
    Step,
    pcr_step,
)

if TYPE_CHECKING:
    from hwlicense.binders.tpm.connection import Work
    from hwlicense.binders.tpm.held import Held
    from hwlicense.binders.tpm.sealed import Sealed
    from hwlicense.core.documents import Approval
    from hwlicense.core.secret import Secret
    from hwlicense.core.tpm.nv import NvPublic
    from hwlicense.core.tpm.structures import Public

_ATTEMPTS: Final = 3  # where measurements go on, they change PCRs between policy and use


def storage_root_key(work: Work, held: Held) -> ESYS_TR:
    """The key, assumed without a command to be still at its persistent handle. Evicted, the template makes it again."""
    public = held.storage_root_public

    def again() -> ESYS_TR:
        return keys.template_storage_root_key(work, public.name)[0]

    return again() if held.handle is None else work.known(held.handle, public, again)


def load(work: Work, held: Held, sealed: Sealed) -> tuple[ESYS_TR, ESYS_TR]:
    """The storage root key, and the sealed object under it. Raises RefusedError WRONG_DEVICE."""
    private, public = TPM2B_PRIVATE(held.private), keys.tpm_public(sealed.public)
    root = storage_root_key(work, held)
    try:
        try:
            return root, work.call("load", root, private, public)
        except TSS2_Exception as error:
            if held.handle is None or code(error) != TPM2_RC.HANDLE:
                raise
        root, _ = keys.template_storage_root_key(work, held.storage_root_public.name)
        return root, work.call("load", root, private, public)
    except TSS2_Exception as error:
        if code(error) not in NOT_ITS_OWN:
            raise
        raise keys.wrong_device("this TPM does not know its sealed part, or that is damaged") from error


class Opening:
    """One opening of a license: everything but the sealed object's use, which is the last command."""

    def __init__(self, work: Work, root: ESYS_TR, loaded: ESYS_TR, sealed: Sealed, held: Held, auth: Secret) -> None:
        self._work, self._root, self._loaded, self._sealed, self._held = work, root, loaded, sealed, held
        self._indexes = Indexes(work, root, auth)
        self._proofs: list[ESYS_TR] = []

    def unseal(self) -> Secret:
        """The sealed value. Raises RefusedError, of which ExceededError: OPENS_EXHAUSTED, HOURS_EXHAUSTED.

        Measurements that go on change PCRs between policy and use: then it is tried again, but only once where opens
        are counted, as each time costs one.
        """
        costly = any(isinstance(step, PolicySecret) for step in self._sealed.steps)
        attempts: int = 2 if costly else _ATTEMPTS
        mended = set[Step]()
        while True:
            self._proofs.clear()
            # Salted, so that neither the value nor anything that helps to guess the PIN is seen on the bus.
            session = self._work.session(self._root, TPM2_SE.POLICY, TPMA_SESSION.ENCRYPT)
            at: list[Step] = []
            try:
                approval = approved_state(self._work, session, self._sealed)
                for step in self._sealed.steps:
                    at[:] = [step]
                    self._run(session, step, approval)
                at.clear()
                value = self._work.call("unseal", self._loaded, session1=session)
            except TSS2_Exception as error:
                if code(error) == TPM2_RC.PCR_CHANGED:
                    attempts -= 1
                    if attempts < 1:
                        what = "PCRs keep changing while the license is opened."
                        raise HardwareError(Reason.TPM_BUSY, what, "Open it once the system has started.") from error
                elif not at and code(error) in WRONG_AUTHORIZATION:
                    raise self._unauthorized() from error
                elif not at or at[0] in mended or not self._mended(at[0], error):
                    raise
                else:
                    mended.update(at)
                self._work.flush(session, *self._proofs)
            else:
                self._work.ended(session)
                return installing.taken(value)

    def _run(self, session: ESYS_TR, step: Step, approval: Approval | None) -> None:
        work = self._work
        match step:
            case PolicyNV(index, operand):
                known = self._indexes.handle(index)
                work.call("policy_nv", known, known, session, operand, TPM2_EO.EQ, session1=self._proved())
            case PolicySecret(index):
                # The last step: what it proves it with ends here, and it counts whatever becomes of the opening.
                proof = self._proved()
                work.call("trsess_set_attributes", proof, TPMA_SESSION(0))
                work.call("policy_secret", self._indexes.handle(index), session, expiration=0, session1=proof)
                work.ended(proof)
                self._proofs.clear()
            case _:
                run(work, session, step, self._sealed, approval, self._held)

    def _proved(self) -> ESYS_TR:
        """One session for counter and index, bound to the sealed object where there is a PIN: a wrong one spends
        nothing, and the TPM counts it as wrong.
        """
        if not self._proofs:
            bind = self._loaded if self._sealed.binding.pin else ESYS_TR.NONE
            self._proofs.append(self._work.session(self._root, TPM2_SE.HMAC, TPMA_SESSION.CONTINUESESSION, bind=bind))
        return self._proofs[0]

    def _mended(self, step: Step, error: TSS2_Exception) -> bool:
        """Whether the opening may be tried again; False where the error says it all. Raises what it means."""
        answer = code(error)
        match step:
            case PolicyPCR() if answer == TPM2_RC.VALUE and self._sealed.binding.cap is not None:
                capping.extend(self._work, self._sealed.binding.cap)
                return True
            case PolicyNV(index) if answer == TPM2_RC.POLICY or answer in GONE:
                raise self._outdated(index, error) from error
            case PolicyCounterTimer(offset) if answer == TPM2_RC.POLICY and offset == SAFE:
                clock.make_safe(self._work, self._root)
                return True
            case PolicyCounterTimer() if answer == TPM2_RC.POLICY:
                raise standing.overdue() from error
            case PolicySecret(index) if answer == TPM2_RC.AUTH_UNAVAILABLE or answer in GONE:
                if self._indexes.name(index.handle) != index.name:
                    raise standing.lost("the index of its opens") from error
                if answer == TPM2_RC.AUTH_UNAVAILABLE:
                    limits = {each.handle: each.limit for each in self._sealed.conditions.indexes}
                    raise standing.exhausted(limits[index.handle]) from error
        if answer in WRONG_AUTHORIZATION:
            raise self._unauthorized() from error
        return False

    def _outdated(self, index: NvPublic, error: TSS2_Exception) -> Exception:
        if code(error) in WRONG_AUTHORIZATION and self._indexes.name(index.handle) == index.name:
            return self._unauthorized()
        return standing.refusal(self._indexes.standing(self._sealed.binding.counter))

    def _unauthorized(self) -> RefusedError | HardwareError:
        if self._sealed.binding.pin:
            hint = "The TPM counts wrong PINs and locks after a few: be sure of the next one."
            return RefusedError(Reason.PIN_WRONG, "The PIN is wrong.", hint)
        return tampered()


def approved_state(work: Work, session: ESYS_TR, sealed: Sealed) -> Approval | None:
    """The approval that agrees with the platform, its PolicyPCR done; None where the license asks for none.

    Raises RefusedError PCR_MISMATCH.
    """
    for approval in sealed.approvals:
        step = pcr_step(approval.pcrs)
        try:
            work.call("policy_pcr", session, step.values, keys.tpm_selection(step.selection))
        except TSS2_Exception as error:
            if code(error) != TPM2_RC.VALUE:  # the PCRs differ; the session is as it was, and good for the next try
                raise
        else:
            return approval
    if sealed.approvals:
        raise _mismatch(work, sealed)
    return None


def _mismatch(work: Work, sealed: Sealed) -> RefusedError:
    """Names what differs from the approval that is nearest to the platform's state."""
    different = []
    for approval in sealed.approvals:
        present = keys.read_pcrs(work, Selection.of(approval.pcrs))
        different.append([pcr for pcr in approval.pcrs if pcr not in present])
    nearest = min(different, key=len)
    names = " and ".join(f"PCR {pcr.index} ({pcr.bank})" for pcr in nearest) or "A PCR"
    what = f"{names} {'are' if len(nearest) > 1 else 'is'} not as approved: firmware, boot or their settings changed."
    hint = "Boot the approved system, or install the vendor's approval of this one: hwlicense device install APPROVAL."
    return RefusedError(Reason.PCR_MISMATCH, what, hint)


def run(work: Work, session: ESYS_TR, step: Step, sealed: Sealed, approval: Approval | None, held: Held) -> None:
    """A step that needs no authorization. Raises DamagedError LICENSE_DAMAGED for one that is none."""
    match step:
        case PolicyPCR(selection, values):
            work.call("policy_pcr", session, values, keys.tpm_selection(selection))
        case PolicyCommandCode(command):
            work.call("policy_command_code", session, command)
        case PolicyAuthValue():
            work.call("policy_auth_value", session)
        case PolicyCounterTimer(offset, operand, operation):
            work.call("policy_counter_timer", session, operand, operation, offset)
        case PolicyCpHash(parameters):
            work.call("policy_cp_hash", session, parameters)
        case PolicyOR(branches):
            work.call("policy_or", session, TPML_DIGEST(list(branches)))
        case PolicyAuthorize() if approval is not None and sealed.policy_key is not None:
            kept = held.ticket(approval.policy)
            try:
                ticket = kept or _ticket(work, sealed.policy_key, approval, step)
                authorize(work, session, step, approval.policy, ticket)
            except TSS2_Exception as error:
                if kept is None or code(error) not in (TPM2_RC.VALUE, TPM2_RC.TICKET):
                    raise
                ticket = _ticket(work, sealed.policy_key, approval, step)
                authorize(work, session, step, approval.policy, ticket)
        case _:
            what = f"The license asks the TPM for a step that this release cannot take: {type(step).__name__}."
            raise DamagedError(Reason.LICENSE_DAMAGED, what, "Update hwlicense, or ask for the license again.")


def _ticket(work: Work, key: Public, approval: Approval, step: PolicyAuthorize) -> bytes:
    return installing.ticket(work, key, approval.policy, step.reference, approval.signature)


def authorize(work: Work, session: ESYS_TR, step: PolicyAuthorize, policy: bytes, ticket: bytes) -> None:
    """The vendor has signed the policy so far."""
    verified, _ = TPMT_TK_VERIFIED.unmarshal(ticket)
    work.call(  # by keyword: the order varies by release
        "policy_authorize",
        session,
        approved_policy=policy,
        policy_ref=step.reference,
        key_sign=step.key,
        check_ticket=verified,
    )
