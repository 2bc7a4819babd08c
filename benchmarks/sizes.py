"""Reading whole models of several sizes, beside plain reads of the same bytes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from benchmarks import throughput
from benchmarks.measure import in_turn, run

if TYPE_CHECKING:
    from benchmarks.scene import Scene

MIB: Final = (1, 16, 64, 256, 1024)


def measure(scene: Scene, runs: int, largest: int) -> dict[str, Any]:
    """Seconds by size and way, up to `largest` bytes."""
    found = {}
    before, source = scene.package, scene.folder / "sized.bin"
    for size in (mib << 20 for mib in MIB if mib == 1 or mib << 20 <= largest):
        first, last = throughput.random_file(source, size)
        scene.package = scene.folder / "sized.hwpkg"
        run(scene.pack(source), scene.environment)
        scene.license()
        ours = (scene.package, scene.vendor_text, scene.home)
        ways = {throughput.READ: ours, throughput.PATH: ours, throughput.PLAIN: (source,), throughput.HUGE: (source,)}
        measures = {
            way: partial(throughput.inside, scene, way, given, [size, first, last]) for way, given in ways.items()
        }
        found[str(size)] = {way: one._asdict() for way, one in in_turn(measures, runs).items()}
        scene.package.unlink()
    source.unlink()
    scene.package = before
    return found


def table(found: dict[str, Any]) -> list[str]:
    """For a person."""
    ways = list(next(iter(found.values())))
    lines = [f"{'GB/s':<34}" + "".join(f"{int(size) >> 20:>7,} MiB" for size in found)]
    for way in ways:
        speeds = (int(size) / each[way]["median"] / 1e9 for size, each in found.items())
        lines.append(f"{way:<34}" + "".join(f"{speed:>11.2f}" for speed in speeds))
    return lines
