"""Signed outputs: what a record costs the thread that makes it at 10,000 a second, and what a SIGKILL loses."""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import statistics
import subprocess
import time
from typing import TYPE_CHECKING, Any, Final

from benchmarks.measure import Failed, Summary, run
from hwlicense.core.chain import NOTHING, Chain, Checkpoint, Output, parse

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.scene import Scene

RATE: Final = 10_000
_SIZE: Final = 8

_PACED: Final = """
import json, sys, time, hwlicense
vendor, package, home, folder, seconds, rate, sync = sys.argv[1:]
pace, count = 1 / float(rate), int(float(rate) * float(seconds))
clock, taken = time.perf_counter_ns, []
with hwlicense.open(package, vendor=open(vendor).read(), home=home) as model:
    begun = time.perf_counter()
    outputs = model.outputs(folder, sync=sync)
    beginning = time.perf_counter() - begun
    begun = time.perf_counter()
    for number in range(count):
        while time.perf_counter() < begun + number * pace:
            pass
        before = clock()
        outputs.append({"alert": "port scan", "score": 0.97, "number": number})
        taken.append(clock() - before)
    took = time.perf_counter() - begun
    idle = []
    for number in range(count):
        while time.perf_counter() < begun + took + number * pace:
            pass
        before = clock()
        idle.append(clock() - before)
    idle.sort()
    before = time.perf_counter()
    outputs.flush()
    flushing = time.perf_counter() - before
    before = time.perf_counter()
    outputs.close()
    closing = time.perf_counter() - before
taken.sort()
print(json.dumps({
    "records": count, "took_s": took, "begin_ms": beginning * 1e3, "flush_ms": flushing * 1e3, "end_ms": closing * 1e3,
    "median_us": taken[count // 2] / 1e3, "p9999_us": taken[min(count - 1, count * 9999 // 10000)] / 1e3,
    "worst_us": taken[-1] / 1e3, "idle_p9999_us": idle[min(count - 1, count * 9999 // 10000)] / 1e3,
    "idle_worst_us": idle[-1] / 1e3,
}))
"""

_KILLED: Final = """
import mmap, struct, sys, time, hwlicense
vendor, package, home, folder, counter, rate = sys.argv[1:]
pace = 1 / float(rate)
file = open(counter, "r+b")
shared = mmap.mmap(file.fileno(), 8)
model = hwlicense.open(package, vendor=open(vendor).read(), home=home)
outputs, begun = model.outputs(folder), time.perf_counter()
for number in range(1 << 60):
    while time.perf_counter() < begun + number * pace:
        pass
    outputs.append({"alert": "port scan", "score": 0.97, "number": number})
    struct.pack_into("<q", shared, 0, number + 1)
"""


def measure(scene: Scene, seconds: float, kills: int) -> dict[str, Any]:
    """All of it, with a small package."""
    scene.package.unlink(missing_ok=True)
    source = scene.folder / "weights.bin"
    source.write_bytes(bytes(4096))
    run(scene.pack(source), scene.environment)
    scene.license()
    paced = {sync: _paced(scene, seconds, sync) for sync in ("checkpoint", "always", "never")}
    return {"rate": RATE, "paced": paced, "signing": _signing(), "kills": _kills(scene, kills)}


def table(found: dict[str, Any]) -> list[str]:
    """For people."""
    lines = [f"signed outputs, {found['rate']:,} records a second; microseconds for the thread that makes one"]
    for sync, each in found["paced"].items():
        lines.append(
            f"  sync={sync:<11} median {each['median_us']:6.1f}   p99.99 {each['p9999_us']:8.1f}   "
            f"worst {each['worst_us']:8.1f}   "
            f"(without recording: p99.99 {each['idle_p9999_us']:.1f}, worst {each['idle_worst_us']:.1f})"
        )
    signing, kills = found["signing"], found["kills"]
    lines.append(
        f"  chained {signing['chained_us']:.1f} us a record; signed each {signing['signed_us']:.1f} us, "
        f"with a new key each {signing['ratchet_us']:.1f} us"
    )
    lines.append(
        f"  SIGKILL ({kills['kills']} times): records made and not in the file: median {kills['lost']['median']:.0f}, "
        f"most {kills['lost']['most']:.0f}; in the file and under no signature: most {kills['unsigned']['most']:.0f}; "
        f"files that do not verify: {kills['damaged']}"
    )
    return lines


def _arguments(scene: Scene, folder: Path) -> tuple[str | Path, ...]:
    return scene.vendor / "vendor.pub.json", scene.package, scene.home, folder


def _paced(scene: Scene, seconds: float, sync: str) -> dict[str, Any]:
    arguments = (*_arguments(scene, scene.folder / f"log-{sync}"), str(seconds), str(RATE), sync)
    done = run(scene.script(_PACED, *arguments), scene.environment)
    found: dict[str, Any] = json.loads(done.output)
    return found


def _signing(count: int = 5000) -> dict[str, float]:
    """A record in the chain; signed, as if each one were; and with the next key made, as checkpoints are."""

    def timed(act: Any) -> float:  # noqa: ANN401
        values = []
        for _ in range(count):
            before = time.perf_counter()
            act()
            values.append(time.perf_counter() - before)
        return statistics.median(values) * 1e6

    chain = Chain(NOTHING)
    key, message = chain.last.key, bytes(300)
    if key is None:
        raise Failed("the chain has no key")
    chained = timed(lambda: chain.add(Output, 1, 1, json=b'{"alert":"port scan","score":0.97,"number":1}'))
    signed = timed(lambda: key.sign(message))
    return {
        "chained_us": chained,
        "signed_us": chained + signed,
        "ratchet_us": timed(lambda: chain.close_until_now(Checkpoint, 1, 1)),
    }


def _kills(scene: Scene, kills: int) -> dict[str, Any]:
    lost, unsigned, damaged, chance = [], [], 0, random.Random(5)  # noqa: S311
    counter = scene.folder / "counter"
    for number in range(kills):
        folder = scene.folder / "killed" / str(number)
        counter.write_bytes(bytes(_SIZE))
        command = scene.script(_KILLED, *_arguments(scene, folder), counter, str(RATE))
        with subprocess.Popen(command, env=os.environ | scene.environment) as process, counter.open("r+b") as file:
            shared = mmap.mmap(file.fileno(), _SIZE)
            end = time.monotonic() + 30
            while not int.from_bytes(shared[:], "little"):
                if process.poll() is not None or time.monotonic() > end:
                    raise Failed("the program that is to be killed records nothing")
                time.sleep(0.005)
            time.sleep(chance.uniform(0.1, 2.0))
            process.send_signal(signal.SIGKILL)
            process.wait()
            made = int.from_bytes(shared[:], "little")
        (path,) = folder.glob("*.hwout")
        records = [parse(line) for line in path.read_bytes().split(b"\n")[:-1]]
        lost.append(max(0, made - sum(isinstance(record, Output) for record in records)))
        closed = max((place for place, record in enumerate(records) if isinstance(record, Checkpoint)), default=0)
        unsigned.append(len(records) - 1 - closed)
        verify = ("--vendor", scene.vendor, "--license", scene.folder / "a.hwlic", folder)
        checked = subprocess.run(scene.command("vendor", "verify-outputs", *verify), capture_output=True, check=False)
        damaged += b"\nforged:" in checked.stdout
    return {
        "kills": kills,
        "lost": Summary.of(lost)._asdict(),
        "unsigned": Summary.of(unsigned)._asdict(),
        "damaged": damaged,
    }
