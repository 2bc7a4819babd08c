"""The demo: a label reader is sold for one machine, and everything else that people try with it.

Run it with `make demo`. Vendor and devices are folders below build/demo; the two devices' TPMs are simulated by swtpm,
the dongles by hwlicense-simulators.
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
from typing import TYPE_CHECKING, Any

import hwlicense
from hwlicense.core import package
from hwlicense.core.documents import Manifest
from hwlicense.core.envelope import verified
from hwlicense.core.keys import unwrap_for_vendor
from hwlicense.core.secret import SIZE
from hwlicense.storage import OpenFile
from hwlicense.vendor.folder import Folder
from hwlicense_simulators import Bus, CertificateAuthority, Dongle, Tpm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / "build" / "demo"
PROGRAM = Path(sysconfig.get_path("scripts"), "hwlicense")
TERMS = """\
licensee = "Acme Robotics"
product = "label-reader"
[validity]
not_after = 2036-12-31
[require]
pcrs = ["sha256:0,7"]
"""
OPERATORS_TERMS = """\
licensee = "Acme Robotics"
product = "operated-reader"
[require]
bindings = "all"
[presence]
interval = "2s"
grace = "1s"
[continuity]
session = "10m"
"""


class Unexpected(Exception):  # noqa: N818  # it ends the story, not the product
    """The demo did not go as it is told."""


def tell(text: str) -> None:
    """Print a line of the story."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def run(command: Sequence[str | Path], *, status: int = 0, **variables: str) -> str:
    """Run a command in the demo's folder, show it and what it says, and insist on its exit status."""
    print("  $", shlex.join([Path(command[0]).name, *map(short, command[1:])]), flush=True)
    done = subprocess.run(
        command, cwd=FOLDER, env=os.environ | variables, capture_output=True, text=True, timeout=300, check=False
    )
    for line in (done.stdout + done.stderr).splitlines():
        print("   ", short(line), flush=True)
    if done.returncode != status:
        raise Unexpected(f"exit status {done.returncode} where {status} was expected")
    return done.stdout


def short(text: str | Path) -> str:
    """Paths as a reader needs them: by their last part."""
    return re.sub(r"/\S*/", "", str(text))


def read_part(tpm: Tpm, home: str, *, package_name: str = "label-reader.hwpkg", status: int = 0) -> str:
    """The customer runs the product on a device."""
    command = [sys.executable, "application/application.py", package_name, "part.png", "part-read.png"]
    return run(command, status=status, HWLICENSE_HOME=home, HWLICENSE_TPM=tpm.tcti)


def build_application() -> None:
    """What the vendor ships beside the package: code, with the vendor's public keys inside."""
    target = FOLDER / "application"
    target.mkdir()
    for name in ("application.py", "line.py", "weights.py"):
        shutil.copy(HERE / name, target)
    public = (FOLDER / "vendor" / "vendor.pub.json").read_text(encoding="utf-8")
    (target / "vendor_keys.py").write_text(
        f'"""Written at build time."""\n\nVENDOR = """{public}"""\n', encoding="utf-8"
    )


def flip(source: Path, target: Path, offset: int) -> None:
    """Copy a file with one bit changed."""
    raw = bytearray(source.read_bytes())
    raw[offset] ^= 1
    target.write_bytes(raw)


def forge(source: Path, target: Path) -> None:
    """Replace a chunk, as someone can who got hold of the content key: correctly encrypted, under the right key."""
    vendor = Folder(FOLDER / "vendor")
    with OpenFile(source) as file:
        envelope = package.envelope_of(file)
        manifest = verified(envelope, Manifest, vendor.public)
        layout = package.Layout(manifest, len(envelope), file.size)
        content_key = unwrap_for_vendor(manifest.wrapped_content_key, manifest.content_key, vendor.unlock(None).content)
        keys = bytearray(layout.chunk_count * SIZE)
        package.open_table_into(content_key, file.read(layout.table_size, layout.table_offset), keys)
    chunk = layout.chunk(manifest.members[-1], 0)
    sealed = bytearray(chunk.sealed_size)
    key = keys[chunk.key * SIZE : (chunk.key + 1) * SIZE]
    package.seal_chunk_into(key, bytes(chunk.size), sealed, last=chunk.last)
    raw = bytearray(source.read_bytes())
    raw[chunk.offset : chunk.offset + len(sealed)] = sealed
    target.write_bytes(raw)


def story(a: Tpm, b: Tpm) -> None:
    """Tell it."""
    tell("1. A vendor has trained networks that read lettering on parts, and a picture of a part.")
    run([sys.executable, HERE / "picture.py", "part.png"])
    weights = run([sys.executable, HERE / "weights.py"]).split()

    tell("2. The vendor makes keys, encrypts and signs networks and the code around them, and builds the product.")
    run([PROGRAM, "vendor", "init", "vendor", "--no-passphrase", "--name", "Example Vision"])
    pack = ["vendor", "pack", "--vendor", "vendor", "--name", "label-reader", "--version", "1.0"]
    run([PROGRAM, *pack, "--code", HERE / "reader.py", "-o", "label-reader.hwpkg", *weights])
    build_application()

    tell("3. Device A, a robot controller, asks for a license: its TPM says who it is and in which state it booted.")
    enroll = ["device", "enroll", "--home", "device-a", "--pcrs", "sha256:0,7", "--name", "controller A"]
    run([PROGRAM, *enroll, "-o", "device-a.hwreq"], HWLICENSE_TPM=a.tcti)

    tell("4. The vendor, who has no TPM, checks the request and issues a license for this device alone.")
    (FOLDER / "terms.toml").write_text(TERMS, encoding="utf-8")
    issue = ["vendor", "issue", "--vendor", "vendor", "--package", "label-reader.hwpkg", "--terms", "terms.toml"]
    root = f"virtual={a.ek_root}"
    run([PROGRAM, *issue, "--request", "device-a.hwreq", "--ek-root", root, "-o", "device-a.hwlic"])

    tell("5. Device A installs the license and reads the part.")
    run([PROGRAM, "device", "trust", "--home", "device-a", "vendor/vendor.pub.json"])
    run([PROGRAM, "device", "install", "--home", "device-a", "device-a.hwlic"], HWLICENSE_TPM=a.tcti)
    if "4711" not in read_part(a, "device-a"):
        raise Unexpected("the serial number was not read")

    tell("6. Somebody copies everything (product, package, license, home) to device B. B refuses.")
    shutil.copytree(FOLDER / "device-a", FOLDER / "device-b")
    read_part(b, "device-b", status=1)
    run([PROGRAM, "device", "install", "--home", "device-b", "device-a.hwlic"], status=1, HWLICENSE_TPM=b.tcti)

    tell("7. The firmware of device A changes. A refuses: this may be an update, or an attack.")
    a.reboot(firmware=b"firmware 2")
    read_part(a, "device-a", status=1)

    tell("8. It was an update. The vendor approves the new state once, for every device of the product line.")
    run([PROGRAM, *enroll, "--force", "-o", "after-update.hwreq"], HWLICENSE_TPM=a.tcti)
    approve = [
        "vendor",
        "approve",
        "--vendor",
        "vendor",
        "--product",
        "label-reader",
        "--request",
        "after-update.hwreq",
    ]
    run([PROGRAM, *approve, "--ek-root", root, "-o", "firmware-2.hwapp"])
    run([PROGRAM, "device", "install", "--home", "device-a", "firmware-2.hwapp"], HWLICENSE_TPM=a.tcti)
    read_part(a, "device-a")

    tell("9. Somebody changes one bit of the package. It is refused.")
    original = FOLDER / "label-reader.hwpkg"
    flip(original, FOLDER / "tampered.hwpkg", original.stat().st_size // 2)
    read_part(a, "device-a", package_name="tampered.hwpkg", status=1)

    tell("10. Somebody who got hold of the content key forges a network, correctly encrypted. It is refused, too.")
    forge(original, FOLDER / "forged.hwpkg")
    read_part(a, "device-a", package_name="forged.hwpkg", status=1)


def story_of_the_dongle(a: Tpm, bus: Bus, operators: Dongle, spare: Dongle) -> None:
    """Tell how a second license is bound to device A and to what its operator carries."""
    plugged: dict[str, Any] = {"HWLICENSE_TPM": a.tcti, **bus.environment}

    tell("11. A second license is to run on device A only while the operator's dongle is in. The vendor programs one.")
    spare.pull()
    program = ["vendor", "dongle", "program", "--vendor", "vendor", "--usb", operators.selector]
    run([PROGRAM, *program, "-o", "operator.hwreq"], **plugged)
    run([PROGRAM, "device", "enroll", "--home", "operated", "--name", "A", "-o", "a.hwreq"], HWLICENSE_TPM=a.tcti)
    (FOLDER / "operated.toml").write_text(OPERATORS_TERMS, encoding="utf-8")
    issue = ["vendor", "issue", "--vendor", "vendor", "--package", "label-reader.hwpkg", "--terms", "operated.toml"]
    requests = ["--request", "a.hwreq", "--request", "operator.hwreq", "--ek-root", f"virtual={a.ek_root}"]
    run([PROGRAM, *issue, *requests, "-o", "operated.hwlic"])
    run([PROGRAM, "device", "trust", "--home", "operated", "vendor/vendor.pub.json"])
    run([PROGRAM, "device", "install", "--home", "operated", "operated.hwlic"], **plugged)

    tell("12. The line runs. The operator pulls the dongle: the next part is refused. It comes back: the line runs on.")
    with running_line(plugged) as said:
        await_line(said, "the line runs: SN 4711-0815")
        pulled = time.monotonic()
        operators.pull()
        await_line(said, "the line stands still: DONGLE_ABSENT")
        print(f"    ({time.monotonic() - pulled:.1f} s after it was pulled: interval 2 s, grace 1 s)", flush=True)
        operators.plug(port=3)
        await_line(said, "the line runs: SN 4711-0815")

    tell("13. Another dongle of the same kind opens nothing.")
    operators.pull()
    spare.plug()
    command = ["device", "check", "--open", "--home", "operated", "label-reader.hwpkg"]
    run([PROGRAM, *command], status=3, **plugged)


@contextmanager
def running_line(variables: dict[str, str]) -> Iterator[Iterator[str]]:
    """The product on a line, until the block ends; gives what it says."""
    stop = FOLDER / "stop"
    command = [sys.executable, "application/line.py", "label-reader.hwpkg", "part.png", str(stop)]
    print("  $", shlex.join(short(part) for part in command), flush=True)
    environment = os.environ | {"HWLICENSE_HOME": "operated"} | variables
    with subprocess.Popen(command, cwd=FOLDER, env=environment, stdout=subprocess.PIPE, text=True) as line:
        assert line.stdout is not None
        try:
            yield iter(line.stdout)
            stop.touch()
            if line.wait(60):
                raise Unexpected(f"the line ended with {line.returncode}")
        finally:
            line.kill()


def await_line(said: Iterator[str], expected: str) -> None:
    """Show what the line says until it is `expected`."""
    for text in said:
        print("   ", text.rstrip(), flush=True)
        if text.rstrip() == expected:
            return
    raise Unexpected(f"the line ended before it said {expected!r}")


def main() -> None:
    """Tell the story in a fresh folder."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    started = time.monotonic()
    with ExitStack() as machines:
        authority = CertificateAuthority(FOLDER / "tpm-maker")
        a, b = (machines.enter_context(Tpm(authority=authority)) for _ in range(2))
        story(a, b)
        bus = Bus()
        machines.enter_context(bus.serve())
        dongles = (Dongle(bus=bus, serial=serial, programmed=False) for serial in (4711, 4712))
        story_of_the_dongle(a, bus, *(machines.enter_context(dongle) for dongle in dongles))
    seconds = time.monotonic() - started
    print(f"\nDone in {seconds:.0f} s with hwlicense {hwlicense.__version__}. See {FOLDER / 'part-read.png'}.")


if __name__ == "__main__":
    try:
        main()
    except Unexpected as error:
        sys.exit(f"The demo did not go as told: {error}.")
