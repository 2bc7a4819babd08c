"""Wrapping for a TPM without one: TPM2_Import duplicates and TPM2_MakeCredential credentials.

Part 1, 23.3 (outer wrap) and 24 (credentials). No inner wrap: CVE-2021-3565 made it worthless, and it adds nothing
to a duplicate whose symmetric key is used once.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Final, NamedTuple

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash

from hwlicense.core.secret import SIZE, Secret, derive, joined
from hwlicense.core.tpm.signatures import HASHES
from hwlicense.core.tpm.structures import Public, sealed_public
from hwlicense.core.tpm.wire import DIGEST_SIZES, Algorithm, number, sized

MEMBER: Final = b"tpm member"


class Wrapped(NamedTuple):
    """Contents of two TPM2B: the integrity-protected blob, and the seed encrypted for one key."""

    blob: bytes
    secret: bytes


class Sealed(NamedTuple):
    """A sealed object for TPM2_Import under one storage root key. `public` is a TPMT_PUBLIC."""

    public: bytes
    duplicate: bytes
    seed: bytes


def pin_value(pin: Secret) -> Secret:
    """The authValue that stands for a PIN of any length. TPMs drop trailing zeros of an authValue: so does this."""
    with derive([pin], b"tpm pin") as full:
        return Secret(bytearray(full.buffer.rstrip(b"\0")))


def member_secret(value: Secret, storage_share: Secret, attestation_share: Secret) -> Secret:
    """What this binding adds to the license secret: the sealed value with both shares, so that all three are needed."""
    return derive([value, storage_share, attestation_share], MEMBER)


def seal(parent: Public, policy: bytes, value: Secret, pin: Secret | None) -> Sealed:
    """`value` (at most 128 bytes) in a sealed object that only `parent` can import and only `policy` opens."""
    obfuscation = secrets.token_bytes(SIZE)  # seedValue: keeps the public area from confirming guesses of the value
    protection = hashlib.sha256(obfuscation)
    protection.update(value.buffer)
    public = sealed_public(policy, protection.digest(), pin=pin is not None)
    kind, no_pin = Secret(bytearray(number(Algorithm.KEYEDHASH, 2))), Secret(bytearray())
    with pin_value(pin) if pin else no_pin as auth:
        parts = _sized(auth), _sized(Secret(bytearray(obfuscation))), _sized(value)
        with joined(kind, *parts) as sensitive:
            return Sealed(public.raw, *duplicate(parent, public, sensitive))


def duplicate(parent: Public, public: Public, sensitive: Secret) -> Wrapped:
    """`sensitive` (a TPMT_SENSITIVE) of the object `public`, for TPM2_Import under `parent`."""
    return _protect(parent, b"DUPLICATE", public.name, sensitive)


def make_credential(endorsement_key: Public, name: bytes, share: Secret) -> Wrapped:
    """`share` for TPM2_ActivateCredential: the TPM of the EK gives it out only where an object of `name` is loaded."""
    return _protect(endorsement_key, b"IDENTITY", name, share)


def _protect(parent: Public, label: bytes, name: bytes, payload: Secret) -> Wrapped:
    seed, encrypted_seed = _seed(parent, label)
    hash_name = parent.name_algorithm.name.lower()
    with _sized(payload) as plain:
        key = kdfa(hash_name, seed, b"STORAGE", name, parent.symmetric_bits)
        cipher = Cipher(algorithms.AES(key), CFB(bytes(16))).encryptor()  # a zero IV is safe: one message per key
        body = cipher.update(plain.buffer) + cipher.finalize()
    integrity = kdfa(hash_name, seed, b"INTEGRITY", b"", 8 * len(seed))
    return Wrapped(sized(hmac.digest(integrity, body + name, hash_name)) + body, encrypted_seed)


def _sized(content: Secret) -> Secret:
    return joined(Secret(bytearray(number(len(content), 2))), content)


def _seed(parent: Public, label: bytes) -> tuple[bytes, bytes]:
    """A fresh seed, of the size of the parent's name digest, and its encryption (Part 1, B.4 and C.6)."""
    key, algorithm, size = parent.key(), HASHES[parent.name_algorithm], DIGEST_SIZES[parent.name_algorithm]
    if isinstance(key, rsa.RSAPublicKey):
        seed = secrets.token_bytes(size)
        return seed, key.encrypt(seed, padding.OAEP(padding.MGF1(algorithm), algorithm, label + b"\0"))
    ephemeral, width = ec.generate_private_key(key.curve), parent.bits // 8
    ours, theirs = ephemeral.public_key().public_numbers(), key.public_numbers()
    parties = label + b"\0" + number(ours.x, width) + number(theirs.x, width)
    seed = ConcatKDFHash(algorithm, size, parties).derive(ephemeral.exchange(ec.ECDH(), key))  # KDFe
    return seed, sized(number(ours.x, width)) + sized(number(ours.y, width))


def kdfa(hash_name: str, key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """KDFa (Part 1, 11.4.10.2; NIST SP 800-108 in counter mode), `bits` a multiple of 8."""
    out = b""
    for i in range(1, -(-bits // (8 * hashlib.new(hash_name).digest_size)) + 1):
        out += hmac.digest(key, number(i, 4) + label + b"\0" + context + number(bits, 4), hash_name)
    return out[: bits // 8]
