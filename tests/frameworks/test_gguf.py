"""GGUF over a package: the library's reader, and files in several parts."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import onnx
import pytest

from hwlicense.core.errors import Reason, StorageError, UsageError
from hwlicense.integrations import gguf as integration
from tests.packages import opened, pack

if TYPE_CHECKING:
    import numpy

PARTS = [f"net-{part:05}-of-00003.gguf" for part in (1, 2, 3)]


@pytest.fixture(scope="module")
def weights(made) -> dict[str, numpy.ndarray]:
    """Of PP-OCR's classifier."""
    network = onnx.load(made.files / "apart/cls.onnx")
    return {one.name: onnx.numpy_helper.to_array(one) for one in network.graph.initializer if len(one.dims) > 1}


@pytest.fixture(scope="module")
def files(weights, vendor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "files/parts").mkdir(parents=True)
    write(folder / "files/cls.gguf", weights)
    for number, part in enumerate(PARTS):
        write(folder / "files/parts" / part, dict(list(weights.items())[number::3]))
    return pack(vendor, folder, {}), folder / "files"


def write(path: Path, weights: dict[str, numpy.ndarray]) -> None:
    writer = gguf.GGUFWriter(path, "network")
    writer.add_name("PP-OCR")
    for name, array in weights.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def net(vendor, files):
    (package, key, _), _ = files
    with opened(vendor, package, key) as model:
        yield model


def contents(reader: gguf.GGUFReader) -> dict[str, bytes]:
    return {one.name: one.data.tobytes() for one in reader.tensors}


def test_fields_and_tensors_are_those_of_the_plain_file(net, files, weights):
    reader, plain = integration.reader(net, "cls.gguf"), gguf.GGUFReader(files[1] / "cls.gguf")
    assert contents(reader) == contents(plain) == {name: array.tobytes() for name, array in weights.items()}
    assert list(reader.fields) == list(plain.fields)
    assert reader.get_field("general.name").contents() == "PP-OCR"


def test_tensors_are_the_sealed_memory_itself_and_outlive_the_model(net, weights):
    reader = integration.reader(net, "cls.gguf")
    assert any("/memfd:hwlicense" in line for line in Path("/proc/self/maps").read_text().splitlines())
    net.close()
    assert contents(reader) == {name: array.tobytes() for name, array in weights.items()}
    del reader
    gc.collect()
    assert "/memfd:hwlicense" not in Path("/proc/self/maps").read_text()


def test_parts_lie_beside_each_other_in_memory_and_leave_no_trace(net, files):
    with integration.path(net, f"parts/{PARTS[0]}") as path:
        folder = Path(path).parent
        links = sorted(folder.iterdir())
        assert [one.name for one in links] == [
            f"part-{part:05}-of-00003.gguf" for part in (1, 2, 3)
        ]  # no member's name
        assert links[0] == Path(path)
        assert all(one.is_symlink() for one in folder.iterdir())  # no content on any file system
        assert folder.stat().st_mode & 0o777 == 0o700
        for link, part in zip(links, PARTS, strict=True):
            assert contents(gguf.GGUFReader(link)) == contents(gguf.GGUFReader(files[1] / "parts" / part))
    assert not folder.exists()


def test_a_file_in_one_part_is_a_path_as_every_other(net):
    with integration.path(net, "cls.gguf") as path:
        assert path == net.path("cls.gguf")


def test_a_file_that_would_have_no_parts_is_one_as_every_other(vendor, tmp_path):
    name = "net-00001-of-00000.gguf"
    package, key, _ = pack(vendor, tmp_path, {name: b"alone"})
    with opened(vendor, package, key) as model, integration.path(model, name) as path:
        assert path == model.path(name)


def test_what_is_wrong_with_parts_is_said(net, vendor, tmp_path, monkeypatch):
    with pytest.raises(UsageError) as refused, integration.path(net, f"parts/{PARTS[1]}"):
        pass
    assert (refused.value.reason, PARTS[0] in refused.value.hint) == (Reason.USAGE, True)
    package, key, _ = pack(vendor, tmp_path, {PARTS[0]: b"alone"})
    with opened(vendor, package, key) as alone, pytest.raises(UsageError) as refused, integration.path(alone, PARTS[0]):
        pass
    assert (refused.value.reason, PARTS[1] in refused.value.what) == (Reason.MEMBER_ABSENT, True)
    monkeypatch.setattr(tempfile, "mkdtemp", fails)
    with pytest.raises(StorageError) as full, integration.path(net, f"parts/{PARTS[0]}"):
        pass
    assert integration.MEMORY in full.value.what
    assert "TMPDIR" in full.value.hint


def test_links_lie_elsewhere_where_memory_takes_none(net, files, tmp_path, monkeypatch):
    monkeypatch.setattr(integration, "MEMORY", "/proc")  # which takes no folder
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with integration.path(net, f"parts/{PARTS[0]}") as path:
        assert Path(path).parent.parent == tmp_path
        assert contents(gguf.GGUFReader(path)) == contents(gguf.GGUFReader(files[1] / "parts" / PARTS[0]))
    assert not list(tmp_path.iterdir())


def fails(**_options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_leaves_goes_with_the_next_use(net, end, tmp_path, monkeypatch):
    monkeypatch.setattr(integration, "MEMORY", str(tmp_path))
    child = os.fork()
    if child == 0:
        with integration.path(net, f"parts/{PARTS[0]}"):
            os.kill(os.getpid(), end)
    os.waitpid(child, 0)
    (dead,) = tmp_path.iterdir()
    assert not any("net-" in one.name for one in dead.iterdir())
    with integration.path(net, f"parts/{PARTS[0]}") as path:
        assert not dead.exists()
        with integration.path(net, f"parts/{PARTS[0]}"):  # another use leaves that one alone
            assert Path(path).exists()
    assert not list(tmp_path.iterdir())


def test_no_folder_of_anybody_else_is_removed(net, tmp_path, monkeypatch):
    """One that another process holds, a link, a file, and another user's."""
    monkeypatch.setattr(integration, "MEMORY", str(tmp_path))
    away = tmp_path / "away"
    for folder in (away, tmp_path / "hwlicense-gguf-other", tmp_path / "hwlicense-gguf-held"):
        folder.mkdir()
        (folder / "file").touch()
    (tmp_path / "hwlicense-gguf-link").symlink_to(away)
    (tmp_path / "hwlicense-gguf-file").touch()
    owner, stat = os.geteuid() + 1, os.fstat
    other = (tmp_path / "hwlicense-gguf-other").stat().st_ino
    monkeypatch.setattr(os, "fstat", lambda fd: owned(stat(fd), owner) if stat(fd).st_ino == other else stat(fd))
    with integration._lock(tmp_path / "hwlicense-gguf-held"), integration.path(net, f"parts/{PARTS[0]}"):
        pass
    assert {one.name for one in tmp_path.iterdir()} == {"away", *(f"hwlicense-gguf-{one}" for one in OTHERS)}
    assert (away / "file").exists()
    assert (tmp_path / "hwlicense-gguf-held/file").exists()


OTHERS = ("other", "held", "link", "file")


def owned(found: os.stat_result, owner: int) -> os.stat_result:
    return os.stat_result((*found[:4], owner, *found[5:]))


def test_a_folder_that_was_taken_for_one_that_was_left_is_made_anew(net, tmp_path, monkeypatch):
    monkeypatch.setattr(integration, "MEMORY", str(tmp_path))
    made = []
    mkdtemp = tempfile.mkdtemp

    def taken(**options) -> str:
        made.append(Path(mkdtemp(**options)))
        if len(made) == 1:
            made[0].rmdir()
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", taken)
    with integration.path(net, f"parts/{PARTS[0]}") as path:
        assert Path(path).parent == made[1]
    assert not list(tmp_path.iterdir())
