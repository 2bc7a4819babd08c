"""The label reader with the real PP-OCR networks, run as a user runs it: from files, and from sealed memory."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image, ImageChops

if TYPE_CHECKING:
    from collections.abc import Sequence

EXAMPLE = Path(__file__).parents[2] / "examples" / "label_reader"
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
LINES = ["FLANGE DN50", "PN 16", "SN 4711-0815", "MADE IN EU"]


def run(program: str, *arguments: str | Path, pass_fds: Sequence[int] = ()) -> list[str]:
    """Run one of the example's programs and return its lines. It must say nothing on the standard error."""
    done = subprocess.run(
        [sys.executable, EXAMPLE / program, *arguments],
        capture_output=True, text=True, timeout=120, check=False, pass_fds=pass_fds,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("part") / "part.png"
    assert run("picture.py", path) == []
    return path


@pytest.fixture(scope="module")
def weights() -> list[str]:
    return run("weights.py")


@pytest.fixture(scope="module")
def from_files(part: Path, weights: list[str]) -> list[str]:
    return run("reader.py", part, part.with_name("part-read.png"), *weights)


def test_the_picture_is_the_same_every_time(part: Path, tmp_path: Path) -> None:
    run("picture.py", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == part.read_bytes()


def test_every_line_is_read_exactly(from_files: list[str]) -> None:
    assert [line.split(maxsplit=1)[1] for line in from_files] == LINES
    assert min(float(line.split()[0]) for line in from_files) > 0.85


def test_the_marked_picture_differs_at_the_lettering_alone(part: Path, from_files: list[str]) -> None:
    with Image.open(part) as plain, Image.open(part.with_name("part-read.png")) as marked:
        changed = ImageChops.difference(plain.convert("RGB"), marked).getbbox()
    assert from_files
    assert changed is not None
    left, top, right, bottom = changed
    assert 630 < left < 660
    assert 140 < top < 170
    assert 1060 < right < 1090
    assert 580 < bottom < 610


def test_sealed_memory_reads_as_files_do(part: Path, weights: list[str], from_files: list[str], tmp_path: Path) -> None:
    with ExitStack() as stack:
        descriptors = []
        for path in weights:
            descriptor = os.memfd_create("network", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            descriptors.append(descriptor)
            stack.callback(os.close, descriptor)
            content = Path(path).read_bytes()
            assert os.write(descriptor, content) == len(content)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        paths = [f"/proc/self/fd/{descriptor}" for descriptor in descriptors]
        lines = run("reader.py", part, tmp_path / "part-read.png", *paths, pass_fds=descriptors)
    assert lines == from_files
    assert (tmp_path / "part-read.png").read_bytes() == part.with_name("part-read.png").read_bytes()
