"""The NV counter and indexes of one license in the TPM: made, read, and told from what else may lie at their handles.

Whatever matters is read over a session salted to the storage root key, by the authValue or by the read branch of the
index's policy, with the Name that the license fixes. Names that the TPM is merely asked for decide nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tpm2_pytss import (
    ESYS_TR,
    TPM2_RC,
    TPM2_SE,
    TPM2B_NV_PUBLIC,
    TPMA_SESSION,
    TPML_DIGEST,
    TSS2_Exception,
)

from hwlicense.binders.tpm import clock
from hwlicense.binders.tpm.failures import WRONG_AUTHORIZATION, code, defining_error
from hwlicense.core.tpm import standing
from hwlicense.core.tpm.nv import SIZE as NV_SIZE
from hwlicense.core.tpm.nv import NvPublic, counter_public
from hwlicense.core.tpm.policy import NV_READ, PolicyOR
from hwlicense.core.tpm.quote import Time, read_time
from hwlicense.core.tpm.wire import sized

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwlicense.binders.tpm.connection import Work
    from hwlicense.core.documents import TpmCounter
    from hwlicense.core.secret import Secret
    from hwlicense.core.tpm.standing import State

GONE: Final = (*WRONG_AUTHORIZATION, TPM2_RC.HANDLE, TPM2_RC.NV_UNINITIALIZED, TPM2_RC.AUTH_TYPE, TPM2_RC.POLICY_FAIL)
"""What an index answers that is not there, was never written, or is another one at the same handle."""

_CONTINUE, _ENCRYPT, _DECRYPT = (
    TPMA_SESSION.CONTINUESESSION,
    TPMA_SESSION.ENCRYPT,
    TPMA_SESSION.DECRYPT,
)


def count(content: bytes) -> int:
    """Of an index of type PIN_PASS, by its content."""
    return int.from_bytes(bytes(content)[:4], "big")


class Indexes:
    """Counter and indexes that share one authValue, within one work of a connection."""

    def __init__(self, work: Work, root: ESYS_TR, auth: Secret) -> None:
        self._work, self._root, self._auth = work, root, auth
        self._known: dict[bytes, ESYS_TR] = {}
        self._spare: ESYS_TR | None = None  # a session that goes on

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

    def standing(self, counter: TpmCounter | None) -> State:
        """How a license with this counter stands, by the counter's value, which the TPM authenticates."""
        return standing.of(self.found(counter), counter) if counter else "current"

    def found(self, counter: TpmCounter) -> int | None:
        """As `value`; None where it is not this device's counter."""
        try:
            return self.value(counter_public(counter.handle))
        except TSS2_Exception as error:
            if code(error) not in GONE:
                raise
            return None

    def read(self, public: NvPublic, branches: PolicyOR) -> tuple[int, Time]:
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
        return count(content), read_time(bytes(attested.attestationData))

    def lapse(self) -> int:
        """How many milliseconds the TPM's clock can lose at a power cut. Raises HardwareError TPM_UNSUPPORTED.

        The session that it takes is left for `step`.
        """
        self._spare = self._work.session(self._root, TPM2_SE.HMAC, TPMA_SESSION.AUDIT | _CONTINUE)
        found = clock.lapse(self._work, self._spare)
        self._work.call("trsess_set_attributes", self._spare, _CONTINUE)
        return found

    def step(self, public: NvPublic, tell: Callable[[int], None]) -> tuple[int, Time]:
        """Count one more, by reading with the index's authValue; and the time.

        `tell` is given the count when the TPM gives it, also if nobody waits for it any more.
        """
        session, self._spare = self._spare or self._work.session(self._root, TPM2_SE.HMAC, _CONTINUE), None
        index = self.handle(public)
        content = self._work.call(
            "nv_read", index, NV_SIZE, auth_handle=index, session1=session, told=lambda content: tell(count(content))
        )
        return count(content), clock.read(self._work, session)

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
