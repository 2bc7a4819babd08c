"""The keys between hardware and content, and how each wraps the next.

    member secrets (one per binding) -> license secret -> content key -> key table -> chunk keys

Every wrapping key below is derived from secrets that are drawn afresh for one license (or one package) and serves for
one message, so AES-256-GCM runs with a nonce of zeros: a nonce needs to differ only between uses of one key.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Final, Self

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from hwlicense.core.documents import ContentKeyWrap, SecretWrap, grant_digest
from hwlicense.core.errors import DamagedError, Reason
from hwlicense.core.secret import SIZE, Secret, derive

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey

    from hwlicense.core.documents import Grant, License

NONCE: Final = bytes(12)
TAG_SIZE: Final = 16
_CONTENT_SUITE: Final = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def wrap_once(key: Secret, secret: Secret) -> bytes:
    """`secret` under a key that serves only here: 16 bytes longer."""
    return AESGCM(key.buffer).encrypt(NONCE, secret.buffer, None)


def unwrap_once(key: Secret, wrapped: bytes) -> Secret:
    """Raises cryptography's InvalidTag where the key or the bytes are wrong."""
    out = Secret(bytearray(len(wrapped) - TAG_SIZE))
    AESGCM(key.buffer).decrypt_into(NONCE, wrapped, None, out.buffer)
    return out


def wrap_license_secret(secret: Secret, members: Sequence[Secret], need: int) -> list[SecretWrap]:
    """One wrap for each choice of `need` members: any of these subsets opens the license."""
    wraps = []
    for chosen in combinations(range(len(members)), need):
        with _member_key([members[place] for place in chosen], chosen) as key:
            wraps.append(SecretWrap(list(chosen), wrap_once(key, secret)))
    return wraps


def unwrap_license_secret(wraps: Sequence[SecretWrap], members: Mapping[int, Secret]) -> Secret:
    """The license secret from the members at hand, by their places. Raises DamagedError LICENSE_DAMAGED."""
    for wrap in wraps:
        if all(place in members for place in wrap.members):
            try:
                with _member_key([members[place] for place in wrap.members], wrap.members) as key:
                    return unwrap_once(key, wrap.wrapped)
            except InvalidTag:
                raise _damaged("The hardware's secret does not open the license secret") from None
    raise _damaged("No wrap of the license fits the hardware at hand")


def wrap_content_keys(secret: Secret, grant: Grant, content_keys: Sequence[Secret]) -> list[ContentKeyWrap]:
    """Each package's content key under license secret and grant: edited terms give another key, which opens nothing."""
    wraps = []
    for package, content_key in zip(grant.packages, content_keys, strict=True):
        with _grant_key(secret, grant, package.content_key) as key:
            wraps.append(ContentKeyWrap(package.content_key, wrap_once(key, content_key)))
    return wraps


def unwrap_content_key(secret: Secret, licensed: License, identifier: str) -> Secret:
    """The content key `identifier`. Raises DamagedError LICENSE_DAMAGED."""
    for wrap in licensed.keys:
        if wrap.content_key == identifier:
            try:
                with _grant_key(secret, licensed.grant, identifier) as key:
                    return unwrap_once(key, wrap.wrapped)
            except InvalidTag:
                raise _damaged("The license's grant and its keys do not belong together") from None
    raise _damaged("The license names the package but holds no key for it")


class Content(msgspec.Struct, frozen=True):
    """What a license opens: the content key, and what it encloses. A context manager that wipes both."""

    key: Secret
    enclosure: Secret

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.key.wipe()
        self.enclosure.wipe()


def seal_enclosure(secret: Secret, grant: Grant, enclosure: Secret) -> bytes:
    """What a license encloses for the application, under secret and grant; 16 bytes longer, nothing for none."""
    if not len(enclosure):
        return b""
    with _enclosure_key(secret, grant) as key:
        return wrap_once(key, enclosure)


def open_enclosure(secret: Secret, licensed: License) -> Secret:
    """Empty where the license encloses nothing. Raises DamagedError LICENSE_DAMAGED."""
    if not licensed.enclosure:
        return Secret(bytearray())
    try:
        with _enclosure_key(secret, licensed.grant) as key:
            return unwrap_once(key, licensed.enclosure)
    except (InvalidTag, ValueError):
        raise _damaged("What the license encloses and its grant do not belong together") from None


def wrap_for_vendor(content_key: Secret, identifier: str, public: MLKEM768X25519PublicKey) -> bytes:
    """A content key for its own vendor's later use."""
    return seal_for_vendor(content_key, b"content key", identifier, public)


def unwrap_for_vendor(wrapped: bytes, identifier: str, private: MLKEM768X25519PrivateKey) -> Secret:
    """Raises DamagedError PACKAGE_DAMAGED where it was wrapped for another vendor folder, or changed."""
    try:
        key = open_for_vendor(wrapped, b"content key", identifier, private)
    except (InvalidTag, ValueError):
        what = "The package's content key is not wrapped for this vendor folder."
        raise DamagedError(
            Reason.PACKAGE_DAMAGED, what, "Issue with the vendor folder that packed the package."
        ) from None
    if len(key) != SIZE:
        raise DamagedError(Reason.PACKAGE_DAMAGED, "The package's content key has a wrong size.", "Pack again.")
    return key


def seal_for_vendor(content: Secret, purpose: bytes, identifier: str, public: MLKEM768X25519PublicKey) -> bytes:
    """What only the vendor's folder opens: HPKE (RFC 9180) with X-Wing, which no recording outlives."""
    return _CONTENT_SUITE.encrypt(content.buffer, public, b"hwlicense 1 %b %b" % (purpose, identifier.encode()))


def open_for_vendor(wrapped: bytes, purpose: bytes, identifier: str, private: MLKEM768X25519PrivateKey) -> Secret:
    """Raises cryptography's InvalidTag, or ValueError, where it was sealed for another folder or use, or changed."""
    info = b"hwlicense 1 %b %b" % (purpose, identifier.encode())
    return Secret(bytearray(_CONTENT_SUITE.decrypt(wrapped, private, info)))


def _member_key(members: Sequence[Secret], places: Sequence[int]) -> Secret:
    return derive(members, b"license secret", bytes(places))


def _grant_key(secret: Secret, grant: Grant, identifier: str) -> Secret:
    return derive([secret], b"content key", grant_digest(grant), bytes.fromhex(identifier))


def _enclosure_key(secret: Secret, grant: Grant) -> Secret:
    return derive([secret], b"enclosure", grant_digest(grant))


def _damaged(what: str) -> DamagedError:
    return DamagedError(Reason.LICENSE_DAMAGED, what + ".", "Install the license file again as the vendor sent it.")
