"""The policies of a license's TPM part, composed from what its binding says: by the vendor, and again by the device."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, Self

import msgspec

from hwlicense.core.errors import DamagedError, Reason
from hwlicense.core.tpm.nv import UNCOUNTABLE, NvPublic, counter_public, limit_data, pin_pass_public, write_hash
from hwlicense.core.tpm.pcrs import Selection, values_digest
from hwlicense.core.tpm.policy import (
    BELOW,
    CLOCK,
    EQUAL,
    NV_CERTIFY,
    NV_READ,
    SAFE,
    UNSEAL,
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
    digest,
    reference,
)
from hwlicense.core.tpm.structures import Public
from hwlicense.core.tpm.wire import number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwlicense.core.documents import TpmBinding, TpmCounter, TpmIndex

PLACES: Final = {"opens": 1, "anchor": 2}
"""Where an index lies after its counter, by purpose."""

CAP: Final = hashlib.sha256(b"hwlicense cap").digest()
"""What a device extends the cap's PCR by before it opens a capped license for the first time in a boot."""

NO_PCR: Final = PolicyPCR(Selection(), values_digest([]))
"""Sessions that are kept over a TPM restart end with it."""

MILLISECONDS: Final = 3_600_000
"""In an hour."""


class Conditions(msgspec.Struct, frozen=True):
    """What a binding's sealed object asks for before it opens. The fields are those of `TpmBinding`."""

    policy_key: Public | None
    platform: bytes | None
    pin: bool
    counter: TpmCounter | None = None
    indexes: Sequence[TpmIndex] = ()
    deadline: int | None = None
    cap: int | None = None

    @classmethod
    def of(cls, binding: TpmBinding) -> Self:
        """Raises DamagedError LICENSE_DAMAGED where they do not fit each other."""
        policy_key = Public.parse(binding.policy_key, Reason.LICENSE_DAMAGED) if binding.policy_key else None
        asked = cls(
            policy_key,
            binding.platform,
            binding.pin,
            binding.counter,
            tuple(binding.indexes),
            binding.deadline,
            binding.cap,
        )
        if not asked._consistent():
            what = "The license's TPM part contradicts itself."
            raise DamagedError(Reason.LICENSE_DAMAGED, what, "Ask the vendor for the license again.")
        return asked

    def _consistent(self) -> bool:
        counter = self.counter
        if (self.policy_key is None) != (self.platform is None and counter is None):
            return False
        if counter is None:
            return not self.indexes and self.deadline is None and self.cap is None
        purposes = [index.purpose for index in self.indexes]
        fitting = all(
            index.handle == counter.handle + PLACES[index.purpose]
            and (index.purpose == "opens" or index.limit == UNCOUNTABLE)
            for index in self.indexes
        )
        return fitting and counter.value % 2 == 0 and len(set(purposes)) == len(purposes)

    @property
    def first(self) -> Step:
        """An approved platform; its PolicyPCR is run before. Everything after it is the same for all of them."""
        if self.policy_key is None or self.platform is None:
            return NO_PCR
        return PolicyAuthorize(self.policy_key.name, self.platform)

    @property
    def sealed(self) -> list[Step]:
        """The policy of the sealed object. The index of opens comes last: it counts even where a later step fails."""
        steps = [self.first]
        if self.cap is not None:
            steps.append(cap_step(self.cap, hashlib.sha256(bytes(32) + CAP).digest()))
        if self.counter is not None:
            steps.append(PolicyNV(counter_public(self.counter.handle), number(self.counter.value, 8)))
        if self.deadline is not None:
            steps.append(PolicyCounterTimer(CLOCK, number(self.deadline, 8), BELOW))
            steps.append(PolicyCounterTimer(SAFE, b"\1", EQUAL))
        steps.append(PolicyCommandCode(UNSEAL))
        if self.pin:
            steps.append(PolicyAuthValue())
        return steps + [PolicySecret(self.public(index)) for index in self.indexes if index.purpose == "opens"]

    def public(self, index: TpmIndex) -> NvPublic:
        """An index of this revision, in use."""
        return pin_pass_public(index.handle, digest([self.branches(index)]))

    def branches(self, index: TpmIndex) -> PolicyOR:
        """What an index is good for by policy: the vendor's write, and to be read and certified, which never counts."""
        ways: tuple[Step, ...] = (self.permitted(index), PolicyCommandCode(NV_READ), PolicyCommandCode(NV_CERTIFY))
        return PolicyOR(tuple(digest([way]) for way in ways))

    def permitted(self, index: TpmIndex) -> PolicyAuthorize:
        """The vendor's signature on the write."""
        return PolicyAuthorize(self.policy_key.name if self.policy_key else b"", index.reference)

    def write(self, index: TpmIndex) -> list[Step]:
        """What the vendor signs of an index: count 0 and the limit, once, in the revision's write window.

        PolicyPCR comes first, so that sessions which are kept end when a PCR is extended, and with the boot.
        """
        steps = [self.first]
        if self.cap is not None:
            steps.append(cap_step(self.cap, bytes(32)))
        if self.counter is not None:
            steps.append(PolicyNV(counter_public(self.counter.handle), number(self.counter.value - 1, 8)))
        return [*steps, PolicyCpHash(write_hash(self.public(index), limit_data(index.limit)))]


def cap_step(cap: int, value: bytes) -> PolicyPCR:
    """The cap's PCR (sha256) has this value."""
    return PolicyPCR(Selection((("sha256", (cap,)),)), hashlib.sha256(value).digest())


def write_reference(purpose: str, vendor: str, license_id: str, value: int) -> bytes:
    """The policy reference of an index: one purpose of one vendor's license in one revision, and no other."""
    return reference(b"write", purpose.encode(), bytes.fromhex(vendor), bytes.fromhex(license_id), number(value, 8))
