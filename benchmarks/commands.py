"""Opening by the number of TPM commands that a license takes: on a simulated TPM, and as late as a discrete chip."""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from tpm2_pytss import TPM2_CC

import hwlicense
from benchmarks.measure import Summary, run
from hwlicense_simulators import Tpm

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.scene import Scene
    from hwlicense_simulators import Wire

PCRS: Final = "sha256:0,7"
TERMS: Final = 'licensee = "Acme Robotics"\nproduct = "reader"\n'
OPENS: Final = "opens = 1000000\n"
EVERY: Final = f'{OPENS}inferences = 1000000\nrates = ["1000/hour"]\npowered_on_hours = 8760\ninstances = 9\n'
KINDS: Final = {
    "plain": ((), TERMS),
    "PCRs": (("--pcrs", PCRS), f'{TERMS}[require]\npcrs = ["{PCRS}"]\n'),
    "counted opens": (("--counted",), f"{TERMS}[limits]\n{OPENS}"),
    "every limit": (
        ("--pcrs", PCRS, "--counted"),
        f'{TERMS}[validity]\ndays_from_first_use = 30\n[limits]\n{EVERY}[require]\npcrs = ["{PCRS}"]\nanchor = true\n',
    ),
}
# Seconds of an Infineon SLB9672 at 43 MHz, as wolfTPM publishes them (its docs/benchmarks.md): to generate a P-256 key,
# to agree on a secret, to verify a signature. Of other commands nothing is published: each is taken to be as long as
# the shortest that is, an RSA operation with a public key. What computes with curves is told apart by its code.
SLB9672: Final = {
    TPM2_CC.CreatePrimary: 0.136,
    TPM2_CC.StartAuthSession: 0.066,
    TPM2_CC.Import: 0.066,
    TPM2_CC.VerifySignature: 0.024,
}
ANY_OTHER: Final = 0.009
ALWAYS: Final = 1 << 30
MADE: Final = "storage root key made each time"
KEPT: Final = "storage root key kept by the TPM"


def measure(scene: Scene, runs: int) -> dict[str, Any]:
    """For each kind of license its commands, and seconds without a delay and with the chip's: openings in this process.

    Once where the storage root key is made at each opening, and once where the TPM keeps it. Each is opened once
    before, uncounted: what lasts until the TPM's next reset is then done.
    """
    made = {kind: _kind(scene, place, kind, runs) for place, kind in enumerate(KINDS)}
    with Tpm(storage_key="ecc") as tpm:
        other = scene.at(tpm, "keeps-its-key")
        kept = {kind: _kind(other, place, kind, runs) for place, kind in enumerate(KINDS)}
    return {MADE: made, KEPT: kept}


def _kind(scene: Scene, place: int, kind: str, runs: int) -> dict[str, Any]:
    asked, terms = KINDS[kind]
    source, package = scene.folder / "opened.bin", scene.folder / "commands.hwpkg"
    source.write_bytes(bytes(4096))
    run(scene.pack(source, package), scene.environment)
    home = scene.folder / f"home-commands-{place}"
    _license(scene, home, package, asked, terms)
    with scene.tpm.tapped() as wire:
        opened = partial(_opened, scene, package, home, wire)
        opened()
        quick = [opened() for _ in range(runs)]
        wire.delay(ANY_OTHER, times=ALWAYS)
        for code, seconds in SLB9672.items():
            wire.delay(seconds - ANY_OTHER, code, times=ALWAYS)
        slow = [opened() for _ in range(runs)]
    return {
        "commands": Summary.of([codes.total() for _, codes in quick]).median,
        "codes": dict(quick[-1][1]),
        "simulated": Summary.of([seconds for seconds, _ in quick])._asdict(),
        "SLB9672": Summary.of([seconds for seconds, _ in slow])._asdict(),
    }


def _opened(scene: Scene, package: Path, home: Path, wire: Wire) -> tuple[float, Counter[str]]:
    wire.forget()
    begun = time.perf_counter()
    model = hwlicense.open(package, vendor=scene.vendor_text, home=home, tpm=wire.tcti)
    passed = time.perf_counter() - begun
    codes = Counter(str(TPM2_CC(code)) for code in wire.commands)
    model.close()
    return passed, codes


def _license(scene: Scene, home: Path, package: Path, asked: tuple[str, ...], terms: str) -> None:
    request, table, licensed = (scene.folder / f"commands.{end}" for end in ("hwreq", "toml", "hwlic"))
    table.write_text(terms)
    scene.hwlicense("device", "enroll", "--home", home, *asked, "--force", "-o", request)
    issue = ("--request", request, "--package", package, "--terms", table, "--force", "-o", licensed)
    scene.hwlicense("vendor", "issue", "--vendor", scene.vendor, *issue, "--ek-root", f"virtual={scene.tpm.ek_root}")
    scene.hwlicense("device", "trust", "--home", home, scene.vendor / "vendor.pub.json")
    scene.hwlicense("device", "install", "--home", home, licensed)


def table(found: dict[str, Any]) -> list[str]:
    """For a person."""
    lines = []
    for title, kinds in found.items():
        lines.append(f"{title:<36}{'commands':>10}{'ms, simulated':>16}{'ms, as an SLB9672':>20}")
        for kind, one in kinds.items():
            quick, slow = one["simulated"]["median"] * 1e3, one["SLB9672"]["median"] * 1e3
            lines.append(f"  {kind:<34}{one['commands']:>10.0f}{quick:>16.1f}{slow:>20.0f}")
    return lines
