"""Figures of a result, of those parts that are in it: `.peers/bin/python benchmarks/plots.py RESULT.json FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot

if TYPE_CHECKING:
    from collections.abc import Callable

MARKS = "osD^"
# The same result gives the same file
STYLE = {"svg.hashsalt": "hwlicense", "svg.fonttype": "none", "axes.grid": True, "grid.alpha": 0.3, "font.size": 10}


def throughput_by_size(axes: Any, found: dict[str, Any]) -> None:  # noqa: ANN401  # matplotlib has no types here
    """GB/s over MiB."""
    mib = [int(size) >> 20 for size in found]
    for way, mark in zip(next(iter(found.values())), MARKS, strict=False):
        speeds = [int(size) / each[way]["median"] / 1e9 for size, each in found.items()]
        axes.plot(mib, speeds, mark + "-", label=way)
    axes.set(xscale="log", xlabel="size of the model, MiB", ylabel="GB/s", title="Reading a whole model", ylim=0)
    axes.set_xticks(mib, mib)
    axes.minorticks_off()


def opening_by_commands(axes: Any, found: dict[str, Any]) -> None:  # noqa: ANN401
    """Milliseconds over the number of commands."""
    highest = 0.0
    # The names of the upper line lead up, those of the lower one down
    for (title, kinds), mark, way in zip(found.items(), MARKS, (1, -1), strict=False):
        each = sorted(kinds.items(), key=lambda item: item[1]["commands"])
        counts = [one["commands"] for _, one in each]
        for key, label, line in (("SLB9672", "latencies of an SLB9672", "-"), ("simulated", "simulated TPM", ":")):
            times = [one[key]["median"] * 1e3 for _, one in each]
            axes.plot(counts, times, mark + line, label=f"{title}, {label}")
            highest = max(highest, *times)
        for kind, one in each:
            place = (one["commands"], one["SLB9672"]["median"] * 1e3)
            turned = {"rotation": 40 * way, "rotation_mode": "anchor", "va": "bottom" if way > 0 else "top"}
            axes.annotate(kind, place, (3, 5 * way), textcoords="offset points", **turned)
    title = "Opening a license, the TPM warm"
    axes.set(xlabel="TPM commands", ylabel="milliseconds", title=title)
    axes.margins(x=0.15, y=0.15)
    axes.set_ylim(0, 1.5 * highest)


def spend_by_processes(axes: Any, found: dict[str, Any]) -> None:  # noqa: ANN401
    """Nanoseconds over processes."""
    costs = {int(processes): cost for processes, cost in found["processes"].items()}
    axes.plot(list(costs), list(costs.values()), "o-", label="time of all, shared out over their spends")
    axes.axhline(found["empty call"], color="gray", linestyle="--", label="an empty Python function")
    axes.set(xlabel="processes", ylabel="nanoseconds", title="Spending one inference", ylim=0)
    axes.set_xticks(list(costs))


FIGURES: dict[str, tuple[str, Callable[[Any, dict[str, Any]], None]]] = {
    "sizes": ("throughput-by-size", throughput_by_size),
    "commands": ("opening-by-commands", opening_by_commands),
    "spending": ("spend-by-processes", spend_by_processes),
}


def main(result: str, folder: str) -> None:
    """Draw, and name what was drawn."""
    found = json.loads(Path(result).read_text(encoding="utf-8"))
    Path(folder).mkdir(parents=True, exist_ok=True)
    pyplot.rcParams.update(STYLE)
    for part, (name, draw) in FIGURES.items():
        if part in found:
            figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
            draw(axes, found[part])
            axes.legend()
            target = Path(folder) / f"{name}.svg"
            figure.savefig(target, metadata={"Date": None})
            print(target)


if __name__ == "__main__":
    if len(sys.argv) != 3:  # noqa: PLR2004  # the two that are named above
        sys.exit(__doc__)
    main(*sys.argv[1:])
