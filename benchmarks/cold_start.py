"""From nothing to an open package: whole processes, beside clevis on the same TPM, and where the time goes."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from tpm2_pytss import TPM2_CC

from benchmarks.measure import Summary, in_turn, run

if TYPE_CHECKING:
    from benchmarks.measure import Command
    from benchmarks.scene import Scene

PEER = "clevis decrypt"
OURS = "hwlicense device check --open"
LIBRARY = "python: hwlicense.open"
INTERPRETER = "python: nothing"
SMALL = 64 << 10
LARGEST = 10
GOAL = 1.0  # times clevis' seconds, at the most
# Seconds that discrete TPMs are published to take (wolfTPM's README): to generate a P-256 key, and to agree on a secret
CHIPS = {"fast chip": (0.052, 0.039), "slow chip": (0.311, 0.247)}

OPEN = "import hwlicense, sys; hwlicense.open(sys.argv[1], vendor=sys.argv[2], home=sys.argv[3]).close()"
# The same command, watched from inside. CLOCK_MONOTONIC is one for all processes, so the parts add up to the whole.
WATCHED = """
import time
begun = time.monotonic()
import builtins, json, os
spent, depth, import_ = {"imports": 0.0}, 0, builtins.__import__
def timed_import(*arguments, **keywords):
    global depth
    depth += 1
    started = time.monotonic()
    try:
        return import_(*arguments, **keywords)
    finally:
        depth -= 1
        if not depth:
            spent["imports"] += time.monotonic() - started
builtins.__import__ = timed_import
def timed(kind, name):
    inner = getattr(kind, name)
    def outer(self, *arguments, **keywords):
        started = time.monotonic()
        try:
            return inner(self, *arguments, **keywords)
        finally:
            label = arguments[0] if name == "call" else {"open": "connect", "_flush_raw": "flush_context"}[name]
            spent["tpm " + label] = spent.get("tpm " + label, 0) + time.monotonic() - started
    setattr(kind, name, outer)
from hwlicense.cli import main
from hwlicense.binders.tpm.connection import Connection, Work
for kind, name in ((Connection, "open"), (Work, "call"), (Work, "_flush_raw")):
    timed(kind, name)
leave = os._exit
def leaving(status):
    print("\\n" + json.dumps({"begun": begun, "ended": time.monotonic(), **spent}), flush=True)
    leave(status)
os._exit = leaving
main()
"""


def measure(scene: Scene, runs: int) -> dict[str, Any]:
    """The figures, in seconds. A vendor, a small package and a license are made first."""
    source = scene.folder / "small.bin"
    source.write_bytes(bytes(range(256)) * (SMALL // 256))
    run(scene.pack(source))
    scene.license()
    given = (scene.package, scene.vendor_text, scene.home)
    check = scene.command("device", "check", "--open", "--home", scene.home, scene.package)
    sealed, secret = scene.folder / "small.clevis", scene.folder / "secret"
    secret.write_bytes(bytes(range(32)))
    pcrs = json.dumps({"pcr_bank": "sha256", "pcr_ids": "0,7"})
    run(["clevis", "encrypt", "tpm2", pcrs], scene.environment, stdin=secret, stdout=sealed)
    commands = {
        OURS: check,
        PEER: ["clevis", "decrypt"],
        LIBRARY: scene.script(OPEN, *given),
        INTERPRETER: scene.script("pass"),
    }
    processes = {
        name: partial(run, command, scene.environment, stdin=sealed if name == PEER else None)
        for name, command in commands.items()
    }
    times = in_turn(processes, runs)
    watched = [_watched(scene, check) for _ in range(runs)]
    parts = {part: Summary.of([one.get(part, 0.0) for one in watched]).median for part in watched[0]}
    imported = _imported(scene, check)
    return {
        "processes": {name: summary._asdict() for name, summary in times.items()},
        "chips": _on_chips(scene, check),
        "ratio_to_clevis": {name: times[name].median / times[PEER].median for name in (OURS, LIBRARY)},
        "where": {name: seconds for name, seconds in parts.items() if not name.startswith("tpm ")},
        "tpm": {name.removeprefix("tpm "): seconds for name, seconds in parts.items() if name.startswith("tpm ")},
        "largest_packages": _by_package(imported),
        "largest_imports": dict(sorted(imported, key=lambda item: -item[1])[:LARGEST]),
    }


def _on_chips(scene: Scene, command: Command) -> dict[str, dict[str, float]]:
    """The same with a TPM that answers as late as a chip does where it computes with curves; and what it is asked."""
    found = {}
    for name, (generating, agreeing) in CHIPS.items():
        with scene.tpm.tapped() as wire:
            for code, seconds in ((TPM2_CC.CreatePrimary, generating), (TPM2_CC.StartAuthSession, agreeing)):
                wire.delay(seconds, code, times=1000)
            runs = [run(command, {**scene.environment, "HWLICENSE_TPM": wire.tcti}).seconds for _ in range(3)]
            codes = Counter(str(TPM2_CC(code)) for code in wire.commands)
        counts = {code: count / len(runs) for code, count in codes.items()}
        found[name] = {"seconds": Summary.of(runs).median, "commands": sum(counts.values())} | counts
    return found


def _watched(scene: Scene, command: Command) -> dict[str, float]:
    """Where one run spends its time, in seconds."""
    started = time.monotonic()
    done = run(scene.script(WATCHED, *command[1:]), scene.environment)
    ended = time.monotonic()
    spent: dict[str, float] = json.loads(done.output.splitlines()[-1])
    tpm = sum(seconds for name, seconds in spent.items() if name.startswith("tpm "))
    inside = spent["ended"] - spent["begun"]
    return {
        "starting the interpreter": spent.pop("begun") - started,
        "imports": spent["imports"],
        "waiting for the TPM": tpm,
        "the program's own work": inside - spent.pop("imports") - tpm,
        "ending the interpreter": ended - spent.pop("ended"),
        **spent,
    }


def _imported(scene: Scene, command: list[str]) -> list[tuple[str, float]]:
    """Every module that `command` imports and what it takes alone, the median of three runs that time imports."""
    times: dict[str, list[float]] = {}
    for _ in range(3):
        listing = run([str(scene.python), "-X", "importtime", *command], scene.environment).errors
        for microseconds, name in re.findall(r"^import time: +(\d+) \| +\d+ \| *(\S+)$", listing, re.MULTILINE):
            times.setdefault(name, []).append(int(microseconds) / 1e6)
    return [(name, sorted(each)[len(each) // 2]) for name, each in times.items()]


def _by_package(imported: list[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, seconds in imported:
        top = name.partition(".")[0]
        found[top] = found.get(top, 0) + seconds
    return dict(sorted(found.items(), key=lambda item: -item[1])[:LARGEST])


def table(found: dict[str, Any]) -> list[str]:
    """The figures for people."""
    peer = found["processes"][PEER]["median"]
    lines = [f"{'whole process':<34}{'median ms':>10}{'from':>8}{'to':>8}{'to clevis':>11}"]
    for name, one in found["processes"].items():
        row = "".join(f"{one[key] * 1e3:>{width}.0f}" for key, width in (("median", 10), ("least", 8), ("most", 8)))
        lines.append(f"{name:<34}{row}{one['median'] / peer:>10.2f}x")
    met = "" if found["ratio_to_clevis"][OURS] <= GOAL else ": missed"
    lines.append(f"goal of {OURS}: at most {GOAL:.1f}x{met}")
    for name, one in found["chips"].items():
        lines.append(f"{OURS}, {name:<12}{one['seconds'] * 1e3:>6.0f} ms, {one['commands']:.0f} commands")
    lines += ["", "of which, watched from inside"]
    lines += [f"  {name:<32}{seconds * 1e3:>10.1f}" for name, seconds in found["where"].items()]
    for title, key in (
        ("calls to the TPM", "tpm"),
        ("packages imported, modules alone (timing adds to it)", "largest_packages"),
        ("modules imported, alone", "largest_imports"),
    ):
        lines += ["", title]
        lines += [f"  {name:<40}{seconds * 1e3:>8.1f}" for name, seconds in found[key].items()]
    return lines
