"""Opening by the package's size: what the manifest and the key table of many chunks cost, its content unread."""

from __future__ import annotations

import os
import secrets
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.measure import in_turn, told
from hwlicense.core import package
from hwlicense.core.documents import Manifest, Member
from hwlicense.core.envelope import seal
from hwlicense.core.keys import TAG_SIZE, wrap_for_vendor
from hwlicense.core.schema import SCHEMA
from hwlicense.core.secret import SIZE, Secret
from hwlicense.vendor.folder import Folder
from hwlicense.vendor.packing import chunk_size_for

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.scene import Scene

SIZES = (1 << 20, 1 << 30, 4 << 30, 16 << 30, 64 << 30)
# The second opening of a process: without its imports. All of it is in the page cache.
_OPEN = """
import json, sys, time
import hwlicense
given = {"vendor": sys.argv[2], "home": sys.argv[3]}
hwlicense.open(sys.argv[1], **given).close()
started = time.perf_counter()
model = hwlicense.open(sys.argv[1], **given)
print(json.dumps([time.perf_counter() - started]))
"""


def measure(scene: Scene, runs: int) -> dict[str, Any]:
    """Seconds by size, and bytes of memory of the whole process."""
    before, measures = scene.package, {}
    for size in SIZES:
        scene.package = scene.folder / f"vast{size}.hwpkg"
        _write(scene, scene.package, size)
        scene.license()
        given = (scene.package, scene.vendor_text, scene.home)
        measures[f"{size >> 20:,} MiB"] = partial(told, scene.script(_OPEN, *given), scene.environment)
    scene.package = before
    return {name: one._asdict() for name, one in in_turn(measures, runs).items()}


def table(found: dict[str, Any]) -> list[str]:
    """For a person."""
    base = next(iter(found.values()))["median"]
    lines = [f"{'opening a package of':<34}{'median ms':>10}{'from':>8}{'to':>8}{'ratio':>8}{'peak MiB':>10}"]
    for name, one in found.items():
        row = "".join(f"{one[key] * 1e3:>{width}.1f}" for key, width in (("median", 10), ("least", 8), ("most", 8)))
        lines.append(f"{name:<34}{row}{one['median'] / base:>7.2f}x{one['peak'] >> 20:>10,}")
    return lines


def _write(scene: Scene, path: Path, size: int) -> None:
    """A package of `size` bytes, all in order but its chunks, which are a hole in the file."""
    keys, step = Folder(scene.vendor).unlock(None), chunk_size_for(size)
    count, identifier = package.chunk_count(size, step), secrets.token_hex(16)
    with Secret.random() as content_key:
        table = package.seal_table(content_key, os.urandom(count * SIZE))
        manifest = Manifest(
            schema=SCHEMA,
            name="vast",
            version="1",
            vendor=Folder(scene.vendor).public.fingerprint,
            content_key=identifier,
            wrapped_content_key=wrap_for_vendor(content_key, identifier, keys.content.public_key()),
            algorithm="blake3",
            chunk_size=step,
            table=package.digest(table, "blake3"),
            members=[Member("weights", size, os.urandom(count * package.DIGEST_SIZE))],
        )
    envelope = seal(manifest, keys.signers)
    with path.open("wb") as file:
        file.write(package.header(envelope) + envelope + table)
        file.truncate(file.tell() + size + count * TAG_SIZE)
