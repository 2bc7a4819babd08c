"""What is installed, for people and for machines. Hardware is asked for nothing but what it counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hwlicense.core import dongle
from hwlicense.core.documents import TpmBinding, UsbBinding
from hwlicense.core.errors import DamagedError, HwlicenseError, RefusedError
from hwlicense.core.hardware import Counting
from hwlicense.core.keys import TAG_SIZE
from hwlicense.device import grace, resetting, tpm_memory, usage
from hwlicense.device.bound import kind_of
from hwlicense.device.home import check_license

if TYPE_CHECKING:
    import datetime

    from hwlicense.core.documents import License
    from hwlicense.core.hardware import Counted
    from hwlicense.device.bound import Connect
    from hwlicense.device.home import Home, Installed


def status(
    home: Home, today: datetime.date, connect: Connect | None = None
) -> tuple[list[dict[str, Any]], list[HwlicenseError]]:
    """One entry a license of a trusted vendor, and what is wrong with those that cannot be read.

    `connect` opens the TPM, for licenses of which it knows what is left; `unreached` is why it could not be asked.
    """
    licenses, problems = home.licenses(home.trusted())
    entries = []
    for installed in licenses:
        counted, unreached, refused = None, None, None
        if connect and usage.counts(installed.license):
            try:
                counted = _asked(home, installed.license, connect)
            except (RefusedError, DamagedError) as error:  # the TPM's own word, or what it cannot be asked without
                refused = error
            except HwlicenseError as error:
                unreached = error
                problems.append(error)
        entry, further = _entry(home, installed, today, counted, refused)
        if unreached:
            entry["unreached"] = _told(unreached)
        entries.append(entry)
        problems += further
    return entries, problems


def opens_left(home: Home, installed: Installed, today: datetime.date, connect: Connect) -> int:
    """How many opens a license has left, by its TPM's word; 0 where it would not open, or the TPM does not answer."""
    try:
        counted = _asked(home, installed.license, connect)
    except HwlicenseError:
        return 0
    if counted is None or counted.opens is None or counted.limit is None:
        return 0
    refused = _refusal(home, installed, counted, _reading(home, installed, today, counted))
    return 0 if refused else counted.limit - counted.opens


def _asked(home: Home, licensed: License, connect: Connect) -> Counted | None:
    for binding in licensed.bindings:
        if isinstance(binding, TpmBinding):
            with connect("tpm") as hardware:
                if isinstance(hardware, Counting):
                    return hardware.use(binding, home.held(licensed, binding))
    return None


def _reading(home: Home, installed: Installed, today: datetime.date, counted: Counted | None) -> usage.Seen:
    licensed, vendor = installed
    try:
        reset = resetting.pending(home, licensed, vendor)
    except HwlicenseError:  # what is wrong with it is why the license is refused
        reset = None
    return usage.read(home.state, licensed.grant, counted, reset, today)


def _refusal(home: Home, installed: Installed, counted: Counted | None, reading: usage.Seen) -> HwlicenseError | None:
    """Why the license would not open, as far as that can be told without opening it."""
    licensed, vendor = installed
    try:
        resetting.pending(home, licensed, vendor)
        if reading.refusal:
            return reading.refusal
        check_license(licensed, vendor)
        home.approvals(licensed, vendor)
        _check_held(home, licensed)
    except HwlicenseError as error:
        return error
    return tpm_memory.refusal(counted) if counted else None


def _entry(
    home: Home, installed: Installed, today: datetime.date, counted: Counted | None, refused: HwlicenseError | None
) -> tuple[dict[str, Any], list[HwlicenseError]]:
    licensed, vendor = installed
    grant, reading = licensed.grant, _reading(home, installed, today, counted)
    refusal = _refusal(home, installed, counted, reading) or refused or usage.over(grant, reading)
    state = "installed"
    if refusal:
        state = f"{'refused' if isinstance(refusal, RefusedError) else 'damaged'}: {refusal.reason}"
    limits, problems = usage.limits(licensed, counted, reading)
    entry = {
        "license": grant.license,
        "revision": grant.revision,
        "state": state,
        "refusal": _told(refusal) if refusal else None,
        "vendor": vendor.name,
        "licensee": grant.licensee,
        "product": grant.product,
        "packages": [f"{package.name} {package.version}" for package in grant.packages],
        "valid_from": grant.not_before and str(grant.not_before),
        "valid_until": grant.not_after and str(grant.not_after),
        "days_left": (grant.not_after - today).days + 1 if grant.not_after else None,
        "bindings": [kind_of(binding) for binding in licensed.bindings],
        "needs": f"{licensed.need} of {len(licensed.bindings)}",
        "pin": any(binding.pin for binding in licensed.bindings),
        "pcrs": grant.pcrs,
        **_presence(home, licensed),
        **_process(licensed),
        **limits,
        "approved_states": _approved(home, installed),
    }
    return entry, problems


def _told(error: HwlicenseError) -> dict[str, str]:
    return {"reason": error.reason, "what": error.what, "hint": error.hint}


def _approved(home: Home, installed: Installed) -> int | None:
    try:
        return len(home.approvals(*installed))
    except HwlicenseError:
        return None


def _check_held(home: Home, licensed: License) -> None:
    """That the home has what as much hardware gave as the license takes. Raises DamagedError HOME_DAMAGED."""
    problems = []
    for binding in licensed.bindings:
        try:
            home.held(licensed, binding)
        except DamagedError as error:
            problems.append(error)
    if len(licensed.bindings) - len(problems) < licensed.need:
        raise problems[0]


def _process(licensed: License) -> dict[str, Any]:
    """What the license says of the process that opens it, and what it encloses for it; nothing where it does not."""
    grant, found = licensed.grant, dict[str, Any]()
    if grant.guard:
        found |= {"guard": list(grant.guard.refuse), "guard_interval": grant.guard.interval}
    if grant.application:
        required = sum(file.required for file in grant.application.files)
        found["application"] = {"files": len(grant.application.files), "required": required}
    if licensed.enclosure:
        found["enclosed_bytes"] = len(licensed.enclosure) - TAG_SIZE
    return found


def _presence(home: Home, licensed: License) -> dict[str, Any]:
    """Terms of presence and what is used of them, in seconds; nothing where the license asks for none.

    What is used up is in the state folder, authenticated but not anchored in hardware.
    """
    terms, continuity = licensed.grant.presence, licensed.grant.continuity
    found: dict[str, Any] = {"continuity": continuity} if continuity else {}
    if terms:
        folder = grace.presence_folder(home.state, licensed.grant)
        entries = grace.recorded(folder)
        if entries is None and (folder / "presence").exists():
            found["presence_account"] = "damaged: all of the grace and the recorded answers counts as used"
        used = entries.used / 1000 if entries else 0.0
        found |= {
            "presence_interval": terms.interval,
            "grace": terms.grace,
            "grace_left": max(0.0, terms.grace - used),
            "grace_enforced_by": "runtime, not anchored",
        }
        counts = [dongle.answer_count(binding) for binding in licensed.bindings if isinstance(binding, UsbBinding)]
        if counts:
            found["fresh_answers_left"] = max(0, min(counts) - (entries.proofs if entries else 0))
    return found
