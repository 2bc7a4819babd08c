"""What is installed, for people and for machines. Hardware is asked for nothing but what it counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hwlicense.core import dongle
from hwlicense.core.documents import TpmBinding, UsbBinding
from hwlicense.core.errors import DamagedError, HwlicenseError, Reason, RefusedError
from hwlicense.core.hardware import Counting
from hwlicense.core.terms import check_validity
from hwlicense.device import grace, usage
from hwlicense.device.bound import kind_of
from hwlicense.device.home import check_license

if TYPE_CHECKING:
    import datetime

    from hwlicense.core.documents import License
    from hwlicense.core.hardware import Counted
    from hwlicense.device.bound import Connect
    from hwlicense.device.home import Home, Installed


_NOT_CURRENT: Final = {
    "superseded": Reason.LICENSE_SUPERSEDED,
    "unfinished": Reason.INSTALL_UNFINISHED,
    "lost": Reason.COUNTER_LOST,
}


def status(
    home: Home, today: datetime.date, connect: Connect | None = None
) -> tuple[list[dict[str, Any]], list[HwlicenseError]]:
    """One entry a license of a trusted vendor, and what is wrong with those that cannot be read.

    `connect` opens the TPM, for licenses of which it knows what is left.
    """
    licenses, problems = home.licenses(home.trusted())
    entries = []
    for installed in licenses:
        counted = None
        if connect and usage.counts(installed.license):
            try:
                counted = _asked(home, installed.license, connect)
            except HwlicenseError as error:
                problems.append(error)
        entries.append(_entry(home, installed, today, counted))
    return entries, problems


def _asked(home: Home, licensed: License, connect: Connect) -> Counted | None:
    for binding in licensed.bindings:
        if isinstance(binding, TpmBinding):
            with connect("tpm") as hardware:
                if isinstance(hardware, Counting):
                    return hardware.use(binding, home.held(licensed, binding))
    return None


def _entry(home: Home, installed: Installed, today: datetime.date, counted: Counted | None) -> dict[str, Any]:
    licensed, vendor = installed
    grant, state, approvals = licensed.grant, "installed", None
    try:
        check_validity(grant, today)
        check_license(licensed, vendor)
        approvals = home.approvals(licensed, vendor)
        _check_held(home, licensed)
    except RefusedError as error:
        state = f"refused: {error.reason}"
    except HwlicenseError as error:
        state = f"damaged: {error.reason}"
    if counted and counted.state != "current":
        state = f"refused: {_NOT_CURRENT[counted.state]}"
    return {
        "license": grant.license,
        "revision": grant.revision,
        "state": state,
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
        **usage.limits(home.state, licensed, counted),
        "approved_states": None if approvals is None else len(approvals),
    }


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


def _presence(home: Home, licensed: License) -> dict[str, Any]:
    """Terms of presence and what is used of them, in seconds; nothing where the license asks for none.

    What is used up is in the state folder, authenticated but not anchored in hardware.
    """
    terms, continuity = licensed.grant.presence, licensed.grant.continuity
    found: dict[str, Any] = {"continuity": continuity} if continuity else {}
    if terms:
        folder = grace.account_folder(home.state, licensed.grant)
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
