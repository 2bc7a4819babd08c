"""The TPM's wire format: big-endian numbers, and buffers that start with their size in two bytes (TPM2B)."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final

from hwlicense.core.errors import DamagedError, Reason
from hwlicense.core.wording import quantity

if TYPE_CHECKING:
    from collections.abc import Container


class Algorithm(IntEnum):
    """TPM_ALG_ID (Part 2, 6.3): those that this project uses."""

    RSA = 0x0001
    AES = 0x0006
    KEYEDHASH = 0x0008
    SHA256 = 0x000B
    SHA384 = 0x000C
    SHA512 = 0x000D
    NULL = 0x0010
    RSASSA = 0x0014
    ECDSA = 0x0018
    ECC = 0x0023
    CFB = 0x0043


DIGEST_SIZES: Final = {Algorithm.SHA256: 32, Algorithm.SHA384: 48, Algorithm.SHA512: 64}


def number(value: int, size: int) -> bytes:
    """`value` in `size` bytes."""
    return value.to_bytes(size, "big")


def sized(content: bytes | bytearray) -> bytes:
    """A TPM2B. Raises OverflowError above 65,535 bytes."""
    return number(len(content), 2) + content


class Reader:
    """Takes a structure apart from its start; whatever does not fit raises DamagedError with `reason`."""

    def __init__(self, raw: bytes, what: str, reason: Reason = Reason.EVIDENCE_INVALID) -> None:
        self._raw, self._at, self._what, self._reason = bytes(raw), 0, what, reason

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        part = self._raw[self._at : self._at + size]
        if len(part) != size:
            raise self.damaged("it ends too early")
        self._at += size
        return part

    def number(self, size: int) -> int:
        """The number in the next `size` bytes."""
        return int.from_bytes(self.take(size), "big")

    def sized(self, limit: int = 512) -> bytes:
        """The content of a TPM2B of at most `limit` bytes."""
        size = self.number(2)
        if size > limit:
            raise self.damaged(f"a field has {size} bytes where {limit} are allowed")
        return self.take(size)

    def algorithm(self, allowed: Container[Algorithm], what: str) -> Algorithm:
        """One of the algorithms that may stand here; `what` names the place."""
        code = self.number(2)
        if code not in allowed:
            raise self.damaged(f"{what} 0x{code:04x} is not supported")
        return Algorithm(code)

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._raw) - self._at)

    def end(self) -> None:
        """Nothing may be left."""
        if self._at != len(self._raw):
            raise self.damaged(f"after its end there is more: {quantity(len(self._raw) - self._at, 'byte')}")

    def damaged(self, why: str) -> DamagedError:
        """The error to raise."""
        hint = "Get the file again from where it was made; it must not be edited."
        return DamagedError(self._reason, f"The {self._what} is not valid: {why}.", hint)
