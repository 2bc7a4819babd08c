"""The clinic's example, as a reader runs it, and the parts it is made of."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "clinic"


def run(program, *arguments, **options):
    done = subprocess.run(
        [sys.executable, EXAMPLE / program, *arguments],
        capture_output=True, text=True, timeout=300, check=False, **options,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_story_goes_as_it_is_told():
    told = run("clinic_story.py")
    assert re.findall(r"reason: (\w+)", told) == ["INSTANCES_EXCEEDED", "INFERENCES_EXHAUSTED", "LICENSE_SUPERSEDED"]
    assert told.count("waits: 0") == 3  # both workstations of the first day, and the one after the revision
    folder = ROOT / "build" / "clinic"
    with Image.open(folder / "days.png") as picture:
        assert picture.width == 1280
        colours = {colour for _, colour in picture.getcolors(maxcolors=1 << 16)}
    assert {(38, 140, 96), (230, 160, 30), (200, 50, 50), (110, 70, 180)} <= colours  # answers, and three refusals
    lines = (folder / "imitator.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["what"] == "answer" for line in lines) < 142


def test_training_gives_the_same_classifier_every_time(tmp_path):
    said = {run("training.py", tmp_path / name) for name in "ab"}
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    (right,) = {share for line in said for share in re.findall(r"right on ([\d.]+)%", line)}
    assert float(right) > 94


def test_nobody_has_anothers_images():
    program = """if True:
        from measurements import deal
        rows = [tuple(image) for share in deal() for image in share.images]
        print(len(rows), len(set(rows)), [len(share.images) for share in deal()])
    """
    said = subprocess.run([sys.executable, "-c", program], cwd=EXAMPLE, capture_output=True, text=True, check=True)
    assert said.stdout == "569 569 [285, 142, 142]\n"


@pytest.mark.parametrize("name", ["sklearn", "scipy"])
def test_the_data_are_read_without_the_library(name):
    program = f"import measurements, sys; measurements.deal(); sys.exit({name!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=EXAMPLE, env=os.environ, check=True)
