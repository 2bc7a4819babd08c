"""The story of the limits: a classifier of medical images serves a clinic's day, and labels no competitor's data set.

Run it with `make clinic`. The vendor and two customers are folders below build/clinic; the customers' TPMs are
simulated by swtpm. An hour of the clinic takes a second here: the terms say "15/1s" where real ones say "15/hour".
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import hwlicense
from hwlicense_simulators import CertificateAuthority, Tpm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / "build" / "clinic"
PROGRAM = Path(sysconfig.get_path("scripts"), "hwlicense")
TERMS = """\
licensee = "{licensee}"
product = "aspirate-classifier"
[validity]
not_after = 2036-12-31
[limits]
inferences = {inferences}
rates = ["{an_hour}/1s", "{a_day}/8s"]   # of the story: an hour takes a second, and a day has eight
instances = {instances}
[monitor]
lasting = "4s"
[monitor.regularity]
action = "deny"
calls = 32
variation = 0.15
pause = "1s"
[monitor.distances]
action = "deny"
features = 30
queries = 20
normality = 0.75
[require]
anchor = true
"""
PILOT = {"inferences": 90, "an_hour": 15, "a_day": 80, "instances": 2}
LARGER = {"inferences": 1000, "an_hour": 15, "a_day": 100, "instances": 2}
LOOSENED = {"inferences": 1000, "an_hour": 60, "a_day": 400, "instances": 4}

ENOUGH = 132  # labels: no more than the competitor has images of its own


class Unexpected(Exception):  # noqa: N818  # it ends the story, not the product
    """The story did not go as it is told."""


def tell(text: str) -> None:
    """Print a line of the story."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def show(command: Sequence[str | Path], ending: str = "") -> None:
    """Show a command as one would type it."""
    print("  $", shlex.join([Path(command[0]).name, *map(short, command[1:])]) + ending, flush=True)


def short(text: str | Path) -> str:
    """Paths as a reader needs them: by their last part."""
    return re.sub(r"/\S*/", "", str(text))


def finish(process: subprocess.Popen[str], *, status: int = 0, reason: str = "") -> str:
    """Wait for a command, show what it says, and insist on its exit status and the reason of its refusal."""
    said, complaint = process.communicate(timeout=300)
    for line in (said + complaint).splitlines():
        print("   ", short(line), flush=True)
    if process.returncode != status:
        raise Unexpected(f"exit status {process.returncode} where {status} was expected")
    if reason and f"reason: {reason}\n" not in complaint:
        raise Unexpected(f"another reason where {reason} was expected")
    return said


def run(command: Sequence[str | Path], *, status: int = 0, reason: str = "", tpm: Tpm | None = None) -> str:
    """Run a command in the story's folder."""
    show(command)
    with start(command, tpm) as process:
        return finish(process, status=status, reason=reason)


@contextmanager
def start(command: Sequence[str | Path], tpm: Tpm | None, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A command that runs beside others; no longer than the block."""
    environment = os.environ | variables | ({"HWLICENSE_TPM": tpm.tcti} if tpm else {})
    with subprocess.Popen(
        command, cwd=FOLDER, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


class Customer:
    """Who has a device, and the product on it."""

    def __init__(self, name: str, folder: str, tpm: Tpm) -> None:
        self.name, self.folder, self.tpm = name, folder, tpm

    def ask(self) -> None:
        """Enroll the device: its TPM is to count for the license, too."""
        request = f"{self.folder}.hwreq"
        command = ["device", "enroll", "--home", self.folder, "--counted", "--name", self.name, "-o", request]
        run([PROGRAM, *command], tpm=self.tpm)

    def install(self, license_file: str, *, status: int = 0, reason: str = "") -> None:
        """Install a license."""
        command = ["device", "install", "--home", self.folder, license_file]
        run([PROGRAM, *command], tpm=self.tpm, status=status, reason=reason)

    def status(self) -> str:
        """What is left."""
        return run([PROGRAM, "device", "status", "--home", self.folder], tpm=self.tpm)

    def program(self, name: str, diary: str, *arguments: object) -> list[str]:
        """A program that uses the product, as a command."""
        return [sys.executable, f"product/{name}", "aspirates.hwpkg", diary, *map(str, arguments)]

    @contextmanager
    def running(self, command: Sequence[str], *, ending: str = " &") -> Iterator[subprocess.Popen[str]]:
        """Start such a command, shown."""
        show(command, ending)
        with start(command, self.tpm, HWLICENSE_HOME=self.folder) as process:
            yield process

    def use(self, command: Sequence[str], *, status: int = 0, reason: str = "") -> str:
        """Run it to its end."""
        with self.running(command, ending="") as process:
            return finish(process, status=status, reason=reason)


def write_terms(name: str, licensee: str, numbers: dict[str, int]) -> str:
    """What the vendor allows."""
    (FOLDER / name).write_text(TERMS.format(licensee=licensee, **numbers), encoding="utf-8")
    return name


def build_product() -> None:
    """What the vendor ships beside the package: code, with the vendor's public keys inside.

    The clinic's and the competitor's programs lie beside it.
    """
    target = FOLDER / "product"
    target.mkdir()
    for name in ("product.py", "classifier.py", "measurements.py", "workstation.py", "labelling.py"):
        shutil.copy(HERE / name, target)
    public = (FOLDER / "vendor" / "vendor.pub.json").read_text(encoding="utf-8")
    (target / "vendor_keys.py").write_text(
        f'"""Written at build time."""\n\nVENDOR = """{public}"""\n', encoding="utf-8"
    )


def sale(clinic: Customer, imitator: Customer, ek_root: Path) -> None:
    """Tell how both come to their licenses."""
    tell("1. A vendor has trained a classifier of fine needle aspirates, and sells it under a license.")
    run([sys.executable, HERE / "training.py", "weights.bin"])
    run([PROGRAM, "vendor", "init", "vendor", "--no-passphrase", "--name", "Example Pathology"])
    pack = ["vendor", "pack", "--vendor", "vendor", "--name", "aspirate-classifier", "--version", "1.0"]
    run([PROGRAM, *pack, "-o", "aspirates.hwpkg", "weights.bin"])
    build_product()

    tell("2. A clinic orders a pilot of 90 images; so does Imitation Ltd., which wants labels, and pays for 1,000.")
    for customer, terms in (
        (clinic, write_terms("clinic.toml", clinic.name, PILOT)),
        (imitator, write_terms("imitator.toml", imitator.name, LARGER)),
    ):
        customer.ask()
        issue = ["vendor", "issue", "--vendor", "vendor", "--package", "aspirates.hwpkg", "--terms", terms]
        files = ["--request", f"{customer.folder}.hwreq", "-o", f"{customer.folder}.hwlic"]
        run([PROGRAM, *issue, "--ek-root", f"virtual={ek_root}", *files])
        run([PROGRAM, "device", "trust", "--home", customer.folder, "vendor/vendor.pub.json"])
        customer.install(f"{customer.folder}.hwlic")


def first_day(clinic: Customer, imitator: Customer) -> None:
    """Tell how the same limits are felt, and not felt."""
    tell("3. The clinic's first day, at two workstations. Far away, Imitation Ltd. starts its labelling program.")
    with ExitStack() as stack:
        labelling = stack.enter_context(imitator.running(imitator.program("labelling.py", "imitator.jsonl")))
        workstations = [
            stack.enter_context(clinic.running(clinic.program("workstation.py", f"clinic-{number}.jsonl", *day)))
            for number, day in enumerate([(0, 20, 2), (20, 20, 2)], 1)
        ]
        time.sleep(3)  # both are open by now, and the day is not over

        tell("4. A third workstation is one more than the license has instances.")
        third = clinic.program("workstation.py", "clinic-3.jsonl", 40, 1, 1)
        clinic.use(third, status=1, reason="INSTANCES_EXCEEDED")

        tell("5. In the evening. No patient waited, and no procedure was interrupted.")
        for process in workstations:
            if "waits: 0" not in finish(process):
                raise Unexpected("the license let a patient wait")
        clinic.status()
        shutil.copytree(FOLDER / clinic.folder, FOLDER / "first-evening")

        tell("6. Meanwhile at Imitation Ltd.: too fast; then too regular; then too much alike. None of its ways lasts.")
        table = finish(labelling)
    ended = re.findall(r"(\d+)  ([A-Z_]+.*)$", table, re.MULTILINE)
    if [why for _, why in ended] != ["RATE_EXCEEDED", "ABNORMAL_USE regularity", "ABNORMAL_USE distances"]:
        raise Unexpected("labelling was not stopped in the three ways")
    if sum(int(labels) for labels, _ in ended) > ENOUGH:
        raise Unexpected("labelling got too far")


def growth(clinic: Customer) -> None:
    """Tell how a license is loosened in the field."""
    tell("7. A screening week begins. Now there are so many patients that they wait, and the pilot is used up.")
    crowded = clinic.program("workstation.py", "clinic-1.jsonl", 40, 60, 25)
    said = clinic.use(crowded, status=1, reason="INFERENCES_EXHAUSTED")
    if "waits: 0" in said:
        raise Unexpected("the rate was not felt")

    tell("8. The clinic orders more. The vendor revises the license: a file by mail, and no new package.")
    terms = write_terms("loosened.toml", clinic.name, LOOSENED)
    revise = ["vendor", "revise", "--vendor", "vendor", "--license", f"{clinic.folder}.hwlic", "--terms", terms]
    run([PROGRAM, *revise, "-o", "revised.hwlic"])
    clinic.install("revised.hwlic")

    tell("9. They come as fast as before the revision, and nobody waits.")
    if "waits: 0" not in clinic.use(clinic.program("workstation.py", "clinic-1.jsonl", 90, 50, 25)):
        raise Unexpected("the revision did not loosen the rate")
    clinic.status()

    tell("10. Somebody puts the home of the first evening back, with its 50 images left. The TPM has moved on.")
    shutil.rmtree(FOLDER / clinic.folder)
    (FOLDER / "first-evening").rename(FOLDER / clinic.folder)
    restored = clinic.program("workstation.py", "clinic-1.jsonl", 140, 1, 25)
    clinic.use(restored, status=1, reason="LICENSE_SUPERSEDED")


def main() -> None:
    """Tell the story in a fresh folder."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    started = time.monotonic()
    with ExitStack() as machines:
        authority = CertificateAuthority(FOLDER / "tpm-maker")
        a, b = (machines.enter_context(Tpm(authority=authority)) for _ in range(2))
        clinic, imitator = Customer("Example Clinic", "clinic", a), Customer("Imitation Ltd.", "imitator", b)
        sale(clinic, imitator, a.ek_root)
        first_day(clinic, imitator)
        growth(clinic)
    rows = ["clinic=clinic-1.jsonl,clinic-2.jsonl", "Imitation Ltd.=imitator.jsonl"]
    run([sys.executable, HERE / "chart.py", "days.png", *rows])
    seconds = time.monotonic() - started
    print(f"\nDone in {seconds:.0f} s with hwlicense {hwlicense.__version__}. See {FOLDER / 'days.png'}.")


if __name__ == "__main__":
    try:
        main()
    except Unexpected as error:
        sys.exit(f"The story did not go as told: {error}.")
