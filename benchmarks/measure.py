"""Processes timed from outside, and what is made of many runs."""

from __future__ import annotations

import json
import os
import platform
import resource
import select
import statistics
import subprocess
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from hwlicense import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Command = list[str]


class Failed(Exception):  # noqa: N818  # it ends the benchmark
    """A measured program did not do what it was measured for."""


class Run(NamedTuple):
    """One run of a process. Seconds and bytes."""

    seconds: float
    peak: int
    output: bytes
    errors: str


class Summary(NamedTuple):
    """Many runs of one thing: seconds or any other unit, and bytes of memory at the peak (the largest of all runs)."""

    median: float
    least: float
    most: float
    runs: int
    peak: int

    @classmethod
    def of(cls, values: Sequence[float], peak: int = 0) -> Self:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values), peak)


def run(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    stdin: Path | None = None,
    stdout: Path | None = None,
) -> Run:
    """A process from its start to its end, its output kept unless `stdout` names a file. Raises Failed."""
    with (
        (stdin or Path(os.devnull)).open("rb") as source,
        stdout.open("wb") if stdout else tempfile.TemporaryFile() as sink,
        tempfile.TemporaryFile() as errors,
    ):
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=source, stdout=sink, stderr=errors, env={**os.environ, **(environment or {})}
        )
        peak = _watch(process.pid)
        process.wait()
        seconds = time.perf_counter() - started
        errors.seek(0)
        said = errors.read().decode(errors="replace")
        if process.returncode:
            raise Failed(f"{command[:4]}: exit status {process.returncode}\n{said}")
        if stdout:
            return Run(seconds, peak, b"", said)
        sink.seek(0)
        return Run(seconds, peak, sink.read(), said)


def told(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    expected: Sequence[Any] | None = None,
    into: list[list[Any]] | None = None,
) -> Run:
    """As `run`, with the seconds that the program itself measured: it prints them, and more, as a line of JSON.

    The rest of the line goes `into` a list. Raises Failed where it is not what was `expected`.
    """
    done = run(command, environment)
    seconds, *rest = json.loads(done.output.splitlines()[-1])
    if expected is not None and rest != expected:
        raise Failed(f"{command[:1]}: {rest} instead of {expected}")
    if into is not None:
        into.append(rest)
    return done._replace(seconds=seconds)


def _watch(pid: int) -> int:
    """Wait for the end of a child; the most memory that it was seen to hold, looking 100 times a second.

    Not ru_maxrss: a child inherits that from the process that starts it, which is larger than most that is measured.
    """
    peak, watched = 0, os.pidfd_open(pid)
    try:
        while not select.select([watched], [], [], 0.01)[0]:
            for line in _lines(f"/proc/{pid}/status"):
                if line.startswith("VmHWM:"):
                    peak = int(line.split()[1]) * 1024
    finally:
        os.close(watched)
    return peak


def in_turn(measures: Mapping[str, Callable[[], Run]], runs: int) -> dict[str, Summary]:
    """All of `measures` one after the other, `runs` times over, so that a busy moment meets all of them alike.

    Each is run once before, uncounted: files are then in the page cache.
    """
    found: dict[str, list[Run]] = {name: [] for name in measures}
    for turn in range(runs + 1):
        for name, measure in measures.items():
            one = measure()
            if turn:
                found[name].append(one)
    return {
        name: Summary.of([one.seconds for one in every], max(one.peak for one in every))
        for name, every in found.items()
    }


def machine() -> dict[str, str | int]:
    """What the figures were taken on: figures of different machines do not compare."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    memory = next(line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": cpu or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(memory) * 1024,
        "kernel": platform.release(),
        "huge_pages": huge.read_text().partition("[")[2].partition("]")[0] if huge.exists() else "none",
        "lockable_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "load_before": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        "hwlicense": __version__,
        **{
            name: metadata.version(name)
            for name in ("cryptography", "tpm2-pytss", "python-pkcs11", "pyusb", "msgspec", "click", "blake3")
        },
        **{
            name: _packaged(name)
            for name in ("swtpm", "libtss2-esys-3.0.2-0", "tpm2-tools", "clevis", "age", "softhsm2", "opensc")
        },
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _packaged(name: str) -> str:
    """The version of a Debian package, empty elsewhere."""
    try:
        done = subprocess.run(
            ["dpkg-query", "-W", "-f", "${Version}", name], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout
