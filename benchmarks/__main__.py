"""`python -m benchmarks`: prints the figures, and writes them to benchmarks/results/ as JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import cold_start, dongles, importing, large, monitor, opening, outputs, throughput, use
from benchmarks.measure import Failed, machine
from benchmarks.scene import Scene
from hwlicense_simulators import SimulatorError, Tpm

RESULTS = Path(__file__).parent / "results"
MEMORY = Path("/dev/shm")  # noqa: S108  # so that no disk is measured; a folder of this program's own within
PARTS = ("cold", "throughput", "opening", "large", "importing", "dongles", "monitor", "use", "outputs")


def main() -> int:  # noqa: C901  # a part after the other
    """Run it. 1 where something that is to be measured fails."""
    options = _parser().parse_args()
    found: dict[str, Any] = {"taken": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    found["machine"] = machine()
    _show([f"{name:<22} {value}" for name, value in found["machine"].items()])
    folder = options.folder or (MEMORY if MEMORY.is_dir() else None)
    try:
        with tempfile.TemporaryDirectory(prefix="hwlicense-bench-", dir=folder) as place, Tpm() as tpm:
            scene = Scene(Path(place), tpm)
            if options.part in {"all", "cold"}:
                found["cold_start"] = cold_start.measure(scene, options.runs)
                _show(cold_start.table(found["cold_start"]))
            if options.part in {"all", "throughput"}:
                size = options.size << 20
                found["throughput"] = throughput.measure(scene, max(5, options.runs // 3), size)
                _show(throughput.table(found["throughput"]))
            if options.part in {"all", "opening"}:
                found["opening"] = opening.measure(scene, options.runs)
                _show(opening.table(found["opening"]))
            if options.part in {"all", "large"}:
                sizes = [int(gib) << 30 for gib in options.large.split(",")]
                found["large"] = large.measure(scene, max(3, options.runs // 5), sizes)
                _show(large.table(found["large"]))
            if options.part in {"all", "importing"}:
                found["importing"] = importing.measure(scene, options.runs)
                _show(importing.table(found["importing"]))
            if options.part in {"all", "dongles"}:
                found["dongles"] = dongles.measure(scene, options.runs, options.pulls, options.seconds)
                _show(dongles.table(found["dongles"]))
            if options.part in {"all", "monitor"}:
                found["monitor"] = monitor.measure(options.days, options.labelling)
                _show(monitor.table(found["monitor"]))
            if options.part in {"all", "use"}:
                found["use"] = use.measure(scene, options)
                _show(use.table(found["use"]))
            if options.part in {"all", "outputs"}:
                found["outputs"] = outputs.measure(scene, options.recording, options.cut_recordings)
                _show(outputs.table(found["outputs"]))
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
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("part", nargs="?", choices=("all", *PARTS), default="all", help="what to measure")
    parser.add_argument(
        "--runs",
        type=int,
        default=15,
        help="runs of each process of the cold start (a third of it, at least 5, for the throughput)",
    )
    parser.add_argument("--size", type=int, default=1024, help="MiB of the large model")
    parser.add_argument("--large", default="1,4", help="GiB of the models whose memory is measured, by commas")
    parser.add_argument("--pulls", type=int, default=50, help="how often token and dongle are pulled")
    parser.add_argument("--seconds", type=float, default=60, help="how long the load on a token lasts")
    parser.add_argument("--days", type=int, default=100, help="normal days of each product that is monitored")
    parser.add_argument("--labelling", type=int, default=20, help="labelling runs of each kind")
    parser.add_argument("--kills", type=int, default=10_000, help="processes that are killed while they spend")
    parser.add_argument("--inferences", type=int, default=10_000_000, help="inferences of the soak")
    parser.add_argument("--cuts", type=int, default=365, help="days that end with a power cut")
    parser.add_argument("--recording", type=float, default=20, help="seconds of each recording of signed outputs")
    parser.add_argument("--cut-recordings", type=int, default=30, help="recordings that end with a SIGKILL")
    parser.add_argument("--folder", type=Path, help="where to work; needs four times the size (default: /dev/shm)")
    parser.add_argument("--json", action="store_true", help="print JSON, the tables on stderr")
    return parser


def _show(lines: list[str]) -> None:
    print("", *lines, sep="\n", file=sys.stderr if "--json" in sys.argv else sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main())
