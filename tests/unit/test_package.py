"""The package's format: a second reader, frozen vectors, layout and names."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwlicense.core import package
from hwlicense.core.documents import Manifest, Member, VendorPublic
from hwlicense.core.errors import DamagedError, Reason, UsageError
from hwlicense.core.schema import SCHEMA, decode
from hwlicense.core.secret import Secret
from hwlicense.device.model import Model
from hwlicense.device.reading import PackageFile
from tests.packages import decrypt, nothing_enclosed, opened, pack

VECTORS = Path(__file__).parents[1] / "vectors"
CHUNK = 4096
SIZES = st.one_of(
    st.integers(0, 3),
    st.builds(lambda n, off: max(0, n * CHUNK + off), st.integers(0, 12), st.integers(-2, 2)),
    st.integers(0, 15 * CHUNK),
)


def content(size: int, seed: int = 1) -> bytes:
    return bytes((seed * 31 + i * i + (i >> 8)) & 255 for i in range(size))


@settings(max_examples=40)
@given(sizes=st.lists(SIZES, min_size=1, max_size=5), algorithm=st.sampled_from(["blake3", "sha256"]))
def test_both_readers_give_what_was_packed(sizes, algorithm, vendor, tmp_path_factory):
    members = {f"folder/member-{i}": content(size, i) for i, size in enumerate(sizes)}
    folder = tmp_path_factory.mktemp("package")
    out, key, _ = pack(vendor, folder, members, chunk_size=CHUNK, algorithm=algorithm)
    assert decrypt(out.read_bytes(), bytes(key.buffer)) == members
    with opened(vendor, out, key) as model:
        assert model.names == tuple(sorted(members))
        assert {name: bytes(model.read(name)) for name in model.names} == members
        assert {name: Path(model.path(name)).read_bytes() for name in model.names} == members
        assert {name: model.open(name).read() for name in model.names} == members
        assert {name: model.size(name) for name in model.names} == {n: len(c) for n, c in members.items()}


def test_each_chunk_and_package_has_fresh_keys(vendor, tmp_path):
    same = {"a": bytes(CHUNK * 2), "b": bytes(CHUNK * 2)}
    first, key, manifest = pack(vendor, tmp_path, same, chunk_size=CHUNK)
    raw = first.read_bytes()
    _, other_key, other = pack(vendor, tmp_path, same, chunk_size=CHUNK, force=True)
    everything = b"".join(m.digests for m in [*manifest.members, *other.members])
    digests = {everything[i : i + 32] for i in range(0, len(everything), 32)}
    assert len(digests) == 8  # equal plaintext, and no two ciphertexts alike
    assert key != other_key
    assert manifest.content_key != other.content_key
    assert bytes(CHUNK // 4) not in raw


@pytest.mark.parametrize("version", [1, 2])
def test_frozen_packages_open_for_ever(version):
    said = json.loads((VECTORS / f"package-{version}.json").read_text())
    path = VECTORS / f"package-{version}.hwpkg"
    expected = {name: bytes.fromhex(content) for name, content in said["members"].items()}
    vendor = decode(json.dumps(said["vendor"], separators=(",", ":")).encode(), VendorPublic)
    with PackageFile(path, vendor) as file:
        file.verify()
        with Model(file, nothing_enclosed(Secret(bytearray.fromhex(said["content_key"])))) as model:
            assert {name: bytes(model.read(name)) for name in file.layout.members} == expected
            assert set(model.names) == {name for name in expected if not name.startswith(".code/")}
    assert msgspec.to_builtins(file.manifest.code) == said.get("code")
    assert decrypt(path.read_bytes(), bytes.fromhex(said["content_key"])) == expected


def manifest_of(members: list[tuple[str, int, int]], chunk_size: int = CHUNK) -> Manifest:
    made = [Member(name, size, bytes(32 * count)) for name, size, count in members]
    return Manifest(SCHEMA, "n", "1", "0" * 64, "0" * 32, b"", "blake3", chunk_size, bytes(32), made)


BAD_NAMES = [
    *["", "/", "/a", "a/", "a//b", ".", "..", "./a", "a/.", "a/./b", "../a", "a/..", "a/../b", "a\\b", "\\", "C:\\x"],
    *["a\0", "a\nb", "\x1b[2J", "a\x7f", "a\x85", "a\u2028", "a\u2029", "a\udc80", "e\u0301", "x" * 1001],
]
BAD_SETS = [
    ["a", "a"],
    ["a", "A"],
    ["stra\u00dfe", "STRASSE"],
    ["\u00e9", "\u00c9"],
    ["a", "a/b"],
    ["A", "a/b"],
    ["a/b/c", "a/b"],
    ["a/b/c/d", "x", "A/B"],
    ["\u03c3", "\u03c2"],
]
GOOD_SETS = [
    ["a", "b"],
    ["a/b", "a/c", "ab"],
    ["a b", "\u00e9", "\u65e5\u672c/\u8a9e", ".hidden", "...", "a..b", "C:", "~", "-", "*"],
    ["x" * 1000],
]


@pytest.mark.parametrize("names", [*([name] for name in BAD_NAMES), *BAD_SETS])
def test_names_that_are_refused(names):
    with pytest.raises(UsageError) as packing:
        package.check_names(names)
    assert packing.value.reason == Reason.MEMBER_NAME
    with pytest.raises(DamagedError) as reading:
        package.check_manifest(manifest_of([(name, 0, 0) for name in names]))
    assert reading.value.reason == Reason.PACKAGE_DAMAGED


@pytest.mark.parametrize("names", GOOD_SETS)
def test_names_that_are_taken(names):
    package.check_names(names)
    package.check_manifest(manifest_of([(name, 0, 0) for name in names]))


@given(st.text(max_size=12))
def test_no_name_leads_anywhere_else(name):
    try:
        package.check_names([name])
    except UsageError:
        return
    path = Path("/base", name)
    assert not Path(name).is_absolute()
    assert path.resolve().is_relative_to("/base")
    assert str(path.relative_to("/base")) == name
    assert name.encode().decode() == name


@pytest.mark.parametrize(
    ("size", "count"), [(0, 1), (1, 0), (1, 2), (CHUNK, 0), (CHUNK, 2), (CHUNK + 1, 1), (2**53 - 1, 0), (2**53 - 1, 1)]
)
def test_sizes_and_digests_that_disagree(size, count):
    with pytest.raises(DamagedError) as refused:
        package.check_manifest(manifest_of([("a", 1, 1), ("b", size, count)]))
    assert refused.value.reason == Reason.PACKAGE_DAMAGED


@given(sizes=st.lists(st.integers(0, 5 * CHUNK), min_size=1, max_size=6), envelope=st.integers(0, 1000))
def test_chunks_tile_the_file(sizes, envelope):
    manifest = manifest_of([(str(i), size, -(-size // CHUNK)) for i, size in enumerate(sizes)])
    total = 16 + envelope + 16 + sum(size + (32 + 16) * -(-size // CHUNK) for size in sizes)
    layout = package.Layout(manifest, envelope, total)
    chunks = [layout.chunk(m, i) for m in manifest.members for i in range(layout.count(m))]
    at = layout.table_offset + layout.table_size
    for place, chunk in enumerate(chunks):
        assert (chunk.key, chunk.offset) == (place, at)
        at += chunk.sealed_size
    assert at == total
    assert sum(chunk.size for chunk in chunks) == sum(sizes)
    assert sum(chunk.last for chunk in chunks) == sum(size > 0 for size in sizes)
    for wrong in (total - 1, total + 1, 0, 2**63):
        with pytest.raises(DamagedError):
            package.Layout(manifest, envelope, wrong)
