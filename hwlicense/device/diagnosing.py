"""What is here, what is missing, and which command or group mends it."""

from __future__ import annotations

import grp
import importlib.util
import os
import pwd
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from hwlicense.core.errors import HwlicenseError
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.device import memory, selecting
from hwlicense.device.opening import utc_today
from hwlicense.device.reporting import status

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hwlicense.core.documents import Approval, License
    from hwlicense.device.home import Home

DEVICE: Final = Path("/dev/tpmrm0")
FIRST_YEAR: Final = 2026


class Finding(NamedTuple):
    """One thing looked at. `mend` is a command or what a person does, empty where nothing is to be done."""

    state: Literal["ok", "note", "missing"]
    subject: str
    text: str
    mend: str = ""


def examine(home: Home, tcti: str | None) -> list[Finding]:
    """Everything that opening a model depends on, for the TPM `tcti` or the usual one. Changes nothing."""
    sections = (
        ("library", _library()),
        ("TPM", _tpm(home, tcti)),
        ("home", _home(home)),
        ("license", _licenses(home, tcti)),
        ("system", _system()),
    )
    return [finding for subject, section in sections for finding in _whole(subject, section)]


def _whole(subject: str, section: Iterator[Finding]) -> Iterator[Finding]:
    """A section, to its end or to what broke it off: that is a finding, too."""
    try:
        yield from section
    except HwlicenseError as error:
        yield Finding("missing", subject, error.what, error.hint)


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
    address = selecting.tpm_address(tcti, home)
    if address is None or address.startswith("device:"):
        yield from _node(DEVICE if address is None else Path(address.removeprefix("device:")))
    facts = probe(address, Selection())
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
        mend = "Where opening is slow, make it persistent before enrolling (docs/tpm.md)."
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
        yield Finding(
            "missing", "home", f"{home.path} does not exist", f"hwlicense device enroll --home {home.path} -o OUT.hwreq"
        )
        return
    mode = home.path.stat().st_mode & 0o077
    if mode:
        yield Finding("note", "home", f"{home.path} is open to other users", f"chmod go= {home.path}")
    else:
        yield Finding("ok", "home", str(home.path))
    state = next(folder for folder in (home.state, *home.state.absolute().parents) if folder.exists())
    if not os.access(state, os.W_OK):
        text = f"{home.state} cannot be written: no approval can be installed"
        yield Finding("note", "state", text, "Give --state DIR, a folder that can be written.")
    vendors = home.trusted()
    if not vendors:
        yield Finding(
            "missing",
            "trust",
            "no vendor is trusted by the command line",
            f"hwlicense device trust --home {home.path} VENDOR.pub.json",
        )
        return
    yield Finding("ok", "trust", ", ".join(vendor.name for vendor in vendors))
    entries, problems = status(home, utc_today())
    for entry in entries:
        good = entry["state"] == "installed"
        text = f"{entry['license']} ({', '.join(entry['packages'])}): {entry['state']}"
        yield Finding(
            "ok" if good else "missing", "license", text, "" if good else "Ask the vendor for a license in force."
        )
    for problem in problems:
        yield Finding("missing", "license", problem.what, problem.hint)
    if not entries and not problems:
        yield Finding("missing", "license", "none is installed", f"hwlicense device install --home {home.path} LICENSE")


def _licenses(home: Home, tcti: str | None) -> Iterator[Finding]:
    """Whether the licenses in force are for this TPM, and for its present state."""
    for installed in home.licenses(home.trusted())[0]:
        licensed, vendor = installed
        subject = f"license {licensed.grant.license[:8]}"
        yield from _whole(subject, _license(home, tcti, subject, licensed, home.approvals(licensed, vendor)))


def _license(
    home: Home, tcti: str | None, subject: str, licensed: License, approvals: Sequence[Approval]
) -> Iterator[Finding]:
    with selecting.tpm(tcti, home)() as hardware:
        for binding in licensed.bindings:
            hardware.present(binding, home.held(licensed, binding))
    yield Finding("ok", subject, "its hardware is here")
    if licensed.grant.pcrs:
        present = probe(selecting.tpm_address(tcti, home), Selection.parse(*licensed.grant.pcrs))["pcrs"]
        if not any(all(present[pcr.bank][pcr.index] == pcr.value for pcr in a.pcrs) for a in approvals):
            mend = "Boot the approved system, or install the vendor's approval of this one: hwlicense device install."
            yield Finding("missing", subject, "the platform's present state is not approved", mend)
        else:
            yield Finding("ok", subject, "the platform's present state is approved")


def _system() -> Iterator[Finding]:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not memory.protection().swap:
        yield Finding("ok", "memory", "no swap is in use")
    elif limit == resource.RLIM_INFINITY or os.geteuid() == 0:
        yield Finding("ok", "memory", "swap is in use; any amount of memory can be locked out of it")
    else:
        text = f"swap is in use; {limit:,} bytes can be locked out of it, and plaintext beyond that may reach it"
        yield Finding("note", "memory", text, "ulimit -l unlimited, LimitMEMLOCK=infinity in the service, or swapoff.")
    today = utc_today()
    if today.year < FIRST_YEAR:
        yield Finding(
            "missing", "clock", f"the date is {today}, which cannot be", "Set the clock (timedatectl, hwclock)."
        )
    else:
        yield Finding("ok", "clock", f"{today} (UTC)")
