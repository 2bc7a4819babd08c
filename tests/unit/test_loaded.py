"""What a process has loaded, looked at while it changes."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hwlicense import loaded
from tests.installed import shared_library

UNLOADING = """
import _ctypes, sys, threading, time
from hwlicense import loaded
def load_and_unload():
    while not ended:
        handle = _ctypes.dlopen(sys.argv[1], 2)
        _ctypes.dlclose(handle)
ended = []
thread = threading.Thread(target=load_and_unload)
thread.start()
until, problems = time.monotonic() + 2, []
while time.monotonic() < until:
    problems += [one.problem for one in loaded.everything() if one.problem.startswith("changed")]
ended.append(1)
thread.join()
print(problems)
"""


def test_a_library_that_is_unloaded_meanwhile_harms_nobody(tmp_path):
    code = "static const char filler[1 << 20] = {1}; int of(int at) { return filler[at]; }"
    words = [sys.executable, "-c", UNLOADING, str(shared_library(tmp_path, "passing", code))]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize(("times", "same"), [(2, True), (1000, False)])
def test_what_differs_is_looked_at_again(monkeypatch, times, same):
    """It may have been unloaded, and loaded again at the same place; what was changed stays so."""
    library = next(one for one in loaded.mappings(os.getpid()) if "libpython" in one.path or "/libc" in one.path)
    right, looks = loaded._memory, []

    def memory(address, length):
        looks.append(address)
        return right(address, length) if len(looks) > times else b"other"

    monkeypatch.setattr(loaded, "_memory", memory)
    with Path(library.path).open("rb") as file:
        assert loaded._same(file.fileno(), library) is same


def test_what_is_beyond_the_end_of_a_file_or_unmapped_is_not_read(tmp_path):
    page, path = mmap.PAGESIZE, tmp_path / "file"
    path.write_bytes(b"x" * 2 * page)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 2 * page, mmap.MAP_PRIVATE) as mapped:
        pointer = ctypes.c_char.from_buffer(mapped)
        address = ctypes.addressof(pointer)
        os.truncate(path, page)
        assert loaded._memory(address, 2 * page) == b"x" * page
        assert loaded._memory(address + page, page) == b""
        del pointer
    assert loaded._memory(8, 8) == b""
