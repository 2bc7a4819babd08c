"""A secret held in memory that is overwritten when it is no longer needed."""

from __future__ import annotations

import hmac
import secrets
from typing import TYPE_CHECKING, NoReturn, Self

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

if TYPE_CHECKING:
    from collections.abc import Iterable

SIZE = 32
"""Bytes in every secret and key of the project."""


class _Buffer(bytearray):
    """Overwritten when the last reference to it goes, and not before: it may outlive its `Secret`."""

    def __del__(self) -> None:
        self[:] = bytes(len(self))


class Secret:
    """Mutable bytes, overwritten by `wipe()`, at the end of a `with` block, and when nothing refers to them any more.

    `buffer` is what the cryptography is given; it is never copied into an immutable object by this class. What it is
    made from is taken over and overwritten. `random` alone leaves a copy: Python has the system's generator in
    immutable bytes only, which are freed at once but not overwritten.
    """

    __slots__ = ("buffer",)

    def __init__(self, content: bytearray) -> None:
        self.buffer = _Buffer(content)
        content[:] = bytes(len(content))

    @classmethod
    def random(cls, size: int = SIZE) -> Self:
        """A fresh one from the system's generator. The vendor's side makes secrets; no device does."""
        return cls(bytearray(secrets.token_bytes(size)))

    def wipe(self) -> None:
        """Overwrite with zeros. The object stays usable, as a secret of zeros."""
        self.buffer[:] = bytes(len(self.buffer))

    def __len__(self) -> int:
        return len(self.buffer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self.buffer, other.buffer)

    __hash__ = None  # type: ignore[assignment]  # a hash of a secret would be a copy of it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.wipe()

    def __repr__(self) -> str:
        return f"<Secret of {len(self.buffer)} bytes>"

    def __reduce__(self) -> NoReturn:
        msg = "a secret cannot be pickled or copied"
        raise TypeError(msg)


def derive(material: Iterable[Secret], purpose: bytes, *context: bytes) -> Secret:
    """HKDF-SHA256 (RFC 5869) of the joined `material`, 32 bytes, for one purpose in one context.

    Every field of the context goes in with its length, so no two lists of fields give the same key.
    """
    info = b"hwlicense 1 " + b"".join(len(field).to_bytes(4, "big") + field for field in (purpose, *context))
    out = Secret(bytearray(SIZE))
    with joined(*material) as whole:
        HKDF(hashes.SHA256(), SIZE, None, info).derive_into(whole.buffer, out.buffer)
    return out


def joined(*parts: Secret) -> Secret:
    """All parts in one buffer that never grew: growing would leave copies behind."""
    whole, at = Secret(bytearray(sum(map(len, parts)))), 0
    for part in parts:
        whole.buffer[at : at + len(part)] = part.buffer
        at += len(part)
    return whole
