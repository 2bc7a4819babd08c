"""What starting costs is what is imported: a module that comes to these sets must be worth its time.

`python -m benchmarks cold` measures it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.world import licensed

PACKAGE = {"hwlicense", "hwlicense.core", "hwlicense.core.errors"}
OPENING = """
binders binders.tpm binders.tpm.anchoring binders.tpm.answering binders.tpm.capping binders.tpm.clock
binders.tpm.committing binders.tpm.connection binders.tpm.counting binders.tpm.failures binders.tpm.hardware
binders.tpm.held binders.tpm.installing binders.tpm.keys binders.tpm.opening binders.tpm.probing binders.tpm.providing
binders.tpm.sealed binders.tpm.turns
core.account core.calendar core.code core.documents core.dongle core.durations core.envelope core.hardware core.keys
core.leases core.limits core.package core.process core.schema core.secret core.tpm core.tpm.composing
core.tpm.duplicate core.tpm.nv core.tpm.pcrs core.tpm.policy core.tpm.quote core.tpm.signatures core.tpm.standing
core.tpm.structures core.tpm.wire core.uri core.validity core.windows core.wording
device device.bound device.clock device.counters device.home device.instances device.keyring device.ledger
device.licensed device.locking device.memory device.model device.opening device.reading device.records
device.recovering device.resetting device.room device.selecting device.sharing device.starting device.streaming
device.tending
storage threads
"""
CHECKING = """
cli cli.checking cli.commands cli.device cli.opening cli.options cli.output cli.secrets device.selecting
"""
LIBRARIES = {"blake3", "cryptography", "msgspec", "tpm2_pytss", "_cffi_backend", "_openssl", "typing_extensions"}
SLOW = {"asyncio", "click", "hwlicense_simulators", "multiprocessing", "numpy", "pkcs11", "ssl", "subprocess", "usb"}
WATCHED = """
import json, sys
before = set(sys.modules)
import hwlicense
first = set(sys.modules)
hwlicense.open(sys.argv[1], vendor=sys.argv[2], home=sys.argv[3]).close()
print(json.dumps([sorted(first - before), sorted(set(sys.modules) - first), sorted(sys.stdlib_module_names)]))
"""

COMMAND = """
import json, os, sys
leave = os._exit
def leaving(status):
    print(json.dumps(sorted(sys.modules)), flush=True)
    leave(status)
os._exit = leaving
from hwlicense.cli import main
main()
"""


def test_what_importing_and_a_first_opening_import(vendor, device):
    licensed(vendor, device)
    words = [sys.executable, "-c", WATCHED, vendor.package, vendor.text, device.home.path]
    environment = os.environ | device.tpm.environment
    first, then, standard = json.loads(subprocess.check_output([*map(str, words)], env=environment))
    ours = {name for name in then if name.startswith("hwlicense.")}
    assert {name for name in first if name.partition(".")[0] not in standard} == PACKAGE
    assert ours == {f"hwlicense.{name}" for name in OPENING.split()}
    top = {name.partition(".")[0] for name in (*first, *then)}
    assert top - set(standard) - {"hwlicense"} == LIBRARIES
    assert not top & SLOW


def test_what_a_check_that_opens_imports(vendor, device):
    licensed(vendor, device)
    words = [sys.executable, "-c", COMMAND, "device", "check", "--open", "--home", device.home.path, vendor.package]
    printed = subprocess.check_output([*map(str, words)], env=os.environ | device.tpm.environment, text=True)
    imported = json.loads(printed.splitlines()[-1])
    ours = {name for name in imported if name.startswith("hwlicense.")}
    assert ours - PACKAGE == {f"hwlicense.{name}" for name in (*OPENING.split(), *CHECKING.split())}
    assert not {name.partition(".")[0] for name in imported} & (SLOW - {"click"})
