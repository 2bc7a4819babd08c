"""Sealed code: the time to import a package of many modules, beside the same bytecode from a disk."""

from __future__ import annotations

import compileall
import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.measure import in_turn, told

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.scene import Scene

SEALED = "sealed: import"
INSTALL = "sealed: install the importer"
HANDED = "sealed: hand the code to a child"
DISK = "bytecode from the disk"
MODULES = 200
FUNCTIONS = 20

_FUNCTION = '''
def step_{0}(values, scale={0}, offset=1.5):
    """One step of many, of a size that is usual."""
    total = 0.0
    for place, value in enumerate(values):
        if value > scale:
            total += (value - offset) * scale / (place + 1)
        else:
            total -= abs(value) ** 0.5
    return {{"step": {0}, "total": total, "count": len(values), "name": __name__}}
'''
# Each prints the seconds that it took, and a number that tells that it did
_SEALED = """
import json, sys, time
import hwlicense
with hwlicense.open(sys.argv[1], vendor=sys.argv[2], home=sys.argv[3]) as model:
    started = time.perf_counter()
    importer = model.importer()
    importer.install()
    installed = time.perf_counter()
    import big
    imported = time.perf_counter()
    importer.handed.to(type("Child", (), {})())
    handed = time.perf_counter()
    print(json.dumps([[installed - started, imported - installed, handed - imported][int(sys.argv[4])], big.COUNT]))
"""
_DISK = """
import json, sys, time
import hwlicense, importlib.util
sys.path.append(sys.argv[1])
started = time.perf_counter()
import big
print(json.dumps([time.perf_counter() - started, big.COUNT]))
"""


def measure(scene: Scene, runs: int) -> dict[str, Any]:
    """All of them, in turn. Raises Failed."""
    source = scene.folder / "importing"
    _write(source / "code" / "big")
    package = scene.folder / "importing.hwpkg"
    code = ("--code", source / "code" / "big", "--entry", "big:main")
    named = ("vendor", "pack", "--vendor", scene.vendor, "--name", "big", "--version", "1", "-o", package)
    scene.hwlicense(*named, *code)
    scene.package, before = package, scene.package
    scene.license()
    scene.package = before
    plain = source / "disk"
    shutil.copytree(source / "code", plain)
    compileall.compile_dir(plain, quiet=1)
    compiled = sum(path.stat().st_size for path in plain.rglob("*.pyc"))
    given = (package, scene.vendor_text, scene.home)
    measures = {
        name: partial(told, scene.script(_SEALED, *given, str(place)), scene.environment, expected=[MODULES])
        for place, name in enumerate((INSTALL, SEALED, HANDED))
    }
    measures[DISK] = partial(told, scene.script(_DISK, plain), scene.environment, expected=[MODULES])
    found = in_turn(measures, runs)
    return {
        "modules": MODULES,
        "bytes": compiled,
        "seconds": {name: summary._asdict() for name, summary in found.items()},
    }


def table(found: dict[str, Any]) -> list[str]:
    """For a person."""
    lines = [f"Import of {found['modules']} modules, {found['bytes']:,} bytes of bytecode; milliseconds"]
    for name, each in found["seconds"].items():
        median, least, most = (1000 * each[key] for key in ("median", "least", "most"))
        lines.append(f"  {name:<36} median {median:7.2f}   {least:7.2f} to {most:7.2f}   {each['runs']} runs")
    return lines


def _write(folder: Path) -> None:
    folder.mkdir(parents=True)
    body = "".join(_FUNCTION.format(number) for number in range(FUNCTIONS))
    names = [f"part_{number:03}" for number in range(MODULES - 1)]
    for name in names:
        (folder / f"{name}.py").write_text(f'"""The module {name}."""\n{body}')
    imports = "".join(f"from big import {name}\n" for name in names)
    (folder / "__init__.py").write_text(f"{imports}COUNT = {MODULES}\n\n\ndef main():\n    return None\n")
