"""Progress of long work: on a terminal, with rate and time left; nowhere else a word of it."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import time

import pytest

from hwlicense.cli import output
from tests.world import PROGRAM


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")


def test_rate_and_time_left(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with output.progress("Packing", 40 << 20) as advance:
        time.sleep(1.05)  # click estimates from the first second on
        advance(10 << 20)
        time.sleep(0.05)
        advance(10 << 20)
        advance(20 << 20)
    shown = terminal.getvalue()
    assert re.search(r"Packing +\[#+-+\] +50% +00:00:0\d +\d+ MB/s", shown)
    assert re.search(r"\[#{30}\] +100% +\d+ MB/s", shown)


def test_it_fits_into_a_narrow_terminal_and_leaves_a_dumb_one_alone(monkeypatch):
    for kind, columns in (("xterm", 50), ("xterm", 44), ("dumb", 80)):
        monkeypatch.setenv("TERM", kind)
        monkeypatch.setenv("COLUMNS", str(columns))
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        with output.progress("Packing", 40 << 20) as advance:
            time.sleep(1.05)
            advance(40 << 20)
        lines = re.split(r"[\r\n]", re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", terminal.getvalue()))
        assert max(map(len, lines)) <= columns
        assert any(lines) is (kind != "dumb")


def test_packing_and_checking_show_it_on_terminals_alone(vendor, tmp_path):
    (tmp_path / "weights").write_bytes(bytes(9 << 20))
    words = [PROGRAM, "vendor", "pack", "--vendor", vendor.folder / "vendor", "--name", "n", "--version", "1"]
    for terminal in (True, False):
        ours, theirs = pty.openpty() if terminal else os.pipe()
        command = [*words, "-o", tmp_path / str(terminal), tmp_path / "weights"]
        subprocess.run(command, check=True, stderr=theirs)
        said = os.read(ours, 1 << 16).decode()
        assert ("MB/s" in said) is ("[#" in said) is terminal
        assert "Packed 1 file" in said
        os.close(ours)
        os.close(theirs)


def test_what_is_counted_shows_its_number(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with output.progress("Recording", 40, in_bytes=False) as advance:
        advance(40)
    assert re.search(r"Recording +\[#{30}\] +40/40", terminal.getvalue())
