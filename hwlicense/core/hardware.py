"""What the loader asks of hardware, whatever it is. Drivers live in `hwlicense.binders`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias, TypeVar, runtime_checkable

import msgspec

from hwlicense.core.errors import Reason, RefusedError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType

    from hwlicense.core.chain import Certificate
    from hwlicense.core.documents import Approval, TpmBinding, TpmCounter
    from hwlicense.core.secret import Secret
    from hwlicense.core.tpm.pcrs import Selection
    from hwlicense.core.tpm.standing import State


class PinPrompt(str):  # noqa: SLOT000  # they would take typing stubs to be seen by a type checker
    """A sentence that asks a person for a PIN, and for programs: which kind of hardware wants it (tpm, pkcs11).

    `pieces` of the license's hardware take a PIN, `alike` of them of this kind: one PIN is for one piece alone.
    """

    kind: str
    pieces: int
    alike: int

    def __new__(cls, text: str, kind: str, pieces: int, alike: int) -> Self:
        """`text` with what it is about."""
        made = super().__new__(cls, text)
        made.kind, made.pieces, made.alike = kind, pieces, alike
        return made


class PinSource(Protocol):
    """Gives the PIN that `prompt` asks for. Called once for each license, or token, that is tried."""

    def __call__(self, prompt: str, /, *, last_try: bool = False) -> Secret:
        """The PIN. At the last try before the hardware locks, only after a second yes.

        Raises RefusedError PIN_NEEDED where nobody can be asked, PIN_LAST_TRY where nobody said that yes.
        """


def last_try_refused(prompt: str) -> RefusedError:
    """What is said where the last try of the PIN that `prompt` asks for was not agreed to."""
    what = f"One more wrong PIN locks the hardware, so this last try needs a second yes. {prompt}."
    hint = "Be sure of the PIN; then answer yes at the prompt, or give --last-try (last_try=True in Python)."
    return RefusedError(Reason.PIN_LAST_TRY, what, hint)


class TouchRequest(Protocol):
    """Tells a person that hardware waits for a finger."""

    def __call__(self, prompt: str, /) -> object:
        """`prompt` is a sentence. Must not wait: the hardware goes on waiting meanwhile."""


class Reading(msgspec.Struct, frozen=True):
    """What an anchor says: its count of `steps`; milliseconds of powered-on time, ever (`clock`) and since power-up.

    The clock may have lost up to `lapse` milliseconds at each power cut.
    """

    steps: int
    clock: int
    uptime: int
    lapse: int


class Steps(Protocol):
    """A count in hardware that only goes up."""

    def read(self) -> Reading:
        """The count as it is. Raises HardwareError, AbsentError, RefusedError LICENSE_SUPERSEDED."""

    def step(self) -> Reading:
        """Count one more, and read. Raises as `read`; the step may have been counted then.

        One whose answer came too late is given by the next call in the same process, instead of another.
        """


class Anchor(Steps, Protocol):
    """What an older ledger is told from the latest by.

    For use at any time while the license is open, by any thread, and in forked processes.
    """

    def together(self) -> AbstractContextManager[Steps]:
        """The same for several uses right after one another: the hardware is kept meanwhile, and asked for less.

        What the block raises, and what hardware says at its end, is raised as by `read`. Others wait: it must not wait
        for what they hold.
        """


class CounterStore(Protocol):
    """Keeps what lets a device count: for each of its NV counters, the authValue that its indexes share (32 bytes)."""

    def read(self, handle: int) -> Secret | None:
        """The authValue, for whoever asks to wipe; None where none is kept. Raises DamagedError HOME_DAMAGED."""

    def keep(self, handle: int, value: Secret) -> None:
        """Keep it, before the counter is made. Raises StorageError."""

    def alone(self) -> AbstractContextManager[None]:
        """Keep installations and other enrolments waiting. Raises StorageError."""

    def spare(self) -> list[int]:
        """Counters that were made and that no license uses, installed or about to be."""


class Counted(msgspec.Struct, frozen=True):
    """What a TPM says of a license that it counts. The clock and the deadline are in milliseconds.

    `state` is "lost" also where an index is gone. `opens` are those spent; None where they are not counted or cannot be
    told.
    """

    state: State
    opens: int | None
    limit: int | None
    clock: int
    deadline: int | None


class Unwrapped(msgspec.Struct, frozen=True):
    """The member secret, 32 bytes, for whoever asked to wipe; and the ledger's anchor, where the license has one."""

    secret: Secret
    anchor: Anchor | None = None


E = TypeVar("E")
B_contra = TypeVar("B_contra", contravariant=True)


class Hardware(Protocol[E, B_contra]):
    """A context manager over hardware of one kind, with its evidence and bindings. Opened afresh after a fork.

    `held` is what the device's home keeps for a binding: opaque, written by `install` and `admit`.
    """

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

    def describe(self, selection: Selection) -> E:
        """Evidence for a request, with the present values of the selected PCRs."""

    def prove(self, evidence: E, statement: bytes) -> bytes:
        """The hardware's signature over `statement` (and what it measured), for the request that holds `evidence`.

        Empty where it cannot sign: what is wrapped for it opens nowhere else, whoever wrote the request.
        """

    def install(self, binding: B_contra, approvals: Sequence[Approval]) -> bytes:
        """Take in a binding made for this hardware. Raises RefusedError WRONG_DEVICE where it was made for another."""

    def admit(self, binding: B_contra, held: bytes, approval: Approval) -> bytes:
        """`held`, with a further approval checked by the hardware."""

    def unwrap(self, binding: B_contra, held: bytes, approvals: Sequence[Approval], pin: PinSource | None) -> Unwrapped:
        """The member secret of `binding`, if hardware, state and PIN are right."""

    def present(self, binding: B_contra, held: bytes, number: int = 0) -> None:
        """Prove that the hardware is here. Raises AbsentError.

        `number` counts the proofs of this binding so far: hardware with a store of proofs takes another each time.
        """


@runtime_checkable
class Counting(Protocol):
    """What hardware does, besides, that counts for licenses: a TPM."""

    def provide_counter(self) -> TpmCounter:
        """A counter for a license to come, at an odd value."""

    def commit(self, binding: TpmBinding, held: bytes, approvals: Sequence[Approval]) -> None:
        """Put a revision in force whose `held` is kept: older ones open nothing from here on. Again, it does nothing.

        A cut at any point leaves what doing it again brings to its end.
        """

    def retire(self, binding: TpmBinding) -> None:
        """Take away counter and indexes of a binding that a later one does without; from here on it opens nothing."""

    def use(self, binding: TpmBinding, held: bytes) -> Counted:
        """What is spent of a counted license, and whether it is in force. Spends nothing."""


@runtime_checkable
class Certifying(Protocol[B_contra]):
    """What hardware does, besides, that signs for the outside what happens on its device: a TPM, and most tokens."""

    def certify(self, binding: B_contra, selection: Selection, statement: bytes, pin: PinSource | None) -> Certificate:
        """Its word for `statement`, by a key that the binding names, with the present values of the selected PCRs.

        Raises RefusedError WRONG_DEVICE, PIN_NEEDED, HardwareError (CERTIFYING_UNSUPPORTED where its key cannot sign).
        """


AnyHardware: TypeAlias = Hardware[Any, Any]
"""Hardware of whatever kind a binding is for."""
