"""Changed, cut, forged and absurd packages: each is refused, with a reason, before any plaintext is given."""

from __future__ import annotations

import base64
import os
import random
import struct
import tracemalloc
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hwlicense.core import package
from hwlicense.core.documents import Manifest, Member
from hwlicense.core.envelope import seal
from hwlicense.core.errors import DamagedError, HwlicenseError, Reason, RefusedError
from hwlicense.core.schema import encode
from hwlicense.core.secret import Secret
from hwlicense.device.memory import protection
from hwlicense.device.model import Model
from hwlicense.device.reading import PackageFile
from tests.packages import decrypt, nothing_enclosed, opened, pack
from tests.world import Vendor

if TYPE_CHECKING:
    from pathlib import Path

CHUNK = 4096
CONTENT = {"a": os.urandom(3 * CHUNK), "b": os.urandom(3 * CHUNK), "short": b"x" * 100, "twin": b"y" * 100}


class Target:
    """A good package, its parts, and how it answers."""

    def __init__(self, vendor: Vendor, folder: Path, algorithm: str = "blake3") -> None:
        self.vendor = vendor
        self.path, self.key, self.manifest = pack(vendor, folder, CONTENT, chunk_size=CHUNK, algorithm=algorithm)
        self.raw = self.path.read_bytes()
        self.table = 16 + int.from_bytes(self.raw[8:16], "little")
        self.chunks = self.table + 8 * 32 + 16
        self.envelope = self.raw[16 : self.table]

    def refusal(self, raw: bytes, vendor: Vendor | None = None) -> HwlicenseError:
        """What is said to `raw` without a key; with the key, the same, or no plaintext but the true one."""
        self.path.write_bytes(raw)
        trusted = (vendor or self.vendor).public
        with pytest.raises((DamagedError, RefusedError)) as refused, PackageFile(self.path, trusted) as file:
            file.verify()
        with pytest.raises((DamagedError, RefusedError)), PackageFile(self.path, trusted) as file:
            self.read_everything(file)
        assert protection().held == 0
        return refused.value

    def read_everything(self, file: PackageFile) -> None:
        with Model(file, nothing_enclosed(self.key)) as model:
            for name in model.names:
                for content in (model.read(name), model.open(name).read()):
                    assert bytes(content) == CONTENT[name]

    def rebuilt(self, manifest: Manifest, body: bytes | None = None, vendor: Vendor | None = None) -> bytes:
        envelope = seal(manifest, (vendor or self.vendor).keys.signers)
        return package.header(envelope) + envelope + (self.raw[self.table :] if body is None else body)

    def sealed(self, index: int) -> tuple[int, int]:
        """Where chunk `index` (of the first six, which are whole) begins and ends."""
        return self.chunks + index * (CHUNK + 16), self.chunks + (index + 1) * (CHUNK + 16)


@pytest.fixture(params=["blake3", "sha256"])
def target(request, vendor, tmp_path):
    return Target(vendor, tmp_path, request.param)


@pytest.fixture
def one_target(vendor, tmp_path):
    return Target(vendor, tmp_path)


def test_every_byte_of_header_envelope_and_table(one_target):
    """One bit of each byte. Nothing of it opens; most is said to be what it is."""
    target, reasons = one_target, Counter[Reason]()
    drawn = random.Random(1)
    with target.path.open("r+b", buffering=0) as file:
        for place in range(target.chunks):
            good = target.raw[place]
            file.seek(place)
            file.write(bytes([good ^ 1 << drawn.randrange(8)]))
            with (
                pytest.raises((DamagedError, RefusedError)) as refused,
                PackageFile(target.path, target.vendor.public) as tampered,
            ):
                Model(tampered, nothing_enclosed(target.key))
            reasons[refused.value.reason] += 1
            file.seek(place)
            file.write(bytes([good]))
    print(*(f"{reason} {count}" for reason, count in reasons.most_common()), sep="\n")  # noqa: T201  # shown by -s
    with opened(target.vendor, target.path, target.key) as model:
        assert bytes(model.read("a")) == CONTENT["a"]
    assert sum(reasons.values()) == target.chunks
    assert set(reasons) <= {
        Reason.PACKAGE_DAMAGED,
        Reason.SCHEMA_UNSUPPORTED,
        Reason.DOCUMENT_MALFORMED,
        Reason.SIGNATURE_INVALID,
        Reason.SIGNATURE_MISSING,
        Reason.WRONG_VENDOR,
    }
    assert reasons[Reason.SCHEMA_UNSUPPORTED] == 1  # the byte of the format's version
    assert reasons[Reason.PACKAGE_DAMAGED] >= 7 + 8 * 32 + 16  # the magic and the table
    assert reasons[Reason.SIGNATURE_INVALID] > len(encode(target.manifest))


def test_bytes_of_every_chunk(target):
    drawn = random.Random(2)
    size = len(target.raw) - target.chunks
    for place in [0, size - 1, *(drawn.randrange(size) for _ in range(60))]:
        raw = bytearray(target.raw)
        raw[target.chunks + place] ^= 1 << drawn.randrange(8)
        assert target.refusal(bytes(raw)).reason == Reason.PACKAGE_DAMAGED


def test_chunks_swapped_doubled_dropped(target):
    raw = target.raw
    (a0, a1), (b0, b1) = target.sealed(0), target.sealed(1)
    (c0, c1), twin = target.sealed(3), len(raw) - 116
    changed = {
        "swapped within a member": raw[:a0] + raw[b0:b1] + raw[a0:a1] + raw[b1:],
        "swapped between members": raw[:a0] + raw[c0:c1] + raw[a1:c0] + raw[a0:a1] + raw[c1:],
        "twins of one size": raw[: twin - 116] + raw[twin:] + raw[twin - 116 : twin],
        "doubled in place of the next": raw[:b0] + raw[a0:a1] + raw[b1:],
        "doubled": raw[:b0] + raw[a0:a1] + raw[b0:],
        "dropped": raw[:a0] + raw[a1:],
        "zeros": raw[:a0] + bytes(a1 - a0) + raw[a1:],
    }
    for what, forged in changed.items():
        assert target.refusal(forged).reason == Reason.PACKAGE_DAMAGED, what


def test_cut_and_extended_anywhere(target):
    lengths = {*range(20), target.table, target.table - 1, target.chunks, len(target.raw) - 1, len(target.raw) - 117}
    lengths |= {random.Random(3).randrange(len(target.raw)) for _ in range(20)}
    for length in lengths:
        assert target.refusal(target.raw[:length]).reason == Reason.PACKAGE_DAMAGED, length
    for more in (b"\0", b"\n", target.raw):
        assert target.refusal(target.raw + more).reason == Reason.PACKAGE_DAMAGED


def test_who_holds_the_content_key_cannot_change_a_chunk(target):
    """The customer of a cracked device has every key: he encrypts other content, correctly, for other devices."""
    keys = Secret(bytearray(8 * 32))
    package.open_table_into(target.key, target.raw[target.table : target.chunks], keys.buffer)
    start, end = target.sealed(0)
    data = b"hwlicense chunk 1" + struct.pack("<IB", CHUNK, 0)
    forged = AESGCM(bytes(keys.buffer[:32])).encrypt(bytes(12), b"\xee" * CHUNK, data)
    raw = target.raw[:start] + forged + target.raw[end:]
    with pytest.raises(AssertionError):  # the ciphertext is right: only the signed digest speaks against it
        decrypt(raw, bytes(target.key.buffer))
    assert target.refusal(raw).reason == Reason.PACKAGE_DAMAGED

    own = Secret(bytearray(b"\1" * 32 + keys.buffer[32:]))
    table = package.seal_table(target.key, own.buffer)
    assert (
        target.refusal(target.raw[: target.table] + table + target.raw[target.chunks :]).reason
        == Reason.PACKAGE_DAMAGED
    )

    # ... and with a manifest to match, he lacks the vendor's signatures
    algorithm = target.manifest.algorithm
    members = [Member("a", 3 * CHUNK, package.digest(forged, algorithm) + target.manifest.members[0].digests[32:])]
    manifest = replaced(target.manifest, members=[*members, *target.manifest.members[1:]])
    old = base64.b64encode(encode(target.manifest))
    spliced = target.envelope.replace(old, base64.b64encode(encode(manifest)))
    assert spliced != target.envelope
    body = target.raw[target.table : start] + forged + target.raw[end:]
    assert target.refusal(package.header(spliced) + spliced + body).reason == Reason.SIGNATURE_INVALID


def test_another_vendors_signature(one_target, tmp_path_factory):
    target, other = one_target, Vendor(tmp_path_factory.mktemp("other"))
    assert target.refusal(target.rebuilt(target.manifest, vendor=other)).reason == Reason.WRONG_VENDOR
    assert target.refusal(target.raw, vendor=other).reason == Reason.WRONG_VENDOR
    # signed by the trusted vendor, but in the name of another
    foreign = replaced(target.manifest, vendor=other.public.fingerprint)
    assert target.refusal(target.rebuilt(foreign)).reason == Reason.WRONG_VENDOR


def test_a_manifest_of_another_package_of_the_vendor(one_target, vendor, tmp_path_factory):
    other = Target(vendor, tmp_path_factory.mktemp("second"))
    mixed = package.header(other.envelope) + other.envelope + one_target.raw[one_target.table :]
    assert one_target.refusal(mixed).reason == Reason.PACKAGE_DAMAGED


def test_the_wrong_content_key(one_target):
    for key in (Secret.random(), Secret(bytearray(32)), Secret(bytearray(reversed(one_target.key.buffer)))):
        with pytest.raises(DamagedError) as refused, PackageFile(one_target.path, one_target.vendor.public) as file:
            Model(file, nothing_enclosed(key))
        assert refused.value.reason == Reason.PACKAGE_DAMAGED
        assert refused.value.hint
    assert protection().held == 0


def replaced(manifest: Manifest, **changes) -> Manifest:
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    return Manifest(**{**fields, **changes})


def test_manifests_that_contradict_themselves_though_signed(one_target):
    members = one_target.manifest.members
    wrong = {
        "digest missing": [Member("a", members[0].size, members[0].digests[:-32]), *members[1:]],
        "half a digest": [Member("a", members[0].size, members[0].digests[:-16]), *members[1:]],
        "a larger size": [Member("a", members[0].size + 1, members[0].digests), *members[1:]],
        "a smaller size": [Member("a", members[0].size - 1, members[0].digests), *members[1:]],
        "an absurd size": [Member("a", 2**53 - 1, members[0].digests), *members[1:]],
        "two of one name": [*members, Member("a", 0, b"")],
        "a name that climbs": [*members, Member("../x", 0, b"")],
        "an absolute name": [*members, Member("/etc/passwd", 0, b"")],
        "another order": members[::-1],
    }
    for what, changed in wrong.items():
        raw = one_target.rebuilt(replaced(one_target.manifest, members=changed))
        assert one_target.refusal(raw).reason == Reason.PACKAGE_DAMAGED, what
    for size in (4096 * 2, 1 << 26):
        raw = one_target.rebuilt(replaced(one_target.manifest, chunk_size=size))
        assert one_target.refusal(raw).reason == Reason.PACKAGE_DAMAGED


def test_absurd_lengths_allocate_nothing(one_target):
    """The file claims, and is, a tebibyte (sparse); what is allocated stays small."""
    for length in (0, 1, 2**63, 2**64 - 1, package.ENVELOPE_LIMIT + 1, len(one_target.raw), len(one_target.raw) - 15):
        one_target.path.write_bytes(one_target.raw[:8] + struct.pack("<Q", length) + one_target.raw[16:])
        if length > len(one_target.raw):
            os.truncate(one_target.path, 1 << 40)
        tracemalloc.start()
        with pytest.raises(DamagedError) as refused:
            PackageFile(one_target.path, one_target.vendor.public)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert refused.value.reason in {Reason.PACKAGE_DAMAGED, Reason.DOCUMENT_MALFORMED}
        assert peak < 1 << 20, length
    one_target.path.write_bytes(one_target.raw)
    os.truncate(one_target.path, 1 << 40)
    with pytest.raises(DamagedError):
        PackageFile(one_target.path, one_target.vendor.public)


@pytest.mark.parametrize("raw", [b"", b"hwpkg", b"\x7fELF" + bytes(100), b"{}\n" * 50, b"hwpkg\0\1\r\n" + bytes(20)])
def test_files_of_another_kind(one_target, raw):
    assert one_target.refusal(raw).reason == Reason.PACKAGE_DAMAGED
