"""A core dump of the product at work: opened by its TPM, the model in use, and a collector that runs as root comes by.

Holds: keys and plaintext lie in memory that is left out of dumps, and everything on the way to them is overwritten. The
shares alone remain, as the home's file has them, which open nothing without the value that the TPM seals.
"""

from __future__ import annotations

import os
import subprocess
import sys
from textwrap import indent
from typing import TYPE_CHECKING

import pytest

from hwlicense.binders.tpm import installing
from hwlicense.core.documents import License
from hwlicense.core.envelope import verified
from hwlicense.core.keys import unwrap_content_key, unwrap_license_secret
from hwlicense.core.package import Layout, envelope_of, open_table_into
from hwlicense.core.secret import SIZE, Secret
from hwlicense.core.tpm.duplicate import member_secret
from hwlicense.storage import OpenFile
from tests.world import MEMBERS, licensed

if TYPE_CHECKING:
    from pathlib import Path

NAME = "weights.bin"
OPENED = """
import hwlicense, sys
package, vendor, home, tpm = sys.argv[1:]
model = hwlicense.open(package, vendor=open(vendor).read(), home=home, tpm=tpm)
held = model.read("weights.bin"), model.path("weights.bin"), model.open("weights.bin")
held[2].readinto(memoryview(bytearray(1)))
"""
CARELESS = "copy, keys = bytes(held[0]), sys.stdin.buffer.read()\n"
WAIT = 'import time; print("ready", flush=True); time.sleep(60)'


@pytest.fixture
def product(vendor, device, monkeypatch) -> tuple[list[str], dict[str, bytes]]:
    """What starts the product, and what must not be found."""
    seen: list[bytes] = []
    take = installing.taken

    def watched(buffer: object) -> Secret:
        secret = take(buffer)
        seen.append(bytes(secret.buffer))
        return secret

    with monkeypatch.context() as patched:
        patched.setattr(installing, "taken", watched)
        raw = licensed(vendor, device)
        device.open(vendor).close()
    storage, attestation, value = (Secret(bytearray(part)) for part in seen)
    sent = verified(raw, License, vendor.public)
    member = member_secret(value, storage, attestation)
    license_secret = unwrap_license_secret(sent.wraps, {0: member})
    content_key = unwrap_content_key(license_secret, sent, vendor.manifest.content_key)
    with OpenFile(vendor.package) as file:
        layout = Layout(vendor.manifest, len(envelope_of(file)), file.size)
        keys = bytearray(layout.chunk_count * SIZE)
        open_table_into(content_key, file.read(layout.table_size, layout.table_offset), keys)
    named = {"sealed value": value, "member secret": member, "license secret": license_secret}
    secrets = {name: bytes(secret.buffer) for name, secret in (named | {"content key": content_key}).items()}
    secrets |= {f"chunk key {at // SIZE}": bytes(keys[at : at + SIZE]) for at in range(0, len(keys), SIZE)}
    given = [vendor.package, vendor.folder / "vendor" / "vendor.pub.json", device.home.path, device.tpm.tcti]
    return list(map(str, given)), secrets | {"plaintext": MEMBERS[NAME][:29]}


def dumped(code: str, arguments: list[str], secrets: dict[str, bytes], folder: Path) -> set[str] | None:
    """Names of the secrets that gdb's gcore sees, whole or in half; None where it may not attach."""
    command = [sys.executable, "-c", code + WAIT, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin
        assert child.stdout
        child.stdin.write(b"".join(secrets.values()))
        child.stdin.close()
        assert child.stdout.readline() == b"ready\n"
        done = subprocess.run(["gcore", "-o", folder / "dump", str(child.pid)], capture_output=True, check=False)
        child.kill()
    core = folder / f"dump.{child.pid}"
    if not core.exists():
        assert b"ptrace" in done.stdout + done.stderr
        return None
    raw = core.read_bytes()
    core.unlink()
    return {name for name, secret in secrets.items() if secret[:16] in raw or secret[-16:] in raw}


def test_a_dump_of_the_product_holds_no_key_and_no_plaintext(product, tmp_path):
    arguments, secrets = product
    found = dumped(OPENED, arguments, secrets, tmp_path)
    assert found == (set() if os.geteuid() == 0 else None)  # whoever is not root may not even attach


def test_neither_closing_nor_failing_to_open_makes_the_product_dumpable_again(product, tmp_path):
    """What an opening leaves in freed memory, and the application in its own, is there until the process ends."""
    arguments, _ = product
    begun = "from hwlicense.device.memory import protection; print(protection().dumpable)\n"
    refused = f"try:\n{indent(OPENED, '    ')}except hwlicense.HwlicenseError as error: print(error.reason)"
    without = [*arguments[:2], str(tmp_path / "another home"), arguments[3]]
    for code, given, said in (
        (OPENED + "del held\nmodel.close()\nprint(model.closed)", arguments, "True"),
        (refused, without, "LICENSE_ABSENT"),
    ):
        command = [sys.executable, "-c", begun + code + "\nprint(protection().dumpable)", *given]
        assert subprocess.check_output(command, text=True).split() == ["True", said, "False"]


def test_a_dump_of_a_careless_product_holds_them(product, tmp_path):
    """The control: the same process, which copies the model and has the keys in an ordinary buffer."""
    arguments, secrets = product
    found = dumped(OPENED + CARELESS, arguments, secrets, tmp_path)
    assert found == (set(secrets) if os.geteuid() == 0 else None)
