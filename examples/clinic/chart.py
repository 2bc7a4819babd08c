"""Draws diaries: `chart.py OUT.png NAME=DIARY[,DIARY...]...`, a row for each name, a tick for each answer."""

from __future__ import annotations

import json
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, ROW, LEFT, RIGHT, TOP, BOTTOM = 1280, 190, 30, 30, 30, 60  # pixels
PAPER, INK, GRID = (250, 250, 247), (40, 44, 48), (222, 222, 216)
ANSWER = (38, 140, 96)
REFUSALS = {
    "RATE_EXCEEDED": (230, 160, 30),
    "ABNORMAL_USE": (200, 50, 50),
    "INFERENCES_EXHAUSTED": (110, 70, 180),
}
OTHER = (120, 120, 120)


class Entry(NamedTuple):
    """A line of a diary: seconds since the first of all, and "answer" or the reason of a refusal."""

    at: float
    what: str


def read(diaries: Sequence[str]) -> list[Entry]:
    """Return what several diaries say, in the order of time."""
    lines = chain.from_iterable(Path(diary).read_text(encoding="utf-8").splitlines() for diary in diaries)
    return sorted(Entry(**json.loads(line)) for line in lines)


def draw(rows: dict[str, list[Entry]]) -> Image.Image:
    """Return the picture: answers stand above each row's line, refusals hang below; the curve counts the answers."""
    first = min(entries[0].at for entries in rows.values() if entries)
    last = max(entries[-1].at for entries in rows.values() if entries) + 0.5
    most = max(sum(entry.what == "answer" for entry in entries) for entries in rows.values())
    picture = Image.new("RGB", (WIDTH, TOP + ROW * len(rows) + BOTTOM), PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=17)
    scale = (WIDTH - LEFT - RIGHT) / (last - first)
    for hour in range(int(last - first) + 1):
        across = LEFT + hour * scale
        pen.line((across, TOP, across, TOP + ROW * len(rows)), fill=GRID)
        if hour % 4 == 0:
            pen.text((across, TOP + ROW * len(rows) + 6), f"{hour} h", font=font, fill=INK, anchor="ma")
    for number, (name, entries) in enumerate(rows.items()):
        line = TOP + ROW * number + 130
        pen.line((LEFT, line, WIDTH - RIGHT, line), fill=INK)
        answers, curve = 0, [(LEFT, line - 24)]
        for entry in entries:
            across = round(LEFT + (entry.at - first) * scale)
            if entry.what == "answer":
                answers += 1
                pen.line((across, line - 20, across, line), fill=ANSWER, width=2)
            else:
                pen.line((across, line + 1, across, line + 22), fill=REFUSALS.get(entry.what, OTHER), width=2)
            curve.append((across, line - 24 - round(70 * answers / most)))
        pen.line(curve, fill=ANSWER, width=2)
        pen.text((LEFT + 4, line - 128), f"{name}: {answers} answers", font=font, fill=INK)
    across = LEFT
    for name, colour in ({"answer": ANSWER} | REFUSALS).items():
        down = TOP + ROW * len(rows) + 34
        pen.rectangle((across, down, across + 14, down + 14), fill=colour)
        pen.text((across + 22, down + 7), name, font=font, fill=INK, anchor="lm")
        across += 60 + round(pen.textlength(name, font=font))
    return picture


def main(target: str, *arguments: str) -> None:
    """Draw the diaries of each name into `target`."""
    pairs = (argument.split("=", 1) for argument in arguments)
    draw({name: read(diaries.split(",")) for name, diaries in pairs}).save(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
