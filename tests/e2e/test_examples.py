"""The examples, as a reader runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

from hwlicense_simulators import Tpm

ROOT = Path(__file__).parents[2]


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_demo_goes_as_it_is_told():
    told = run(sys.executable, ROOT / "examples" / "label_reader" / "story.py")
    assert told.count("SN 4711-0815") == 4
    reasons = re.findall(r"reason: (\w+)", told)
    assert reasons == [
        "WRONG_DEVICE",
        "WRONG_DEVICE",
        "PCR_MISMATCH",
        "PACKAGE_DAMAGED",
        "PACKAGE_DAMAGED",
        "DONGLE_ABSENT",
    ]
    assert "the line stands still: DONGLE_ABSENT" in told
    assert (ROOT / "build" / "demo" / "part-read.png").stat().st_size > 100_000


def test_a_model_of_ones_own(tmp_path):
    with Tpm() as tpm:
        run(ROOT / "examples" / "own_model" / "story.sh", cwd=tmp_path, env=os.environ | tpm.environment)


def test_a_program_that_is_sealed(tmp_path):
    with Tpm() as tpm:
        told = run(ROOT / "examples" / "sealed" / "story.sh", cwd=tmp_path, env=os.environ | tpm.environment)
    assert told.endswith("grey 170: scratched (0.27)\ngrey 250: broken (0.59)\nexit status 1\n")
    assert "secret.cpython-" in told
    assert "secret.cpython-311.pyc" not in told


def test_a_product_tests_itself_with_the_plugin():
    folder = ROOT / "examples" / "ci"
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull)
    assert "3 passed" in run(*command, "--rootdir", folder, folder)
