"""Models of several sizes: memory at the peak beside the model's size, one tensor out of many, and many workers."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Summary, in_turn, run, told

if TYPE_CHECKING:
    from benchmarks.scene import Scene

TENSOR = 64 << 20
SPARE = 2 << 30  # bytes left for all else, where a model is read whole
DISK = "/var/tmp"  # noqa: S108  # a folder of this program's own within
WORKERS = 8
WHOLE, PARTS, ONE, SHARED = "read whole", "read in parts", "one tensor of 64 MiB", f"{WORKERS} forked workers"

_PREPARED = """
import json, os, sys, time
import hwlicense, hwlicense.device.opening, hwlicense.binders.tpm
name, size = "weights", int(sys.argv[4])
def shared_out():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
before, held = shared_out(), 0
with hwlicense.open(sys.argv[1], vendor=sys.argv[2], home=sys.argv[3]) as model:
    started = time.perf_counter()
    {work}
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, held]))
"""
_WORK = {
    WHOLE: "data = model.read(name)",
    PARTS: f"""
    buffer, file = bytearray({TENSOR}), model.open(name)
    while file.readinto(buffer): pass
""",
    ONE: f"""
    buffer, file = bytearray({TENSOR}), model.open(name)
    file.seek(size // 2 + 12345)
    assert file.readinto(buffer) == {TENSOR}
""",
    # Each touches all of it; what they hold is the sum of their shares (PSS), less what the parent was without a model
    SHARED: f"""
    data, (there, here), (wait, go), (stay, end) = model.read(name), os.pipe(), os.pipe(), os.pipe()
    for _ in range({WORKERS}):
        if not os.fork():
            os.close(end)
            sum(data[at] for at in range(0, size, 4096))
            os.write(here, b"1")
            os.read(wait, 1)  # until all have
            os.write(here, shared_out().to_bytes(8, "little"))
            os.read(stay, 1)  # until all have said
            os._exit(0)
    told = lambda each: b"".join(os.read(there, each) for _ in range({WORKERS}))
    told(1)
    os.write(go, b"1" * {WORKERS})
    parts = told(8)
    held = shared_out() - before + sum(int.from_bytes(parts[at : at + 8], "little") for at in range(0, len(parts), 8))
    os.close(end)
""",
}


def measure(scene: Scene, runs: int, sizes: list[int]) -> dict[str, Any]:
    """Seconds and bytes of memory, by size and way. The content is zeros, which no step of it is quicker for.

    What would not leave memory enough for it, if its package lay there too, lies on a disk.
    """
    found = {}
    before = scene.package
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=scene.folder if size * 2.5 < _available() else DISK) as place:
            if shutil.disk_usage(place).free > size * 1.1:
                found[str(size)] = _of(scene, Path(place), runs, size, shared=size == sizes[0])
    scene.package = before
    return found


def _of(scene: Scene, place: Path, runs: int, size: int, *, shared: bool) -> dict[str, Any]:
    source, scene.package = place / "weights", place / "large.hwpkg"
    with source.open("wb") as file:
        file.truncate(size)
    packing = run(scene.pack(source), scene.environment)
    scene.license()
    given = (scene.package, scene.vendor_text, scene.home, str(size))
    ways = {
        way: scene.script(_PREPARED.format(work=work), *given)
        for way, work in _WORK.items()
        if (way in {PARTS, ONE} or size + SPARE < _available()) and (way != SHARED or shared)
    }
    held: dict[str, list[list[int]]] = {way: [] for way in ways}
    each = in_turn({way: partial(told, words, scene.environment, into=held[way]) for way, words in ways.items()}, runs)
    each["pack"] = Summary.of([packing.seconds], packing.peak)
    figures: dict[str, Any] = {way: one._asdict() for way, one in each.items()}
    return figures | {
        "held by workers": held[SHARED][-1][0] if SHARED in held else None,
        "on disk": place.is_relative_to(DISK),
    }


def _available() -> int:
    with Path("/proc/meminfo").open(encoding="ascii") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def table(found: dict[str, Any]) -> list[str]:
    """For a person."""
    lines = []
    for size, ways in found.items():
        title = f"{int(size) >> 20:,} MiB, zeros{', on disk' if ways['on disk'] else ''}"
        lines += ["", f"{title:<34}{'median s':>10}{'GB/s':>8}{'peak MiB':>10}{'to its size':>12}"]
        for way, one in ways.items():
            if isinstance(one, dict):
                done = TENSOR if way == ONE else int(size)
                rate = "" if way == SHARED else f"{done / one['median'] / 1e9:.2f}"
                peak = f"{one['peak'] >> 20:>10,}{one['peak'] / int(size):>11.2f}x"
                lines.append(f"{way:<34}{one['median']:>10.3f}{rate:>8}{peak}")
        if held := ways["held by workers"]:
            lines.append(f"{WORKERS} workers and their parent hold {held / int(size):.2f} copies (PSS)")
    return lines[1:]
