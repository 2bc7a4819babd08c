"""Records, each with a number and authenticated (HMAC-SHA256) by a key from the license secret.

magic number payload code     8 bytes, 8, any, 32
"""

from __future__ import annotations

import hmac
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hwlicense.core.secret import Secret

PAGE: Final = 4096

CODE: Final = 32
"""Bytes at the end of a record that authenticate it."""

_MAGIC: Final = b"hwledger"
_HEAD: Final = struct.Struct("<8sq")


class Records:
    """Records of one account. Where each has a payload of `size` bytes, it takes `place` bytes of whole pages."""

    def __init__(self, key: Secret, size: int = 0) -> None:
        """`key` is taken over, and wiped by `close`."""
        self._key = key
        self.length, self.place = _HEAD.size + size + CODE, place(size)

    def made(self, purpose: bytes, number: int, payload: bytes) -> bytes:
        """A record; `length` bytes long for a payload of `size`."""
        content = _HEAD.pack(_MAGIC, number) + payload
        return content + self.code(purpose + content)

    def opened(self, purpose: bytes, raw: bytes) -> tuple[int, bytes] | None:
        """Number and payload; None where nobody who knows the key made it for this purpose."""
        if not hmac.compare_digest(self.code(purpose + raw[:-CODE]), raw[-CODE:]):
            return None
        return unchecked(raw[:-CODE])

    def code(self, content: bytes) -> bytes:
        """The 32 bytes that authenticate `content`."""
        return hmac.digest(self._key.buffer, content, "sha256")

    def close(self) -> None:
        """Wipe the key."""
        self._key.wipe()


def place(size: int) -> int:
    """Bytes of whole pages for a record with `size` bytes."""
    return -(-(_HEAD.size + size + CODE) // PAGE) * PAGE


def unchecked(raw: bytes) -> tuple[int, bytes] | None:
    """Number and payload, with what follows it, of what looks like a record: for reports."""
    if len(raw) < _HEAD.size or not raw.startswith(_MAGIC):
        return None
    return _HEAD.unpack_from(raw)[1], raw[_HEAD.size :]
