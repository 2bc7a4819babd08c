"""The chain from member secrets to content keys."""

import copy
import datetime
import hashlib
import os
import pickle
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from hwlicense.core.documents import Grant, License, PackageReference, SecretWrap
from hwlicense.core.errors import DamagedError, Reason
from hwlicense.core.keys import (
    unwrap_content_key,
    unwrap_for_vendor,
    unwrap_license_secret,
    wrap_content_keys,
    wrap_for_vendor,
    wrap_license_secret,
)
from hwlicense.core.schema import SCHEMA, encode
from hwlicense.core.secret import Secret, derive
from hwlicense.vendor import signing

GRANT = Grant(
    "11" * 16, 1, "22" * 32, "Acme Robotics", "label-reader", 1,
    [PackageReference("reader", "1.0", "33" * 16), PackageReference("reader", "1.1", "44" * 16)],
    datetime.date(2026, 11, 23), None, datetime.date(2027, 12, 31), ["sha256:7"],
)  # fmt: skip


def license_with(wraps):
    return License(SCHEMA, GRANT, [], 1, [], wraps, [])


@given(count=st.integers(1, 5), need=st.integers(1, 5), have=st.sets(st.integers(0, 4)))
def test_any_k_members_open_the_license_secret_and_fewer_do_not(count, need, have):
    need, have = min(need, count), {place for place in have if place < count}
    secret, members = Secret.random(), [Secret.random() for _ in range(count)]
    wraps = wrap_license_secret(secret, members, need)
    assert len(wraps) == len(list(combinations(range(count), need)))
    at_hand = {place: members[place] for place in have}
    if len(have) >= need:
        assert unwrap_license_secret(wraps, at_hand) == secret
    else:
        with pytest.raises(DamagedError):
            unwrap_license_secret(wraps, at_hand)


def test_a_wrong_member_opens_nothing():
    wraps = wrap_license_secret(Secret.random(), [Secret.random()], 1)
    with pytest.raises(DamagedError) as caught:
        unwrap_license_secret(wraps, {0: Secret.random()})
    assert caught.value.reason == Reason.LICENSE_DAMAGED


def test_members_do_not_open_a_wrap_of_other_places():
    members = [Secret.random(), Secret.random()]
    first, second = wrap_license_secret(Secret.random(), members, 1)
    with pytest.raises(DamagedError):
        unwrap_license_secret([SecretWrap(second.members, first.wrapped)], {1: members[0]})


def test_content_keys_open_with_the_grant_as_it_was_signed_and_no_other():
    secret, keys = Secret.random(), [Secret.random(), Secret.random()]
    wraps = wrap_content_keys(secret, GRANT, keys)
    licensed = license_with(wraps)
    for reference, key in zip(GRANT.packages, keys, strict=True):
        assert unwrap_content_key(secret, licensed, reference.content_key) == key
    changes: tuple[dict[str, object], ...] = ({"not_after": None}, {"licensee": "Other"}, {"revision": 2}, {"pcrs": []})
    for change in changes:
        edited = Grant(**{name: getattr(GRANT, name) for name in GRANT.__struct_fields__} | change)
        with pytest.raises(DamagedError) as caught:
            unwrap_content_key(secret, License(SCHEMA, edited, [], 1, [], wraps, []), "33" * 16)
        assert caught.value.reason == Reason.LICENSE_DAMAGED
    with pytest.raises(DamagedError, match="no key"):
        unwrap_content_key(secret, licensed, "55" * 16)
    swapped = [type(wraps[0])(wraps[1].content_key, wraps[0].wrapped)]
    with pytest.raises(DamagedError):
        unwrap_content_key(secret, license_with(swapped), "44" * 16)


def test_the_derivation_is_the_documented_one():
    """Written from docs/formats.md, with cryptography alone."""
    secret, key = Secret.random(), Secret.random()
    (wrap, _) = wrap_content_keys(secret, GRANT, [key, key])
    fields = (b"content key", hashlib.sha256(encode(GRANT)).digest(), bytes.fromhex("33" * 16))
    info = b"hwlicense 1 " + b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    wrapping = HKDF(hashes.SHA256(), 32, None, info).derive(bytes(secret.buffer))
    assert AESGCM(wrapping).decrypt(bytes(12), wrap.wrapped, None) == bytes(key.buffer)


def test_no_two_contexts_derive_one_key():
    material = [Secret.random()]
    contexts = [(b"a", b"bc"), (b"ab", b"c"), (b"abc",), (b"a", b"b", b"c"), (b"", b"abc"), (b"abc", b"")]
    derived = {bytes(derive(material, *context).buffer) for context in contexts}
    assert len(derived) == len(contexts)


def test_the_vendor_gets_its_content_key_back_and_no_other_vendor_does():
    generated = [signing.generate("p256") for _ in range(2)]
    folders = [signing.assembled(keys, signing.public_part("Acme", keys)) for keys in generated]
    key = Secret.random()
    wrapped = wrap_for_vendor(key, "33" * 16, folders[0].content.public_key())
    assert unwrap_for_vendor(wrapped, "33" * 16, folders[0].content) == key
    for identifier, private in (("33" * 16, folders[1].content), ("44" * 16, folders[0].content)):
        with pytest.raises(DamagedError) as caught:
            unwrap_for_vendor(wrapped, identifier, private)
        assert caught.value.reason == Reason.PACKAGE_DAMAGED
    with pytest.raises(DamagedError):
        unwrap_for_vendor(b"", "33" * 16, folders[0].content)


def test_a_secret_is_wiped_shows_nothing_and_cannot_be_copied():
    source = bytearray(b"very secret")
    with Secret(source) as secret:
        buffer = secret.buffer
        assert source == bytes(11)
        assert "very" not in repr(secret) + str(secret)
        for copying in (pickle.dumps, copy.copy, copy.deepcopy, hash):
            with pytest.raises(TypeError):
                copying(secret)
    assert bytes(buffer) == bytes(11)


def test_a_buffer_outlives_the_secret_that_gave_it():
    assert bytes(Secret(bytearray(b"very secret")).buffer) == b"very secret"


DERIVING = """
import sys
from hwlicense.core.secret import Secret, derive
inputs = []
with open(0, "rb", buffering=0, closefd=False) as stdin:
    for _ in range(4):
        inputs.append(Secret(bytearray(32)))
        stdin.readinto(inputs[-1].buffer)
{joining}
derive(inputs, b"purpose", b"context").wipe()
for one in inputs:
    one.wipe()
print("ready", flush=True)
sys.stdin.read()
"""
GROWING = """
grown = Secret(bytearray())
for one in inputs:
    grown.buffer.extend(one.buffer)
grown.wipe()
"""


def found_in_memory(code, inputs):
    """Places of the inputs whose second half another process finds in one that has run `code`."""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin
        assert child.stdout
        child.stdin.write(b"".join(inputs))
        child.stdin.flush()
        assert child.stdout.readline() == b"ready\n"
        held = bytearray()
        maps = Path(f"/proc/{child.pid}/maps").read_text()
        with Path(f"/proc/{child.pid}/mem").open("rb", buffering=0) as raw:
            for low, high in re.findall(r"^(\w+)-(\w+) rw", maps, re.MULTILINE):
                raw.seek(int(low, 16))
                held += raw.read(int(high, 16) - int(low, 16))
    return [place for place, one in enumerate(inputs) if one[16:] in held]


def test_deriving_leaves_no_copy_of_what_it_joined():
    inputs = [os.urandom(32) for _ in range(4)]
    assert found_in_memory(DERIVING.format(joining=""), inputs) == []
    assert 0 in found_in_memory(DERIVING.format(joining=GROWING), inputs)  # the control
