"""Frozen vectors of tokens and dongles: made by other means than this project's code, and verified forever."""

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.serialization import load_der_private_key

from hwlicense.core import dongle, token
from hwlicense.core.documents import UsbBinding
from hwlicense.core.errors import HwlicenseError, Reason
from hwlicense.core.secret import Secret

VECTORS = json.loads((Path(__file__).parent / "hardware-1.json").read_text())
SEED = bytes.fromhex(VECTORS["seed"])
MODES = ("less-than-64", "fixed-64")


def secret(text):
    return Secret(bytearray.fromhex(text))


def binding(mode):
    found = VECTORS[mode]
    return UsbBinding(
        dongle=found["dongle"],
        product="1050:0407",
        serial="1",
        slot=2,
        touch=False,
        seed=SEED,
        first=VECTORS["first"],
        check=bytes.fromhex(found["check"]),
        answers=bytes.fromhex(found["answers"]),
    )


def answer(mode, asked):
    return dongle.answer(secret(VECTORS["dongle_secret"]), mode, asked)


@pytest.mark.parametrize("mode", MODES)
def test_a_dongle(mode):
    bound = binding(mode)
    assert dongle.identifier(answer(mode, dongle.identity_challenge())) == bound.dongle
    asked = dongle.challenge(SEED, bound.first)
    assert dongle.unwrap(answer(mode, asked), bound) == secret(VECTORS[mode]["member_secret"])
    for place in range(dongle.answer_count(bound)):
        dongle.check_presence(answer(mode, dongle.presence_challenge(bound, place)), bound, place)
    replaced = dongle.challenge(SEED, VECTORS["replaced"])
    assert (len(replaced), replaced[31]) == (64, 1)


@pytest.mark.parametrize("mode", MODES)
def test_another_answer_is_another_dongles(mode):
    bound, other = binding(mode), MODES[1 - MODES.index(mode)]
    for attempt in (
        lambda: dongle.unwrap(answer(other, dongle.challenge(SEED, bound.first)), bound),
        lambda: dongle.check_presence(answer(mode, dongle.presence_challenge(bound, 1)), bound, 0),
    ):
        with pytest.raises(HwlicenseError) as caught:
            attempt()
        assert caught.value.reason == Reason.DONGLE_ABSENT


@pytest.mark.parametrize("vector", VECTORS["tokens"], ids=lambda vector: vector["mechanism"])
def test_a_token(vector):
    private: Any = load_der_private_key(bytes.fromhex(vector["private"]), None)
    key, encapsulated, check = (bytes.fromhex(vector[name]) for name in ("key", "encapsulated", "check"))
    if vector["mechanism"] == "ecdh":
        shared = private.exchange(ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(private.curve, encapsulated))
    else:
        algorithm = hashes.SHA256() if vector["mechanism"].endswith("256") else hashes.SHA1()  # noqa: S303
        shared = private.decrypt(encapsulated, padding.OAEP(padding.MGF1(algorithm), algorithm, None))
    assert shared.hex() == vector["shared"]
    found = token.unwrap(Secret(bytearray(shared)), key, encapsulated, check)
    assert found == secret(vector["member_secret"])
    for lie in (bytes(32), shared[:-1], shared + b"\0", b""):
        with pytest.raises(HwlicenseError) as caught:
            token.unwrap(Secret(bytearray(lie)), key, encapsulated, check)
        assert caught.value.reason == Reason.TOKEN_FORGED
    wrapped = token.wrap(key, vector["mechanism"])
    assert (len(wrapped.encapsulated), len(wrapped.secret)) == (len(encapsulated), 32)
