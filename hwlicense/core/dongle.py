"""Challenges for USB dongles that answer by HMAC-SHA1 (FIPS 198-1), and what is made of their answers.

A challenge is 32 bytes that differ each time and 32 bytes of 0x20. A dongle in less-than-64 mode strips the latter, one
in fixed-64 mode does not, so the vendor must know the mode to answer for it; the device only sends 64 bytes. Answers
have 160 bits, which nobody guesses: digests of them give nothing away.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final, Literal

from hwlicense.core.documents import VERIFIER_SIZE, UsbBinding
from hwlicense.core.errors import AbsentError, DamagedError, Reason
from hwlicense.core.secret import Secret, derive

CHALLENGE_SIZE: Final = 64
ANSWER_SIZE: Final = 20
SECRET_SIZE: Final = 20
CHECK_SIZE: Final = 16
Mode = Literal["less-than-64", "fixed-64"]
ONLYKEY: Final = "1d50:60fc"
_YUBICO: Final = ("0010", "0110", "0111", "0114", "0116", "0401", "0403", "0405", "0407", "0410")
PRODUCTS: Final = (*(f"1050:{product}" for product in _YUBICO), ONLYKEY)
"""Vendor and product ids: YubiKeys with their OTP interface switched on, and OnlyKey. No other device is opened."""

_FILL: Final = 0x20
_IDENTITY_SEED: Final = hashlib.sha256(b"hwlicense 1 dongle identity").digest()
IDENTITY: Final = 0
"""Number of the challenge, under the seed that all have in common, whose answer names a dongle."""


def challenge(seed: bytes, number: int) -> bytes:
    """Challenge `number` of `seed`, 64 bytes."""
    body = bytearray(hashlib.sha256(b"hwlicense 1 dongle challenge" + seed + number.to_bytes(8, "big")).digest())
    if body[-1] in (0, _FILL):  # a byte that dongles, or their libraries, would strip as well
        body[-1] = 1
    return bytes(body) + bytes([_FILL]) * (CHALLENGE_SIZE - len(body))


def identity_challenge() -> bytes:
    """The challenge whose answer names a dongle."""
    return challenge(_IDENTITY_SEED, IDENTITY)


def identifier(answer: Secret) -> str:
    """What names a dongle, 32 hexadecimal digits: a digest of its answer to the identity challenge."""
    return hashlib.sha256(b"hwlicense 1 dongle" + answer.buffer).hexdigest()[:32]


def answer(secret: Secret, mode: Mode, asked: bytes) -> Secret:
    """What a dongle with this secret answers: the vendor's arithmetic."""
    message = asked.rstrip(asked[-1:]) if mode == "less-than-64" else asked
    return Secret(bytearray(hmac.digest(secret.buffer, message, "sha1")))


def member_secret(given: Secret, asked: bytes) -> Secret:
    """What a binding adds to the license secret, 32 bytes."""
    return derive([given], b"dongle member", asked)


def check_value(given: Secret, asked: bytes) -> bytes:
    """What tells the right answer from another dongle's, 16 bytes."""
    with derive([given], b"dongle check", asked) as check:
        return bytes(check.buffer[:CHECK_SIZE])


def verifier(given: Secret, asked: bytes) -> bytes:
    """By what the device knows an answer that it has not seen before, 8 bytes."""
    with derive([given], b"dongle presence", asked) as check:
        return bytes(check.buffer[:VERIFIER_SIZE])


def unwrap(given: Secret, binding: UsbBinding) -> Secret:
    """The member secret from a dongle's answer. Raises AbsentError where the answer is another dongle's."""
    asked = challenge(binding.seed, binding.first)
    if not hmac.compare_digest(check_value(given, asked), binding.check):
        what = "This dongle is not the license's."
        raise AbsentError(Reason.DONGLE_ABSENT, what, "Plug in the license's own dongle.")
    return member_secret(given, asked)


def answer_count(binding: UsbBinding) -> int:
    """How many proofs of presence the binding can check. Raises DamagedError LICENSE_DAMAGED."""
    count, rest = divmod(len(binding.answers), VERIFIER_SIZE)
    if rest:
        what = "The license's recorded answers are cut."
        raise DamagedError(Reason.LICENSE_DAMAGED, what, "Ask the vendor for the license again.")
    return count


def presence_challenge(binding: UsbBinding, place: int) -> bytes:
    """The challenge that recorded answer `place` belongs to."""
    return challenge(binding.seed, binding.first + 1 + place)


def check_presence(given: Secret, binding: UsbBinding, place: int) -> None:
    """Raises AbsentError where the answer to presence challenge `place` is not the recorded one."""
    expected = binding.answers[place * VERIFIER_SIZE : (place + 1) * VERIFIER_SIZE]
    if not hmac.compare_digest(verifier(given, presence_challenge(binding, place)), expected):
        what = "The dongle answers as another one would."
        raise AbsentError(Reason.DONGLE_ABSENT, what, "Plug in the license's own dongle.")
