"""A TPM as `Hardware`: enrolling, installing and opening licenses that are sealed to it."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Self

from tpm2_pytss import TPM2_RC, TPM2_SE, TPMA_SESSION, TSS2_Exception

from hwlicense.binders.tpm import clock, counting, installing, keys, opening, probing, providing
from hwlicense.binders.tpm.anchoring import TpmAnchor
from hwlicense.binders.tpm.committing import Commitment, retire
from hwlicense.binders.tpm.connection import DEFAULT_TCTI, Connection, Work
from hwlicense.binders.tpm.failures import NOT_ITS_OWN, WRONG_AUTHORIZATION, code
from hwlicense.binders.tpm.held import Held, Ticket
from hwlicense.binders.tpm.sealed import Sealed
from hwlicense.core.documents import TpmEvidence
from hwlicense.core.errors import AbsentError, DamagedError, Reason, RefusedError, UsageError
from hwlicense.core.hardware import Counted, Unwrapped
from hwlicense.core.secret import Secret
from hwlicense.core.tpm.duplicate import member_secret, pin_value
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.tpm.policy import pcr_step
from hwlicense.core.tpm.quote import check_quote, quote_data

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from tpm2_pytss import ESYS_TR

    from hwlicense.core.chain import TpmCertificate
    from hwlicense.core.documents import Approval, TpmBinding, TpmCounter
    from hwlicense.core.hardware import CounterStore, PinSource
    from hwlicense.core.tpm.structures import Public


class TpmHardware:
    """One TPM, by TCTI string (device:, swtpm: or mssim:). Safe for use by several threads and in forked children.

    Connects when first used, and closes at the end of a `with` block. Raises UsageError for another kind of TCTI.
    """

    def __init__(self, tcti: str | None = None, store: CounterStore | None = None) -> None:
        """`store` is where authValues of counters are kept; without one, counted licenses are not for this hardware."""
        self._connection, self._store = Connection(tcti or DEFAULT_TCTI), store

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the connection. Nothing is loaded in the TPM between calls, so nothing is left there."""
        self._connection.close()

    def describe(self, selection: Selection) -> TpmEvidence:
        """Public keys, certificates and PCR values. Raises HardwareError, and RefusedError PCR_UNUSABLE."""
        with self._connection.work() as work:
            pcrs = keys.read_pcrs(work, selection)
            pcr_step(pcrs)  # refuses PCRs into which nothing was measured
            _, storage_root_key, _ = keys.storage_root_key(work)
            handle, attestation_key = keys.attestation_key(work)
            work.flush(handle)
            endorsement_keys = keys.endorsement_keys(work)
            public = storage_root_key.raw, attestation_key.raw
            return TpmEvidence(*probing.identity(work), endorsement_keys, *public, pcrs)

    def prove(self, evidence: TpmEvidence, statement: bytes) -> bytes:
        """TPM2B_ATTEST and TPMT_SIGNATURE of a quote of the evidence's PCRs over SHA-256 of `statement`.

        Raises DamagedError QUOTE_INVALID where the PCRs have changed since.
        """
        selection = keys.tpm_selection(Selection.of(evidence.pcrs))
        with self._connection.work() as work:
            handle, attestation_key = keys.attestation_key(work)
            attest, signature = work.call("quote", handle, selection, quote_data(statement))
            quote = bytes(attest.marshal() + signature.marshal())
        check_quote(attestation_key, quote, statement, evidence.pcrs)
        return quote

    def install(self, binding: TpmBinding, approvals: Sequence[Approval]) -> bytes:
        """Import the sealed value, activate both shares, have the approvals' signatures checked.

        Raises RefusedError WRONG_DEVICE where the binding was made for another TPM, DamagedError, HardwareError.
        """
        sealed = Sealed.check(binding, approvals)
        with self._connection.work() as work:
            root, public, handle = keys.storage_root_key(work, binding.storage_root_key)
            private = installing.import_sealed(work, root, sealed)
            shares = installing.activate(work, root, sealed)
            return Held.of(binding, public, handle, private, shares, _tickets(work, sealed)).write()

    def admit(self, binding: TpmBinding, held: bytes, approval: Approval) -> bytes:
        """`held` with the TPM's word on one more approval. Raises RefusedError PLATFORM_UNAPPROVED for another's."""
        sealed, kept = Sealed.check(binding, [approval]), Held.read(held, binding)
        if not sealed.approvals:
            what = f'This license does not ask for "{approval.product}", generation {approval.generation}.'
            hint = "Ask the vendor for an approval for this license's product and generation."
            raise RefusedError(Reason.PLATFORM_UNAPPROVED, what, hint)
        with self._connection.work() as work:
            return kept.with_tickets(_tickets(work, sealed)).write()

    def unwrap(
        self, binding: TpmBinding, held: bytes, approvals: Sequence[Approval], pin: PinSource | None
    ) -> Unwrapped:
        """The member secret. What can be found wrong without the TPM is found before its first command.

        Raises RefusedError (PLATFORM_UNAPPROVED, PCR_MISMATCH, PIN_NEEDED, PIN_WRONG, WRONG_DEVICE), DamagedError,
        HardwareError, AbsentError.
        """
        sealed, kept = _approved(binding, approvals), Held.read(held, binding)
        auth = _authorization(binding, pin)  # before the TPM is taken: a person may think for a while
        with auth, self._connection.work() as work:
            root, loaded = opening.load(work, kept, sealed)
            if binding.pin:
                work.call("tr_set_auth", loaded, bytes(auth.buffer))  # a copy that only the collector can take away
            with (
                self._index_auth(binding) as indexes,
                opening.Opening(work, root, loaded, sealed, kept, indexes).unseal() as value,
            ):
                return Unwrapped(member_secret(value, *kept.shares), self._anchor(sealed, kept))

    def present(self, binding: TpmBinding, held: bytes, number: int = 0) -> None:  # noqa: ARG002  # each proof is fresh
        """Prove with two commands that the storage root key is here. Raises AbsentError, and HardwareError."""
        kept = Held.read(held, binding)
        with self._connection.work() as work:
            try:
                root = opening.storage_root_key(work, kept)
                # Only the TPM that has the key learns the salt, without which it cannot authenticate its answer.
                session = work.session(root, TPM2_SE.HMAC, TPMA_SESSION.ENCRYPT)
                work.call("get_random", 16, session1=session)
                work.ended(session)
            except (TSS2_Exception, RefusedError) as error:
                if isinstance(error, TSS2_Exception) and code(error) not in _NOT_HERE:
                    raise
                what = "The TPM that this license was issued for is not here, or it was cleared."
                raise AbsentError(Reason.TPM_ABSENT, what, "After a clear, enroll the device again.") from error

    # ---- counted licenses

    def provide_counter(self) -> TpmCounter:
        """A counter for a license to come. Raises HardwareError TPM_NV_FULL, TPM_AUTHORIZATION."""
        if self._store is None:
            raise _nowhere()
        with self._store.alone(), self._connection.work() as work:
            root, _, _ = keys.storage_root_key(work)
            return providing.provide(work, root, self._store)

    def commit(self, binding: TpmBinding, held: bytes, approvals: Sequence[Approval]) -> None:
        """Put a revision in force. Raises as `Commitment.commit`."""
        if binding.counter is None:
            return
        sealed, kept = _approved(binding, approvals), Held.read(held, binding)
        with self._index_auth(binding) as auth, self._connection.work() as work:
            root = opening.storage_root_key(work, kept)
            Commitment(work, root, sealed, kept, auth).commit(binding.counter)

    def retire(self, binding: TpmBinding) -> None:
        """Take away counter and indexes of a binding that a later one does without. Raises HardwareError."""
        if binding.counter is not None:
            with self._connection.work() as work:
                retire(work, binding.counter)

    def use(self, binding: TpmBinding, held: bytes) -> Counted:
        """What is spent of a counted license, and whether it is in force. Spends nothing. Raises HardwareError."""
        sealed, kept = Sealed.check(binding, []), Held.read(held, binding)
        with self._index_auth(binding) as auth, self._connection.work() as work:
            root = opening.storage_root_key(work, kept)
            indexes = counting.Indexes(work, root, auth)
            state, now, opens = indexes.standing(binding.counter), clock.time(work, root), None
            index = next((index for index in binding.indexes if index.purpose == "opens"), None)
            if index is not None and state == "current":
                asked = sealed.conditions
                try:
                    opens, now = indexes.read(asked.public(index), asked.branches(index))
                except TSS2_Exception as error:
                    if code(error) not in counting.GONE:
                        raise
                    state = "lost"
            return Counted(state, opens, index.limit if index else None, now.clock, binding.deadline)

    # ---- certifying

    def certify(
        self,
        binding: TpmBinding,
        selection: Selection,
        statement: bytes,
        pin: PinSource | None,  # noqa: ARG002  # the attestation key takes none
    ) -> TpmCertificate:
        """A quote of the selected PCRs over SHA-256 of `statement`, by the attestation key that the binding names.

        Raises RefusedError WRONG_DEVICE, PCR_UNUSABLE, HardwareError, DamagedError QUOTE_INVALID.
        """
        with self._connection.work() as work:
            handle, key = keys.attestation_key(work)
            if key.name != binding.attestation_key:
                raise keys.wrong_device("its attestation key is not this one's")
            for _ in range(_QUOTES - 1):
                with suppress(DamagedError):  # a PCR was extended after it was read
                    return _certificate(work, handle, key, selection, statement)
            return _certificate(work, handle, key, selection, statement)

    def _anchor(self, sealed: Sealed, held: Held) -> TpmAnchor | None:
        index = next((index for index in sealed.binding.indexes if index.purpose == "anchor"), None)
        if index is None:
            return None
        return TpmAnchor(self._connection, sealed, held, index, partial(self._index_auth, sealed.binding))

    def _index_auth(self, binding: TpmBinding) -> Secret:
        """The authValue of the license's counter and indexes; empty where it has none. Raises DamagedError."""
        if binding.counter is None:
            return Secret(bytearray())
        if self._store is None:
            raise _nowhere()
        auth = self._store.read(binding.counter.handle)
        if auth is None:
            what = f"The home lacks what lets the device use the counter 0x{binding.counter.handle:08x} of its license."
            hint = (
                "Restore it from a backup of the home. Without one the license never opens again: "
                "enroll anew (--counted), and ask the vendor for a license or revision for that request."
            )
            raise DamagedError(Reason.HOME_DAMAGED, what, hint)
        return auth


def _approved(binding: TpmBinding, approvals: Sequence[Approval]) -> Sealed:
    """As `Sealed.check`. Raises RefusedError PLATFORM_UNAPPROVED, too, where one of the approvals is needed."""
    sealed = Sealed.check(binding, approvals)
    if binding.platform and not sealed.approvals:
        what = "There is no approval of a platform state for this license's product and generation."
        hint = "Ask the vendor for one, then: hwlicense device install APPROVAL."
        raise RefusedError(Reason.PLATFORM_UNAPPROVED, what, hint)
    return sealed


def _nowhere() -> UsageError:
    what = "This license is counted by a TPM, and there is no home that keeps what that takes."
    return UsageError(Reason.USAGE, what, "Give the device's home.")


_QUOTES: Final = 5


def _certificate(work: Work, handle: ESYS_TR, key: Public, selection: Selection, statement: bytes) -> TpmCertificate:
    from hwlicense.core.chain import TpmCertificate  # noqa: PLC0415  # most applications have nothing certified

    pcrs = keys.read_pcrs(work, selection)
    attest, signature = work.call("quote", handle, keys.tpm_selection(selection), quote_data(statement))
    quote = bytes(attest.marshal() + signature.marshal())
    check_quote(key, quote, statement, pcrs)
    return TpmCertificate(key.raw, pcrs, quote)


_NOT_HERE: Final = (*NOT_ITS_OWN, *WRONG_AUTHORIZATION, TPM2_RC.HANDLE)


def _authorization(binding: TpmBinding, pin: PinSource | None) -> Secret:
    """The authValue that stands for the PIN; empty where none is asked for. Raises RefusedError PIN_NEEDED."""
    if not binding.pin:
        return Secret(bytearray())
    if pin is None:
        what = "This license asks for a PIN."
        raise RefusedError(Reason.PIN_NEEDED, what, "Give it when asked, in a file (--pin-file), or by pin= in Python.")
    with pin("PIN that its TPM asks for") as given:
        return pin_value(given)


def _tickets(work: Work, sealed: Sealed) -> list[Ticket]:
    if sealed.policy_key is None or sealed.binding.platform is None:
        return []
    key, platform = sealed.policy_key, sealed.binding.platform
    return [Ticket(a.policy, installing.ticket(work, key, a.policy, platform, a.signature)) for a in sealed.approvals]
