"""A large model: bytes a second from a warm page cache, and memory, beside reading the same bytes and beside peers."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import peers
from benchmarks.measure import in_turn, run, told

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.measure import Run
    from benchmarks.scene import Scene

READ = "hwlicense: open and read"
PATH = "hwlicense: open, a path"
LAZY = "hwlicense: open, then in parts"
PLAIN = "read() into fresh memory"
HUGE = "read() into huge pages"
AGE_NULL = "age -d to /dev/null"
AGE_PIPE = "age -d through a pipe"
PACK = "hwlicense vendor pack"
AGE_PACK = "age -e"
PIECE = 1 << 20

# Each prints the seconds that it took after its imports, and a check of what it has read.
_PREPARED = """
import hashlib, json, mmap, os, subprocess, sys, time
import hwlicense, hwlicense.device.opening, hwlicense.binders.tpm
# Virtual machines give memory that is free for some seconds back to their host, and then wait for it page by page.
# Touched just before, it is there: what is measured is this system, not the host's.
touched = mmap.mmap(-1, {size}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
touched.madvise(mmap.MADV_HUGEPAGE)
touched.madvise(23)
touched.close()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak
started = time.perf_counter()
{work}
seconds = time.perf_counter() - started
print(json.dumps([seconds, size, first.hex(), last.hex()]))
"""
_OPENED = "with hwlicense.open(sys.argv[1], vendor=sys.argv[2], home=sys.argv[3]) as model:\n    name, = model.names\n"
_WORK = {
    READ: _OPENED + "    data = model.read(name)\nsize, first, last = len(data), bytes(data[:32]), bytes(data[-32:])",
    PATH: _OPENED
    + """
    with open(model.path(name), "rb") as file:
        size, first = os.fstat(file.fileno()).st_size, file.read(32)
        file.seek(-32, os.SEEK_END)
        last = file.read()
""",
    LAZY: _OPENED
    + f"""
    first, last, size = b"", b"", 0
    buffer = memoryview(bytearray({PIECE}))
    with model.open(name) as file:
        while got := file.readinto(buffer):
            first, last, size = first or bytes(buffer[:32]), bytes(buffer[got - 32 : got]), size + got
""",
    PLAIN: """
file = os.open(sys.argv[1], os.O_RDONLY)
size, at = os.fstat(file).st_size, 0
memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
view = memoryview(memory)
while at < size:
    at += os.readv(file, [view[at:]])
first, last = bytes(view[:32]), bytes(view[-32:])
""",
    AGE_PIPE: f"""
age = subprocess.Popen(["age", "-d", "-i", sys.argv[2], sys.argv[1]], stdout=subprocess.PIPE, bufsize=0)
buffer = memoryview(bytearray({PIECE}))
first, last, size = b"", b"", 0
while got := age.stdout.readinto(buffer):
    first, size = first or bytes(buffer[:32]), size + got
    last = (last + bytes(buffer[max(0, got - 32) : got]))[-32:]
assert age.wait() == 0
""",
}
# How many times as fast as each of them reading and packing are to be
GOALS = {
    PLAIN: 2.0,
    HUGE: 0.6,
    AGE_NULL: 2.5,
    "CryptoTensors: read": 1.5,
    "tensorizer, encrypted: read": 3.0,
    AGE_PACK: 1.0,
    "CryptoTensors: write": 1.0,
    "tensorizer, encrypted: write": 1.0,
}
_WORK[HUGE] = _WORK[PLAIN].replace("NOHUGEPAGE", "HUGEPAGE")


def measure(scene: Scene, runs: int, size: int) -> dict[str, Any]:
    """The figures for `size` random bytes, in bytes a second and bytes of memory."""
    source, identity, sealed = scene.folder / "large.bin", scene.folder / "identity", scene.folder / "large.age"
    first, last = random_file(source, size)
    run(["age-keygen", "-o", str(identity)])
    recipient = run(["age-keygen", "-y", str(identity)]).output.decode().strip()
    scene.package.unlink(missing_ok=True)
    beside = peers.measures(scene.folder, source)
    packing = in_turn(
        {
            PACK: partial(run, scene.pack(source), scene.environment),
            AGE_PACK: partial(run, ["age", "-e", "-r", recipient, "-o", str(sealed), str(source)]),
            **beside.packing,
        },
        runs,
    )
    scene.license()
    ours = (scene.package, scene.vendor_text, scene.home)
    arguments: dict[str, tuple[str | Path, ...]] = {
        READ: ours,
        PATH: ours,
        LAZY: ours,
        PLAIN: (source,),
        HUGE: (source,),
        AGE_PIPE: (sealed, identity),
    }
    measures: dict[str, Callable[[], Run]] = {
        name: partial(inside, scene, name, given, [size, first, last]) for name, given in arguments.items()
    }
    measures[AGE_NULL] = partial(run, ["age", "-d", "-i", str(identity), str(sealed)], stdout=Path(os.devnull))
    reading = in_turn(measures | beside.reading, runs)
    against = {
        name: one.median / ours.median
        for every, ours in ((reading, reading[READ]), (packing, packing[PACK]))
        for name, one in every.items()
        if name in GOALS
    }
    return {
        "size": size,
        "reading": {name: one._asdict() for name, one in reading.items()},
        "packing": {name: one._asdict() for name, one in packing.items()},
        "peers": peers.versions(),
        "goals": {name: {"ratio": ratio, "goal": GOALS[name]} for name, ratio in against.items()},
        "imports_peak": run(scene.script(_PREPARED.format(work="size = 0; first = last = b''", size=1 << 21)), {}).peak,
    }


def inside(scene: Scene, way: str, given: tuple[str | Path, ...], expected: list[int | str]) -> Run:
    """Read once, in a process of its own; seconds without its start and imports. `expected`: size, begin and end."""
    command = scene.script(_PREPARED.format(work=_WORK[way], size=expected[0]), *given)
    return told(command, scene.environment, expected=expected)


def random_file(path: Path, size: int) -> tuple[str, str]:
    """Make it; its first and last 32 bytes, in hexadecimal."""
    with path.open("wb+") as file:
        for start in range(0, size, 16 * PIECE):
            file.write(os.urandom(min(16 * PIECE, size - start)))
        file.seek(0)
        first = file.read(32)
        file.seek(-32, os.SEEK_END)
        return first.hex(), file.read(32).hex()


def table(found: dict[str, Any]) -> list[str]:
    """The figures for people."""
    lines = []
    for what, reference in (("reading", PLAIN), ("packing", AGE_PACK)):
        base = found[what][reference]["median"]
        title = f"{what} {found['size'] >> 20:,} MiB"
        lines += ["", f"{title:<34}{'GB/s':>8}{'from':>8}{'to':>8}{'ratio':>8}{'peak MiB':>10}"]
        for name, one in found[what].items():
            speeds = "".join(f"{found['size'] / one[key] / 1e9:>8.2f}" for key in ("median", "most", "least"))
            lines.append(f"{name:<34}{speeds}{base / one['median']:>7.2f}x{one['peak'] >> 20:>10,}")
        lines.append(f"(ratio: speed to that of {reference})")
    lines += ["", f"{'times as fast as':<34}{'ratio':>8}{'goal':>8}"]
    for name, one in found["goals"].items():
        met = "" if one["ratio"] >= one["goal"] else "  missed"
        lines.append(f"{name:<34}{one['ratio']:>7.2f}x{one['goal']:>7.1f}x{met}")
    for name in sorted({"cryptotensors", "tensorizer"} - set(found["peers"])):
        lines.append(f"{name} was not measured, as it is not installed (`scripts/peers`).")
    lines.append(f"an interpreter with everything imported: {found['imports_peak'] >> 20} MiB")
    return lines[1:]
