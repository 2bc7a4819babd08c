"""The vendor's private keys: made, kept as PKCS#8, and used to sign.

Under a passphrase each file is an encrypted PKCS#8 (PBES2) whose password is the scrypt hash of the passphrase
(RFC 7914), because PBES2's own key derivation is far too quick to stand against guessing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, mlkem, x25519
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from hwlicense.core.documents import VendorPublic
from hwlicense.core.envelope import keyid, ml_dsa_message
from hwlicense.core.errors import DamagedError, Reason, RefusedError
from hwlicense.core.schema import SCHEMA
from hwlicense.core.secret import Secret

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

SALT_SIZE: Final = 16
SCRYPT: Final = {"n": 1 << 17, "r": 8, "p": 1}
"""128 MiB and about half a second for each guess."""

CLASSICAL_KINDS: Final = ("ed25519", "p256")


class Keys(NamedTuple):
    """Every private key of a vendor."""

    classical: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey
    ml_dsa: mldsa.MLDSA65PrivateKey
    policy: ec.EllipticCurvePrivateKey
    content: MLKEM768X25519PrivateKey

    @property
    def signers(self) -> list[KeySigner]:
        """The two that sign every document."""
        return [KeySigner(self.classical), KeySigner(self.ml_dsa)]


class KeySigner:
    """Signs as `hwlicense.core.envelope` verifies."""

    def __init__(self, key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | mldsa.MLDSA65PrivateKey) -> None:
        self._key = key
        self.keyid = keyid(public_bytes(key.public_key()))

    def sign(self, message: bytes) -> bytes:
        """Ed25519, ECDSA P-256 with SHA-256 (DER), or ML-DSA-65 as TAP 21 says."""
        if isinstance(self._key, ec.EllipticCurvePrivateKey):
            return self._key.sign(message, ec.ECDSA(hashes.SHA256()))
        return self._key.sign(ml_dsa_message(message) if isinstance(self._key, mldsa.MLDSA65PrivateKey) else message)


def generate(classical: str) -> dict[str, list[PrivateKeyTypes]]:
    """New keys, by the name of the file that holds them. `classical` is one of CLASSICAL_KINDS."""
    first = ed25519.Ed25519PrivateKey.generate() if classical == "ed25519" else ec.generate_private_key(ec.SECP256R1())
    return {
        "classical": [first],
        "mldsa": [mldsa.MLDSA65PrivateKey.generate()],
        "policy": [ec.generate_private_key(ec.SECP256R1())],
        "content": [mlkem.MLKEM768PrivateKey.generate(), x25519.X25519PrivateKey.generate()],
    }


def public_part(name: str, keys: dict[str, list[PrivateKeyTypes]]) -> VendorPublic:
    """What the vendor publishes."""
    first, second, policy = (public_bytes(keys[which][0].public_key()) for which in ("classical", "mldsa", "policy"))
    return VendorPublic(SCHEMA, name, first, second, policy)


def assembled(keys: dict[str, list[PrivateKeyTypes]], public: VendorPublic) -> Keys:
    """The loaded keys, each of its kind and of this vendor. Raises DamagedError DOCUMENT_MALFORMED."""
    match [key for name in ("classical", "mldsa", "policy", "content") for key in keys[name]]:
        case [
            ed25519.Ed25519PrivateKey() | ec.EllipticCurvePrivateKey() as classical,
            mldsa.MLDSA65PrivateKey() as ml_dsa,
            ec.EllipticCurvePrivateKey() as policy,
            mlkem.MLKEM768PrivateKey() as first,
            x25519.X25519PrivateKey() as second,
        ] if public_part(public.name, keys) == public:
            return Keys(classical, ml_dsa, policy, MLKEM768X25519PrivateKey(first, second))
    raise DamagedError(
        Reason.DOCUMENT_MALFORMED,
        "The vendor folder's private keys are not those of its vendor.pub.json.",
        "Restore the folder from its backup; a vendor folder's files belong together.",
    )


def stretched(passphrase: Secret, salt: bytes) -> Secret:
    """The PKCS#8 password of a passphrase: 64 hexadecimal digits."""
    with Secret(bytearray(32)) as out:
        Scrypt(salt, 32, **SCRYPT).derive_into(passphrase.buffer, out.buffer)
        return Secret(bytearray(out.buffer.hex(), "ascii"))


def to_pem(keys: list[PrivateKeyTypes], password: Secret | None) -> bytes:
    """One PEM block a key, encrypted where there is a password."""
    encryption = BestAvailableEncryption(bytes(password.buffer)) if password else NoEncryption()
    return b"".join(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption) for key in keys)


def from_pem(pem: bytes, password: Secret | None) -> list[PrivateKeyTypes]:
    """Raises RefusedError PASSPHRASE_WRONG, or DamagedError DOCUMENT_MALFORMED for what is no key."""
    blocks = [b"-----BEGIN" + block for block in pem.split(b"-----BEGIN")[1:]]
    try:
        return [load_pem_private_key(block, bytes(password.buffer) if password else None) for block in blocks]
    except (ValueError, UnsupportedAlgorithm):
        if password:
            what = "The passphrase does not open the vendor's keys."
            raise RefusedError(
                Reason.PASSPHRASE_WRONG, what, "Try again with the passphrase of this vendor folder."
            ) from None
        what = "A private key of the vendor folder is damaged."
        raise DamagedError(Reason.DOCUMENT_MALFORMED, what, "Restore the folder from its backup.") from None
    except TypeError:
        what = "A private key of the vendor folder is not protected as the others are."
        raise DamagedError(Reason.DOCUMENT_MALFORMED, what, "Restore the folder from its backup.") from None


def public_bytes(key: PublicKeyTypes) -> bytes:
    """SubjectPublicKeyInfo, DER."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
