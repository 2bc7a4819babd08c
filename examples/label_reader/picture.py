"""Draws a photograph-like picture of a machined flange plate with engraved lettering: `picture.py [part.png]`.

The plate is a height map lit from the upper left, so that chamfers, holes and letters get their light and shadow from
the same surface. The same seed gives the same picture, and the font is the one within Pillow: no file is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.random import Generator
    from numpy.typing import NDArray

    Field: TypeAlias = NDArray[np.float64]

LINES = ("FLANGE DN50", "PN 16", "SN 4711-0815", "MADE IN EU")

# All lengths are pixels. The scene is drawn with a margin, because the camera is a little askew.
FRAME_WIDTH, FRAME_HEIGHT = 1280, 800
WIDTH, HEIGHT = 1376, 896
TILT = 1.6  # degrees

LEFT, TOP, RIGHT, BOTTOM, CORNER = 120.0, 110.0, 1256.0, 786.0, 30.0
BORE_X, BORE_Y, BORE_RADIUS, FACE_RADIUS = 418.0, 448.0, 116.0, 236.0
HOLES = ((186.0, 176.0), (1190.0, 176.0), (186.0, 720.0), (1190.0, 720.0))
HOLE_RADIUS, SINK_RADIUS = 25.0, 36.0
LETTERS_LEFT, FIRST_LINE, LINE_PITCH = 702, 286, 116
LETTER_SIZES = (62, 54)  # in turn
LIGHT = (-0.45, -0.55, 0.70)  # from the upper left, towards the camera


class Part(NamedTuple):
    """Distances in pixels, at every pixel of the scene, and the lettering."""

    x: Field
    y: Field
    inside: Field  # from the plate's outline, positive within it
    from_bore: Field
    from_hole: Field  # from the nearest one's middle
    letters: Field  # milling depth, 0 to 1


def smooth(field: Field, across: int, down: int) -> Field:
    """Return `field` after two box filters of the given odd widths in pixels: close to a Gaussian, and cheap."""
    for axis, width in ((1, across), (0, down)):
        margin = [(0, 0), (0, 0)]
        margin[axis] = (width // 2 + 1, width // 2)
        length = field.shape[axis]
        for _ in range(2 if width > 1 else 0):
            total = np.cumsum(np.pad(field, margin, mode="edge"), axis=axis)
            ahead = np.take(total, np.arange(width, width + length), axis=axis)
            field = (ahead - np.take(total, np.arange(length), axis=axis)) / width
    return field


def ramp(distance: Field, width: float) -> Field:
    """Return 0 outside, 1 at least `width` pixels inside, and the slope between."""
    return np.clip(distance / width, 0.0, 1.0)


def engrave(lines: Sequence[str]) -> Field:
    """Return the milling depth of the letters, 0 to 1; words stand well apart, as on a part."""
    mask = Image.new("L", (WIDTH, HEIGHT))
    pen = ImageDraw.Draw(mask)
    for number, line in enumerate(lines):
        font = ImageFont.load_default(size=LETTER_SIZES[number % len(LETTER_SIZES)])
        place = (LETTERS_LEFT, FIRST_LINE + number * LINE_PITCH)
        pen.text(place, line.replace(" ", "  "), font=font, fill=255, stroke_width=1.2, anchor="ls")
    return np.asarray(mask, dtype=np.float64) / 255.0


def measure(lines: Sequence[str]) -> Part:
    """Return the geometry of the part with these lines on it."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float64)
    beyond_x = np.maximum(np.maximum(LEFT + CORNER - x, x - RIGHT + CORNER), 0.0)
    beyond_y = np.maximum(np.maximum(TOP + CORNER - y, y - BOTTOM + CORNER), 0.0)
    within = np.minimum(np.minimum(x - LEFT, RIGHT - x), np.minimum(y - TOP, BOTTOM - y))
    at_corner = (beyond_x > 0) & (beyond_y > 0)
    return Part(
        x=x,
        y=y,
        inside=np.where(at_corner, CORNER - np.hypot(beyond_x, beyond_y), within),
        from_bore=np.hypot(x - BORE_X, y - BORE_Y),
        from_hole=np.min([np.hypot(x - across, y - down) for across, down in HOLES], axis=0),
        letters=engrave(lines),
    )


def light(part: Part) -> Field:
    """Return how much of the light each point of the surface gets: about 0.7 where it is flat."""
    height = 9.0 * ramp(part.inside, 9.0) + 7.0 * ramp(FACE_RADIUS - part.from_bore, 7.0)
    height -= 12.0 * ramp(BORE_RADIUS + 12.0 - part.from_bore, 12.0)
    height -= 11.0 * ramp(SINK_RADIUS - part.from_hole, SINK_RADIUS - HOLE_RADIUS)
    slope_y, slope_x = np.gradient(smooth(height - 3.4 * part.letters, 3, 3))
    lit: Field = (LIGHT[2] - slope_x * LIGHT[0] - slope_y * LIGHT[1]) / np.sqrt(1.0 + slope_x**2 + slope_y**2)
    return lit.clip(0.0, 1.3)


def metal(part: Part, noise: Generator) -> Field:
    """Return the brightness of the steel: brushed plate, turned face, dark letters."""
    lit = light(part)
    shape = part.x.shape
    brushed = smooth(noise.normal(size=shape), 91, 1) + 0.4 * smooth(noise.normal(size=shape), 31, 1)
    sheen = np.exp(-(((part.y - 0.225 * part.x - 190.0) / 240.0) ** 2))
    plate = 0.30 + 0.42 * lit + 0.10 * sheen + 0.019 * brushed / brushed.std()
    # a turned face shows two bright fans where its grooves lie across the light
    grooves = smooth(noise.normal(size=(1, 4096)), 3, 1)[0]
    turned = grooves[(part.from_bore * 3.0).astype(int)] / grooves.std()
    fans = np.cos(np.arctan2(part.y - BORE_Y, part.x - BORE_X) - np.arctan2(LIGHT[1], LIGHT[0])) ** 6
    face = 0.20 + 0.40 * lit + 0.30 * fans + 0.030 * turned
    on_face = ramp(FACE_RADIUS - part.from_bore, 2.0) * ramp(part.from_bore - BORE_RADIUS, 2.0)
    steel: Field = plate * (1.0 - on_face) + face * on_face
    return steel - 0.26 * part.letters - 0.05 * smooth(part.letters, 9, 9)


def arrange(part: Part, noise: Generator) -> Field:
    """Return the brightness of the scene: the part on a dark bench, with its shadow and what its openings show."""
    bench = 0.135 + 0.03 * smooth(noise.normal(size=part.x.shape), 5, 5) + 0.02 * (part.x / WIDTH)
    shadow = smooth(np.roll(ramp(part.inside, 2.0), (14, 11), axis=(0, 1)), 31, 31)
    bench *= 1.0 - 0.75 * shadow
    far_wall = np.clip(((part.x - BORE_X) * 0.63 + (part.y - BORE_Y) * 0.77) / BORE_RADIUS, 0.0, 1.0)
    rim = 1.0 - ramp(BORE_RADIUS - part.from_bore, 34.0)
    bored = 0.045 + (0.30 * far_wall**2 + 0.03) * rim
    scene = bench
    for above, covers in (
        (metal(part, noise), ramp(part.inside, 1.5)),
        (bored, ramp(BORE_RADIUS - part.from_bore, 1.5)),
        (np.full_like(scene, 0.055), ramp(HOLE_RADIUS - part.from_hole, 1.5)),
    ):
        scene = scene * (1.0 - covers) + above * covers
    return scene


def draw(lines: Sequence[str] = LINES, seed: int = 4711) -> Image.Image:
    """Return the picture, 1280 by 800 pixels of 8-bit grayscale, as a camera gives it: askew, vignetted, noisy."""
    noise = np.random.default_rng(seed)
    scene = Image.fromarray(arrange(measure(lines), noise).astype(np.float32))
    margin_x, margin_y = (WIDTH - FRAME_WIDTH) // 2, (HEIGHT - FRAME_HEIGHT) // 2
    seen = scene.rotate(TILT, resample=Image.Resampling.BICUBIC).crop(
        (margin_x, margin_y, margin_x + FRAME_WIDTH, margin_y + FRAME_HEIGHT)
    )
    y, x = np.mgrid[-1.0 : 1.0 : FRAME_HEIGHT * 1j, -1.0 : 1.0 : FRAME_WIDTH * 1j]
    grey = np.asarray(seen, dtype=np.float64) * (1.0 - 0.17 * (x**2 + y**2)) + noise.normal(scale=0.011, size=x.shape)
    return Image.fromarray((np.clip(grey, 0.0, 1.0) * 255.0).round().astype(np.uint8))


if __name__ == "__main__":
    draw().save(Path(sys.argv[1] if len(sys.argv) > 1 else "part.png"))
