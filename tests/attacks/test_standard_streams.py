"""A daemon that has closed its standard streams: nothing of ours may take their numbers, for others write there."""

import subprocess
import sys

PROGRAM = """
import os, sys
from pathlib import Path
for number in range(3):
    os.close(number)
from hwlicense.device.memory import SealedFile
from hwlicense.storage import OpenFile, new_file
sealed = SealedFile(4, lambda view: view.__setitem__(slice(None), b"good"))
with OpenFile(Path(sys.argv[1])) as opened, new_file(Path(sys.argv[2])) as made:
    numbers = [sealed.fd, opened.fd, made.fileno()]
os._exit(0 if min(numbers) > 2 and Path(sealed.path).read_bytes() == b"good" else 1)
"""


def test_no_file_of_ours_becomes_a_standard_stream(tmp_path):
    (tmp_path / "in").write_bytes(b"x")
    command = [sys.executable, "-c", PROGRAM, tmp_path / "in", tmp_path / "out"]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0
