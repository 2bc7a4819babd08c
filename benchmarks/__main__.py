"""`python -m benchmarks`: prints the figures, and writes them to benchmarks/results/ as JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import (
    cold_start,
    commands,
    dongles,
    frameworks,
    importing,
    large,
    monitor,
    opening,
    outputs,
    peers,
    sizes,
    spending,
    throughput,
    use,
)
from benchmarks.measure import Failed, machine, run
from benchmarks.scene import Scene
from hwlicense_simulators import SimulatorError, Tpm

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results"
MEMORY = Path("/dev/shm")  # noqa: S108  # so that no disk is measured; a folder of this program's own within


def main() -> int:  # a part after the other
    """Run it. 1 where something that is to be measured fails."""
    options = _options()
    found: dict[str, Any] = {"taken": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    found["machine"] = machine()
    _show([f"{name:<22} {value}" for name, value in found["machine"].items()])
    folder = options.folder or (MEMORY if MEMORY.is_dir() else None)
    try:
        with tempfile.TemporaryDirectory(prefix="hwlicense-bench-", dir=folder) as place, Tpm() as tpm:
            scene = Scene(Path(place), tpm)
            for part, (name, measure, table) in _parts(scene, options).items():
                if part in options.parts:
                    found[name] = measure()
                    _show(table(found[name]))
    except (Failed, SimulatorError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{found['taken'].replace(':', '').replace('+0000', 'Z')}.json"
    target.write_text(json.dumps(found, indent=2) + "\n")
    _show([f"Written to {target}."])
    if options.figures:
        _show(_drawn(target, options.figures))
    return 0


def _drawn(result: Path, folder: Path) -> list[str]:
    """Draw the figures; what to tell about it. They change nothing of what was measured."""
    if "matplotlib" not in peers.versions():
        return ["No figures were drawn, as matplotlib is not installed (`scripts/peers`)."]
    plots = Path(__file__).with_name("plots.py")
    return run([str(peers.PYTHON), str(plots), str(result), str(folder)]).output.decode().splitlines()


def _parts(scene: Any, options: Any) -> dict[str, tuple[str, Callable[[], Any], Callable[[Any], list[str]]]]:  # noqa: ANN401
    """For each part: what it is called among the figures, what measures it, and what shows it."""

    def throughputs() -> Any:  # noqa: ANN401  # figures
        return throughput.measure(scene, max(5, options.runs // 3), options.size << 20)

    def by_size() -> Any:  # noqa: ANN401
        return sizes.measure(scene, max(3, options.runs // 5), options.size << 20)

    def memory() -> Any:  # noqa: ANN401
        sizes = [int(gib) << 30 for gib in options.large.split(",")]
        return large.measure(scene, max(3, options.runs // 5), sizes)

    return {
        "cold": ("cold_start", lambda: cold_start.measure(scene, options.runs), cold_start.table),
        "throughput": ("throughput", throughputs, throughput.table),
        "sizes": ("sizes", by_size, sizes.table),
        "commands": ("commands", lambda: commands.measure(scene, options.runs), commands.table),
        "spending": ("spending", lambda: spending.measure(scene, 5, options.seconds), spending.table),
        "opening": ("opening", lambda: opening.measure(scene, options.runs), opening.table),
        "large": ("large", memory, large.table),
        "importing": ("importing", lambda: importing.measure(scene, options.runs), importing.table),
        "dongles": (
            "dongles",
            lambda: dongles.measure(scene, options.runs, options.pulls, options.seconds),
            dongles.table,
        ),
        "monitor": ("monitor", lambda: monitor.measure(options.days, options.labelling), monitor.table),
        "use": ("use", lambda: use.measure(scene, options), use.table),
        "outputs": (
            "outputs",
            lambda: outputs.measure(scene, options.recording, options.cut_recordings),
            outputs.table,
        ),
        "frameworks": ("frameworks", lambda: frameworks.measure(scene, max(5, options.runs // 3)), frameworks.table),
    }


def _options() -> argparse.Namespace:
    known = list(_parts(None, None))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"what to measure: all, or {', '.join(known)}")
    parser.add_argument(
        "--runs",
        type=_positive,
        default=15,
        help="runs of each process or opening; fewer of what takes long (a third of it for the throughput, at least 5)",
    )
    parser.add_argument("--size", type=_positive, default=1024, help="MiB of the large model")
    parser.add_argument("--large", default="1,4,16", help="GiB of the models whose memory is measured, by commas")
    parser.add_argument("--pulls", type=_positive, default=20, help="how often token and dongle are pulled")
    parser.add_argument("--seconds", type=float, default=20, help="how long the load on a token lasts")
    parser.add_argument("--days", type=_positive, default=30, help="normal days of each product that is monitored")
    parser.add_argument("--labelling", type=_positive, default=8, help="labelling runs of each kind")
    parser.add_argument("--kills", type=_positive, default=2_000, help="processes that are killed while they spend")
    parser.add_argument("--inferences", type=_positive, default=2_000_000, help="inferences of the soak")
    parser.add_argument("--cuts", type=_positive, default=120, help="days that end with a power cut")
    parser.add_argument("--crashes", type=_positive, default=10, help="crashes of each kind whose cost is counted")
    parser.add_argument("--recording", type=float, default=10, help="seconds of each recording of signed outputs")
    parser.add_argument("--cut-recordings", type=_positive, default=20, help="recordings that end with a SIGKILL")
    parser.add_argument(
        "--folder", type=Path, help="where to work; needs four times the size; where not given, /dev/shm"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, the tables on stderr")
    parser.add_argument("--figures", type=Path, help="the folder to draw figures in (with what scripts/peers installs)")
    options = parser.parse_args()
    if unknown := set(options.parts) - {*known, "all"}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if not options.parts or "all" in options.parts:
        options.parts = known
    return options


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def _show(lines: list[str]) -> None:
    print("", *lines, sep="\n", file=sys.stderr if "--json" in sys.argv else sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main())
