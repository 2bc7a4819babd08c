"""What the device's home keeps for a binding to a TPM."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Final, Self

import msgspec

from hwlicense.core.errors import DamagedError, Reason
from hwlicense.core.schema import SCHEMA, Blob, Digest, Document, decode, encode
from hwlicense.core.secret import Secret
from hwlicense.core.tpm.structures import Public
from hwlicense.core.tpm.wire import number

if TYPE_CHECKING:
    from hwlicense.core.documents import TpmBinding

_TAG: Final = b"\x80\x22"  # TPM_ST_VERIFIED; then the hierarchy, and a digest with its size
_HINT: Final = "Install the license again: hwlicense device install."


class Ticket(Document, frozen=True):
    """TPMT_TK_VERIFIED: the TPM's word that the policy key signed the platform state `policy`. Dies at TPM2_Clear."""

    policy: Digest
    ticket: Annotated[bytes, msgspec.Meta(max_length=72)]


class Held(Document, frozen=True):
    """Opens nothing without the TPM. The shares alone are secret, and of no use without the sealed value.

    `binding` is the SHA-256 of the binding that this belongs to; `private` is the TPM2B_PRIVATE that TPM2_Import
    gave out, without its size; `handle` is where the storage root key persists, null where it is made at each use.
    """

    schema: int
    binding: Digest
    storage_root_key: Blob
    handle: Annotated[int, msgspec.Meta(ge=0x81000000, le=0x81FFFFFF)] | None
    private: Annotated[bytes, msgspec.Meta(max_length=1024)]
    storage_share: Digest
    attestation_share: Digest
    tickets: Annotated[list[Ticket], msgspec.Meta(max_length=200)]

    @classmethod
    def of(
        cls,
        binding: TpmBinding,
        storage_root_key: Public,
        handle: int | None,
        private: bytes,
        shares: tuple[Secret, Secret],
        tickets: list[Ticket],
    ) -> Self:
        """What is to be kept after an installation; the shares are wiped."""
        with shares[0] as storage, shares[1] as attestation:
            parts = bytes(storage.buffer), bytes(attestation.buffer)
            return cls(SCHEMA, _digest(binding), storage_root_key.raw, handle, private, *parts, tickets)

    @classmethod
    def read(cls, raw: bytes, binding: TpmBinding) -> Self:
        """Raises DamagedError HOME_DAMAGED where `raw` is malformed or does not belong to `binding`."""
        try:
            held = decode(raw, cls)
        except DamagedError as error:
            raise DamagedError(Reason.HOME_DAMAGED, f"The installed license is damaged. {error.what}", _HINT) from error
        if held.binding != _digest(binding) or held.storage_root_public.name != binding.storage_root_key:
            what = "The TPM's part of the installed license belongs to another license."
            raise DamagedError(Reason.HOME_DAMAGED, what, _HINT)
        return held

    @property
    def storage_root_public(self) -> Public:
        """The storage root key, whose Name `read` has compared with the license."""
        return Public.parse(self.storage_root_key, Reason.HOME_DAMAGED)

    @property
    def shares(self) -> tuple[Secret, Secret]:
        """Both shares, for whoever asks to wipe."""
        return Secret(bytearray(self.storage_share)), Secret(bytearray(self.attestation_share))

    def ticket(self, policy: bytes) -> bytes | None:
        """The ticket for a platform state, if one is kept that looks like one: the TPM makes another."""
        kept = next((ticket.ticket for ticket in self.tickets if ticket.policy == policy), b"")
        return kept if kept[:2] == _TAG and kept[6:8] == number(len(kept) - 8, 2) else None

    def with_tickets(self, new: list[Ticket]) -> Self:
        """The same with these tickets in place of older ones for the same states."""
        states = {ticket.policy for ticket in new}
        return msgspec.structs.replace(self, tickets=[t for t in self.tickets if t.policy not in states] + new)

    def write(self) -> bytes:
        """The one encoding."""
        return encode(self)


def _digest(binding: TpmBinding) -> bytes:
    return hashlib.sha256(encode(binding)).digest()
