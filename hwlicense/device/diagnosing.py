"""What is here, what is missing, and which command or group mends it."""

from __future__ import annotations

import grp
import importlib.util
import os
import pwd
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from hwlicense.core.errors import HardwareError, HwlicenseError, RefusedError
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.device import memory
from hwlicense.device.opening import utc_today
from hwlicense.device.reporting import status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hwlicense.device.home import Home

DEVICE: Final = Path("/dev/tpmrm0")
FIRST_YEAR: Final = 2026
SMALL_LOCK: Final = 64 << 20


class Finding(NamedTuple):
    """One thing looked at. `mend` is a command or what a person does, empty where nothing is to be done."""

    state: Literal["ok", "note", "missing"]
    subject: str
    text: str
    mend: str = ""


def examine(home: Home, tcti: str | None) -> list[Finding]:
    """Everything that opening a model depends on. Spends nothing and changes nothing."""
    return [*_library(), *_tpm(home, tcti), *_home(home), *_system()]


def probe(tcti: str | None, selection: Selection) -> dict[str, Any]:
    """Facts about the TPM, with the values of the selected PCRs under "pcrs", by bank and number.

    Raises HardwareError, UsageError EXTRA_MISSING.
    """
    from hwlicense.binders.tpm.probing import probe as ask  # noqa: PLC0415  # the library is an extra

    facts = ask(tcti, selection)
    banks: dict[str, dict[int, bytes]] = {}
    for pcr in facts.pcrs:
        banks.setdefault(pcr.bank, {})[pcr.index] = pcr.value
    return {**facts._asdict(), "pcrs": banks}


def _library() -> Iterator[Finding]:
    if importlib.util.find_spec("tpm2_pytss"):
        yield Finding("ok", "library", "tpm2-pytss is installed")
    else:
        yield Finding("missing", "library", "tpm2-pytss is not installed", 'pip install "hwlicense[tpm]"')


def _tpm(home: Home, tcti: str | None) -> Iterator[Finding]:
    if tcti is None or tcti.startswith("device:"):
        yield from _node(DEVICE if tcti is None else Path(tcti.removeprefix("device:")))
    enrolled = home.enrolled()
    try:
        facts = probe(tcti, Selection.parse(enrolled.pcrs) if enrolled and enrolled.pcrs else Selection())
    except HardwareError as error:
        yield Finding("missing", "TPM", error.what, error.hint)
        return
    except RefusedError as error:
        yield Finding("note", "TPM", error.what, error.hint)
        return
    except HwlicenseError as error:
        yield Finding("missing", "TPM", error.what, error.hint)
        return
    yield Finding(
        "ok", "TPM", f"{facts['manufacturer']}, firmware {facts['firmware']}, specification {facts['revision']}"
    )
    yield from _keys(facts)


def _keys(facts: dict[str, Any]) -> Iterator[Finding]:
    if facts["ek_certificates"]:
        yield Finding("ok", "EK", f"certificates: {', '.join(facts['ek_certificates'])}")
    else:
        mend = "Record the EK's Name at the factory and issue with --ek (docs/tpm.md)."
        yield Finding("note", "EK", "the TPM holds no EK certificate, as many firmware TPMs", mend)
    if facts["persistent_srk"]:
        yield Finding("ok", "SRK", "persistent at 0x81000001")
    else:
        mend = "Where opening is slow: tpm2_createprimary and tpm2_evictcontrol 0x81000001, before enrolling."
        yield Finding("note", "SRK", "not persistent: it is made anew at each opening", mend)
    if facts["in_lockout"]:
        mend = "Wait for the recovery time, or tpm2_dictionarylockout --clear-lockout."
        yield Finding("missing", "lockout", "the TPM refuses PINs after too many wrong ones", mend)


def _node(node: Path) -> Iterator[Finding]:
    if not node.exists():
        mend = (
            "Enable the TPM in the firmware setup; kernel modules: tpm_tis, tpm_crb. In a container, pass the device."
        )
        yield Finding("missing", "device node", f"{node} does not exist", mend)
        return
    if os.access(node, os.R_OK | os.W_OK):
        yield Finding("ok", "device node", f"{node} can be read and written")
        return
    group = _group(node.stat().st_gid)
    mend = f"sudo usermod --append --groups {group} {_user()}, then log in again (or restart the service)."
    yield Finding("missing", "device node", f"no permission for {node}, which belongs to the group {group}", mend)


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # nor its users
        return str(os.geteuid())


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:  # a container need not know the host's groups
        return str(number)


def _home(home: Home) -> Iterator[Finding]:
    if not home.path.is_dir():
        yield Finding("missing", "home", f"{home.path} does not exist", "hwlicense device enroll")
        return
    mode = home.path.stat().st_mode & 0o077
    if mode:
        yield Finding("note", "home", f"{home.path} is open to other users", f"chmod go= {home.path}")
    else:
        yield Finding("ok", "home", str(home.path))
    if not os.access(home.state, os.W_OK):
        yield Finding(
            "note", "state", f"{home.state} cannot be written: no approval can be installed", "Give --state DIR."
        )
    vendors = home.trusted()
    if not vendors:
        yield Finding(
            "missing", "trust", "no vendor is trusted by the command line", "hwlicense device trust VENDOR.pub.json"
        )
        return
    yield Finding("ok", "trust", ", ".join(vendor.name for vendor in vendors))
    entries, problems = status(home, utc_today())
    for entry in entries:
        good = entry["state"] == "usable"
        text = f"{entry['license']} ({', '.join(entry['packages'])}): {entry['state']}"
        yield Finding(
            "ok" if good else "missing", "license", text, "" if good else "Ask the vendor for a license in force."
        )
    for problem in problems:
        yield Finding("missing", "license", problem.what, problem.hint)
    if not entries and not problems:
        yield Finding("missing", "license", "none is installed", "hwlicense device install LICENSE")


def _system() -> Iterator[Finding]:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    swap = memory.protection().swap
    if limit != resource.RLIM_INFINITY and limit < SMALL_LOCK and swap:
        mend = "ulimit -l unlimited, LimitMEMLOCK=infinity in the service, or swapoff."
        yield Finding(
            "note", "memory", f"only {limit:,} bytes can be locked and swap is on: plaintext may reach it", mend
        )
    else:
        yield Finding("ok", "memory", "no swap is in use" if not swap else "plaintext can be locked out of swap")
    today = utc_today()
    if today.year < FIRST_YEAR:
        yield Finding(
            "missing", "clock", f"the date is {today}, which cannot be", "Set the clock (timedatectl, hwclock)."
        )
    else:
        yield Finding("ok", "clock", f"{today} (UTC)")
