"""The NV counter and indexes of one license in the TPM: made, read, and told from what else may lie at their handles.

Whatever matters is read over a session salted to the storage root key, by the authValue or by the read branch of the
index's policy, with the Name that the license fixes. Names that the TPM is merely asked for decide nothing.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

from tpm2_pytss import (
    ESYS_TR,
    TPM2_CAP,
    TPM2_PT,
    TPM2_RC,
    TPM2_SE,
    TPM2B_NV_PUBLIC,
    TPMA_SESSION,
    TPML_DIGEST,
    TSS2_Exception,
)

from hwlicense.binders.tpm.failures import WRONG_AUTHORIZATION, code, defining_error
from hwlicense.core.documents import TpmCounter
from hwlicense.core.durations import spelled
from hwlicense.core.errors import DamagedError, HardwareError, Reason
from hwlicense.core.secret import SIZE, Secret
from hwlicense.core.tpm.composing import PLACES
from hwlicense.core.tpm.nv import SIZE as NV_SIZE
from hwlicense.core.tpm.nv import NvPublic, counter_public, free_block
from hwlicense.core.tpm.policy import NV_READ, PolicyOR
from hwlicense.core.tpm.quote import Time, read_time
from hwlicense.core.tpm.wire import sized

if TYPE_CHECKING:
    from hwlicense.binders.tpm.connection import Work
    from hwlicense.core.hardware import CounterStore

LONGEST_LAPSE: Final = 1 << 22
"""Milliseconds: no TPM updates the clock that it keeps over power cuts less often (Part 1, 36.3)."""

GONE: Final = (*WRONG_AUTHORIZATION, TPM2_RC.HANDLE, TPM2_RC.NV_UNINITIALIZED, TPM2_RC.AUTH_TYPE, TPM2_RC.POLICY_FAIL)
"""What an index answers that is not there, was never written, or is another one at the same handle."""

_FIRST_INDEX: Final = 0x01000000
_CONTINUE, _ENCRYPT, _DECRYPT, _AUDIT = (
    TPMA_SESSION.CONTINUESESSION,
    TPMA_SESSION.ENCRYPT,
    TPMA_SESSION.DECRYPT,
    TPMA_SESSION.AUDIT,
)


class Indexes:
    """Counter and indexes that share one authValue, within one work of a connection."""

    def __init__(self, work: Work, root: ESYS_TR, auth: Secret) -> None:
        self._work, self._root, self._auth = work, root, auth
        self._known: dict[bytes, ESYS_TR] = {}

    def handle(self, public: NvPublic) -> ESYS_TR:
        """For commands about an index that is what its license says, or fail."""
        if public.name not in self._known:
            self._authorized(public, self._work.known_index(public))
        return self._known[public.name]

    def name(self, handle: int) -> bytes | None:
        """The Name of what lies at a handle now, None where nothing does. Nothing vouches for it."""
        try:
            found = self._work.borrow(self._work.call("tr_from_tpmpublic", handle))
        except TSS2_Exception as error:
            if code(error) == TPM2_RC.HANDLE:
                return None
            raise
        return bytes(self._work.call("tr_get_name", found))

    # ---- reading

    def value(self, counter: NvPublic) -> int:
        """The counter's value. Raises TSS2_Exception with a code of `GONE` where it is not this device's counter."""
        session = self._work.session(self._root, TPM2_SE.HMAC, TPMA_SESSION(0))
        index = self.handle(counter)
        content = self._work.call("nv_read", index, NV_SIZE, auth_handle=index, session1=session)
        self._work.ended(session)
        return int.from_bytes(bytes(content), "big")

    def counted(self, public: NvPublic, branches: PolicyOR) -> tuple[int, Time]:
        """How often an index was used, by the branch of its policy that does not count; and the time."""
        work = self._work
        session = work.session(self._root, TPM2_SE.POLICY, _CONTINUE | _ENCRYPT)
        work.call("policy_command_code", session, NV_READ)
        work.call("policy_or", session, TPML_DIGEST(list(branches.branches)))
        index = self.handle(public)
        content = bytes(work.call("nv_read", index, NV_SIZE, auth_handle=index, session1=session))
        work.call("trsess_set_attributes", session, _ENCRYPT)
        plain = {"session1": ESYS_TR.PASSWORD, "session2": ESYS_TR.PASSWORD}
        attested, _ = work.call("get_time", ESYS_TR.NULL, b"", session3=session, **plain)
        work.ended(session)
        return int.from_bytes(content[:4], "big"), read_time(bytes(attested.attestationData))

    def step(self, public: NvPublic) -> tuple[int, Time]:
        """Count one more, by reading with the index's authValue; and the time."""
        session = self._work.session(self._root, TPM2_SE.HMAC, _CONTINUE)
        index = self.handle(public)
        content = bytes(self._work.call("nv_read", index, NV_SIZE, auth_handle=index, session1=session))
        return int.from_bytes(content[:4], "big"), _time(self._work, session)

    # ---- changing

    def define(self, public: NvPublic) -> None:
        """Make an index that is not written yet; its authValue is not seen on the bus. Raises HardwareError."""
        work = self._work
        area, _ = TPM2B_NV_PUBLIC.unmarshal(sized(public.unwritten.raw))
        hidden = work.session(self._root, TPM2_SE.HMAC, _DECRYPT)
        try:
            made = work.call("nv_define_space", bytes(self._auth.buffer), area, session2=hidden)
        except TSS2_Exception as error:
            raise defining_error(error) from error
        work.ended(hidden)
        self._authorized(public.unwritten, work.borrow(made))

    def undefine(self, handle: int) -> None:
        """Take away whatever index lies at a handle."""
        found = self._work.call("tr_from_tpmpublic", handle)
        self._work.call("nv_undefine_space", found)

    def increment(self, public: NvPublic) -> None:
        """One more on a counter."""
        session = self._work.session(self._root, TPM2_SE.HMAC, TPMA_SESSION(0))
        index = self.handle(public)
        self._work.call("nv_increment", index, auth_handle=index, session1=session)
        self._work.ended(session)

    def _authorized(self, public: NvPublic, index: ESYS_TR) -> None:
        self._work.call("tr_set_auth", index, bytes(self._auth.buffer))
        self._known[public.name] = index


# ---- the clock ----


def time(work: Work, root: ESYS_TR) -> Time:
    """The TPM's time, which nobody between can change."""
    return _time(work, work.session(root, TPM2_SE.HMAC, _CONTINUE))


def _time(work: Work, session: ESYS_TR) -> Time:
    work.call("trsess_set_attributes", session, TPMA_SESSION(0))
    attested, _ = work.call("get_time", ESYS_TR.NULL, b"", session1=session, session2=ESYS_TR.PASSWORD)
    work.ended(session)
    return read_time(bytes(attested.attestationData))


def lapse(work: Work, root: ESYS_TR) -> int:
    """How many milliseconds the TPM's clock can lose at a power cut. Raises HardwareError TPM_UNSUPPORTED."""
    session = work.session(root, TPM2_SE.HMAC, _AUDIT)
    _, capability = work.call("get_capability", TPM2_CAP.TPM_PROPERTIES, TPM2_PT.CLOCK_UPDATE, 1, session1=session)
    work.ended(session)
    facts = {int(fact.property): int(fact.value) for fact in capability.data.tpmProperties}
    found = facts.get(int(TPM2_PT.CLOCK_UPDATE), 0)
    if not 0 < found <= LONGEST_LAPSE:
        what = f"The TPM says that it keeps its clock every {found:,} ms, which no TPM should."
        raise HardwareError(Reason.TPM_UNSUPPORTED, what, "Update the TPM's firmware.")
    return found


def make_safe(work: Work, root: ESYS_TR) -> None:
    """After a power cut, set the clock on by as much as it can have lost: the TPM then vouches for it again at once.

    Takes the owner's authorization, and at most that time from the license.
    """
    forward = lapse(work, root)
    now = time(work, root)
    if now.safe:
        return
    session = work.session(root, TPM2_SE.HMAC, TPMA_SESSION(0))
    try:
        work.call("clock_set", now.clock + forward, session1=session)
    except TSS2_Exception as error:
        if code(error) not in WRONG_AUTHORIZATION:
            raise
        what = "After a power cut the TPM's clock is to be set on, and the TPM's owner hierarchy has a password."
        hint = f"Wait {spelled(forward / 1000)} with the TPM switched on, and try again."
        raise HardwareError(Reason.TPM_AUTHORIZATION, what, hint) from error
    work.ended(session)


# ---- enrolling ----


def provide(work: Work, root: ESYS_TR, store: CounterStore) -> TpmCounter:
    """A counter for a license to come, at an odd value: one that was made before and serves none, or a new one.

    One whose license was removed serves again, after those that never had any: at the odd value that license is dead,
    and what is left of its indexes goes when the new one is put in force. Raises HardwareError: TPM_NV_FULL,
    TPM_AUTHORIZATION.
    """
    taken = set(index_handles(work))
    for handle in sorted(store.spare(), key=lambda handle: any(handle + place in taken for place in PLACES.values())):
        try:
            auth = store.read(handle)
        except DamagedError:  # nobody can use that counter any more
            continue
        if auth is None:
            continue
        with auth:
            found = _odd(Indexes(work, root, auth), handle, made=handle in taken)
        if found is not None:
            return found
    handle = free_block(taken)
    with _auth_value() as auth:
        store.keep(handle, auth)
        found = _odd(Indexes(work, root, auth), handle, made=False)
    if found is None:
        what = "The TPM does not let its new counter be used."
        raise HardwareError(Reason.TPM_FAILED, what, "Run `hwlicense device doctor`.")
    return found


def _odd(indexes: Indexes, handle: int, *, made: bool) -> TpmCounter | None:
    """The counter at an odd value; None where another than ours lies there."""
    public = counter_public(handle)
    if not made:
        indexes.define(public)
    try:
        if not made or indexes.name(handle) == public.unwritten.name:
            indexes.increment(public.unwritten)
        value = indexes.value(public)
        if not value % 2:
            indexes.increment(public)
            value = indexes.value(public)
    except TSS2_Exception as error:
        if code(error) in GONE:
            return None
        raise
    return TpmCounter(handle, value)


def index_handles(work: Work) -> list[int]:
    """Where NV indexes are defined."""
    found: list[int] = []
    more = True
    while more:
        first = found[-1] + 1 if found else _FIRST_INDEX
        answer, capability = work.call("get_capability", TPM2_CAP.HANDLES, first, 254)
        page = list(map(int, capability.data.handles))
        found += page
        more = bool(answer) and bool(page)
    return found


def _auth_value() -> Secret:
    """TPMs drop trailing zeros of an authValue, so the last byte is none."""
    return Secret(bytearray(secrets.token_bytes(SIZE - 1) + bytes([1 + secrets.randbelow(255)])))
