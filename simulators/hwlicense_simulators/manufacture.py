"""Making a TPM: swtpm_setup creates its seeds, endorsement keys and EK certificates."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Literal, TypeAlias

from hwlicense_simulators.errors import SimulatorError, program

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hwlicense_simulators.authority import CertificateAuthority

StorageKey: TypeAlias = Literal["rsa", "ecc"]

# swtpm_setup leaves a process to init and waits until init has reaped it. In a container without a real init that
# takes half a second and leaves a zombie, so this process adopts (PR_SET_CHILD_SUBREAPER, prctl(2)) and reaps it.
_ADOPTING = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(36, 1)
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
status = 1
while True:
    try:
        pid, ended = os.wait()
    except ChildProcessError:
        break
    if pid == child:
        status = ended
sys.exit(1 if status else 0)
"""


def manufacture(
    state: Path,
    workshop: Path,
    authority: CertificateAuthority,
    *,
    banks: Sequence[str],
    storage_key: StorageKey | None,
    ek_certificates: bool,
) -> None:
    """Make a TPM in the new folder `state`, some 0.2 s. All else is written to `workshop`. Raises SimulatorError.

    `state` and `workshop` need short paths without commas. Nothing outside is read or written: no account-wide
    configuration, no /var/lib/swtpm-localca.
    """
    tools = [program("swtpm_setup"), program("swtpm"), program("swtpm_localca"), program("setpriv")]
    link = workshop / "authority"
    link.symlink_to(authority.folder)  # whose own path may hold anything
    (workshop / "localca.options").write_text(
        "--platform-manufacturer simulated\n--platform-model simulated\n--platform-version 1\n"
    )
    configuration = workshop / "setup.conf"
    configuration.write_text(
        f"create_certs_tool = {tools[2]}\n"
        f"create_certs_tool_config = {authority.configure(workshop, link)}\n"
        f"create_certs_tool_options = {workshop / 'localca.options'}\n"
    )
    state.mkdir(mode=0o700)
    log = workshop / "setup.log"
    arguments = [tools[0], "--tpm2", "--tpm-state", str(state), "--tpm", f"{tools[1]} socket"]
    arguments += ["--config", str(configuration), "--logfile", str(log), "--pcr-banks", ",".join(banks)]
    arguments += ["--create-ek-cert" if ek_certificates else "--createek"]
    if storage_key:
        arguments += ["--create-spk", *(["--ecc"] if storage_key == "ecc" else [])]
    _run([tools[3], "--pdeathsig", "KILL", sys.executable, "-I", "-S", "-c", _ADOPTING, *arguments], log)


def _run(arguments: Sequence[str], log: Path) -> None:
    setup = subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        _, complaint = setup.communicate(timeout=60)
    except BaseException:
        os.killpg(setup.pid, signal.SIGKILL)  # the group that start_new_session made: all that swtpm_setup started
        setup.wait()
        raise
    if setup.returncode:
        lines = log.read_bytes() + complaint if log.exists() else complaint
        last = "\n".join(lines.decode(errors="replace").splitlines()[-6:])
        raise SimulatorError(f"swtpm_setup could not make a TPM:\n{last}")
