"""Unsealing: seven commands where nothing is cold, and none that costs the license anything if it fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tpm2_pytss import ESYS_TR, TPM2_RC, TPM2_SE, TPM2B_PRIVATE, TPMA_SESSION, TPMT_TK_VERIFIED, TSS2_Exception

from hwlicense.binders.tpm import installing, keys
from hwlicense.binders.tpm.failures import NOT_ITS_OWN, WRONG_AUTHORIZATION, code
from hwlicense.core.errors import DamagedError, HardwareError, Reason, RefusedError
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.tpm.policy import PolicyAuthorize, PolicyAuthValue, PolicyCommandCode, PolicyPCR, Step, pcr_step

if TYPE_CHECKING:
    from hwlicense.binders.tpm.connection import Work
    from hwlicense.binders.tpm.held import Held
    from hwlicense.binders.tpm.sealed import Sealed
    from hwlicense.core.documents import Approval
    from hwlicense.core.secret import Secret

_ATTEMPTS: Final = 3  # where measurements go on, they change PCRs between policy and use


def storage_root_key(work: Work, held: Held) -> tuple[ESYS_TR, bool]:
    """The key; and whether it is only assumed, without a command, to be still at its persistent handle."""
    public = held.storage_root_public
    if held.handle is not None:
        return work.known(held.handle, public), True
    return keys.template_storage_root_key(work, public.name)[0], False


def load(work: Work, held: Held, sealed: Sealed) -> tuple[ESYS_TR, ESYS_TR]:
    """The storage root key, and the sealed object under it. Raises RefusedError WRONG_DEVICE."""
    private, public = TPM2B_PRIVATE(held.private), keys.tpm_public(sealed.public)
    root, assumed = storage_root_key(work, held)
    try:
        try:
            return root, work.hold(work.call("load", root, private, public))
        except TSS2_Exception as error:
            if not assumed or code(error) != TPM2_RC.HANDLE:
                raise
        # Evicted since, but the template may make the same key.
        root, _ = keys.template_storage_root_key(work, held.storage_root_public.name)
        return root, work.hold(work.call("load", root, private, public))
    except TSS2_Exception as error:
        if code(error) not in NOT_ITS_OWN:
            raise
        raise keys.wrong_device("this TPM does not know its sealed part, or that is damaged") from error


def unseal(work: Work, root: ESYS_TR, loaded: ESYS_TR, sealed: Sealed, held: Held) -> Secret:
    """The sealed value. Raises RefusedError: PCR_MISMATCH, PIN_WRONG."""
    attempts = _ATTEMPTS
    while True:
        # Salted, so that neither the value nor anything that helps to guess the PIN is seen on the bus.
        session = work.session(root, TPM2_SE.POLICY, TPMA_SESSION.ENCRYPT)
        try:
            approval = _approved_state(work, session, sealed)
            for step in sealed.steps:
                _run(work, session, step, sealed, approval, held)
            value = work.call("unseal", loaded, session1=session)
        except TSS2_Exception as error:
            attempts -= 1
            if code(error) in WRONG_AUTHORIZATION:
                raise _unauthorized(sealed) from error
            if code(error) != TPM2_RC.PCR_CHANGED:
                raise
            if not attempts:
                what = "PCRs keep changing while the license is opened."
                raise HardwareError(Reason.TPM_BUSY, what, "Open it once the system has started.") from error
            work.flush(session)
        else:
            work.ended(session)
            return installing.taken(value)


def _unauthorized(sealed: Sealed) -> RefusedError | HardwareError:
    if sealed.binding.pin:
        hint = "The TPM counts wrong PINs and locks after a few: be sure of the next one."
        return RefusedError(Reason.PIN_WRONG, "The PIN is wrong.", hint)
    what = "A command to the TPM was changed on its way: the TPM refuses its authentication."
    return HardwareError(Reason.TPM_ANSWER_FORGED, what, "Inspect the device: something tampers with its TPM's bus.")


def _approved_state(work: Work, session: ESYS_TR, sealed: Sealed) -> Approval | None:
    """The approval that agrees with the platform, its PolicyPCR done; None where the license asks for none."""
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


def _run(work: Work, session: ESYS_TR, step: Step, sealed: Sealed, approval: Approval | None, held: Held) -> None:
    match step:
        case PolicyPCR(selection, values):
            work.call("policy_pcr", session, values, keys.tpm_selection(selection))
        case PolicyCommandCode(command):
            work.call("policy_command_code", session, command)
        case PolicyAuthValue():
            work.call("policy_auth_value", session)
        case PolicyAuthorize() if approval is not None and sealed.policy_key is not None:
            kept = held.ticket(approval.policy)
            try:
                ticket = kept or installing.ticket(work, sealed.policy_key, approval, step.reference)
                _authorize(work, session, step, approval, ticket)
            except TSS2_Exception as error:
                if kept is None or code(error) not in (TPM2_RC.VALUE, TPM2_RC.TICKET):
                    raise
                ticket = installing.ticket(work, sealed.policy_key, approval, step.reference)
                _authorize(work, session, step, approval, ticket)
        case _:
            what = f"The license asks the TPM for a step that this release cannot take: {type(step).__name__}."
            raise DamagedError(Reason.LICENSE_DAMAGED, what, "Update hwlicense, or ask for the license again.")


def _authorize(work: Work, session: ESYS_TR, step: PolicyAuthorize, approval: Approval, ticket: bytes) -> None:
    verified, _ = TPMT_TK_VERIFIED.unmarshal(ticket)
    signed = {"approved_policy": approval.policy, "policy_ref": step.reference, "key_sign": step.key}
    work.call("policy_authorize", session, check_ticket=verified, **signed)  # by keyword: the order varies by release
