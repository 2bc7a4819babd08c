"""NV indexes: what the vendor fixes of them, their Names, and the one write that is allowed (Part 2, 13; Part 1, 37).

A Name is made from handle and template, never taken from a request: an ordinary index at the counter's handle, written
up and down at will, has another.
"""

from __future__ import annotations

import hashlib
import secrets
from enum import IntFlag
from typing import TYPE_CHECKING, Final

import msgspec

from hwlicense.core.errors import DamagedError, Reason
from hwlicense.core.tpm.wire import Algorithm, number, sized

if TYPE_CHECKING:
    from collections.abc import Container

    from hwlicense.core.documents import TpmCounter

SIZE: Final = 8
"""Bytes of each index of the project: a count, or a count and its limit of four bytes each."""

FIRST, LAST, BLOCK = 0x01880000, 0x018FFFFF, 4
"""The project's handles, in blocks: the counter, the opens index, the index of the ledger's anchor, and one spare."""

UNCOUNTABLE: Final = 2**32 - 1
"""The limit of an index that only counts."""

NV_WRITE: Final = 0x137
"""TPM_CC_NV_Write."""


class NvAttributes(IntFlag):
    """TPMA_NV (Part 2, 13.4), those that the project's indexes have; the types are values of one field."""

    AUTH_WRITE = 1 << 2
    POLICY_WRITE = 1 << 3
    COUNTER = 1 << 4
    PIN_PASS = 9 << 4
    AUTH_READ = 1 << 18
    POLICY_READ = 1 << 19
    NO_DA = 1 << 25
    WRITTEN = 1 << 29


_A = NvAttributes
_COUNTER: Final = _A.COUNTER | _A.AUTH_WRITE | _A.AUTH_READ | _A.NO_DA
_PIN_PASS: Final = _A.PIN_PASS | _A.POLICY_WRITE | _A.POLICY_READ | _A.AUTH_READ | _A.NO_DA


class NvPublic(msgspec.Struct, frozen=True):
    """TPMS_NV_PUBLIC (Part 2, 13.5) of an index named by SHA-256."""

    handle: int
    attributes: NvAttributes
    policy: bytes = b""

    @property
    def raw(self) -> bytes:
        """TPMS_NV_PUBLIC, without the size that a TPM2B puts before it."""
        kind = number(self.handle, 4) + number(Algorithm.SHA256, 2) + number(self.attributes, 4)
        return kind + sized(self.policy) + number(SIZE, 2)

    @property
    def name(self) -> bytes:
        """The TPM's Name of the index: it tells whether the index was ever written, too."""
        return number(Algorithm.SHA256, 2) + hashlib.sha256(self.raw).digest()

    @property
    def unwritten(self) -> NvPublic:
        """The same as it is from its definition to its first write."""
        return NvPublic(self.handle, self.attributes & ~_A.WRITTEN, self.policy)


def counter_public(handle: int) -> NvPublic:
    """A revision counter in use: it counts up, by whoever knows its authValue, and never down."""
    return NvPublic(handle, _COUNTER | _A.WRITTEN)


def pin_pass_public(handle: int, policy: bytes) -> NvPublic:
    """An index in use that counts each use of its authValue, up to its limit."""
    return NvPublic(handle, _PIN_PASS | _A.WRITTEN, policy)


def check_counter(counter: TpmCounter) -> None:
    """That a request's counter is one that `device enroll --counted` makes. Raises DamagedError EVIDENCE_INVALID."""
    if not FIRST <= counter.handle <= LAST or counter.handle % BLOCK or not counter.value % 2:
        what = f"The counter 0x{counter.handle:08x} (value {counter.value:,}) is none that enrolling makes."
        raise DamagedError(Reason.EVIDENCE_INVALID, what)


def free_block(taken: Container[int]) -> int:
    """The first handle of a random block of which none is taken: several vendors' licenses share a chip."""
    while True:
        first = FIRST + BLOCK * secrets.randbelow((LAST + 1 - FIRST) // BLOCK)
        if not any(handle in taken for handle in range(first, first + BLOCK)):
            return first


def limit_data(limit: int) -> bytes:
    """TPMS_NV_PIN_COUNTER_PARAMETERS: nothing counted yet, and the limit."""
    return number(0, 4) + number(limit, 4)


def write_hash(index: NvPublic, data: bytes) -> bytes:
    """The cpHash (Part 1, 18.7) of TPM2_NV_Write of `data` to the index, by its own authority, from its start."""
    name = index.unwritten.name
    return hashlib.sha256(number(NV_WRITE, 4) + name + name + sized(data) + number(0, 2)).digest()
