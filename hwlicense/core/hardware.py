"""What the loader asks of hardware, whatever it is. Drivers live in `hwlicense.binders`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from hwlicense.core.documents import Approval, Binding, Evidence
    from hwlicense.core.secret import Secret
    from hwlicense.core.tpm.pcrs import Selection


class PinSource(Protocol):
    """Gives the PIN of the license that `prompt` names. Called once for each license that is tried."""

    def __call__(self, prompt: str) -> Secret:
        """Raises RefusedError PIN_NEEDED where nobody can be asked."""


class Unwrapped(NamedTuple):
    """The member secret, 32 bytes, for whoever asked to wipe."""

    secret: Secret


class Hardware(Protocol):
    """A context manager over one piece of hardware. Used after a fork, it opens its connection afresh.

    `held` is what the device's home keeps for a binding: opaque, written by `install` and `admit`.
    """

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

    def describe(self, selection: Selection) -> Evidence:
        """Evidence for a request, with the present values of the selected PCRs."""

    def prove(self, evidence: Evidence, statement: bytes) -> bytes:
        """The hardware's signature over `statement` (and what it measured), for the request that holds `evidence`."""

    def install(self, binding: Binding, approvals: Sequence[Approval]) -> bytes:
        """Take in a binding made for this hardware. Raises RefusedError WRONG_DEVICE where it was made for another."""

    def admit(self, binding: Binding, held: bytes, approval: Approval) -> bytes:
        """`held`, with a further approval checked by the hardware."""

    def unwrap(self, binding: Binding, held: bytes, approvals: Sequence[Approval], pin: PinSource | None) -> Unwrapped:
        """The member secret of `binding`, if hardware, state and PIN are right."""

    def present(self, binding: Binding, held: bytes) -> None:
        """Prove that the hardware is here. Raises AbsentError."""
