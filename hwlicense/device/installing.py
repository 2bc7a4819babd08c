"""Taking in what the vendor sent: licenses, approvals of platform states, clock resets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hwlicense import storage
from hwlicense.core.documents import PAYLOAD_TYPES, Approval, ClockReset, License, TpmBinding
from hwlicense.core.envelope import disassemble
from hwlicense.core.errors import Reason, RefusedError, UsageError
from hwlicense.device import bound
from hwlicense.device.home import check_license, verified_by_any
from hwlicense.device.memory import forbid_dumps
from hwlicense.device.resetting import install_clock_reset

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwlicense.core.documents import Binding
    from hwlicense.core.errors import HwlicenseError
    from hwlicense.device.bound import Connect
    from hwlicense.device.home import Home


def install(
    home: Home, raw: bytes, connect: Connect, absent: Callable[[HwlicenseError], None] = lambda _error: None
) -> License | Approval | ClockReset:
    """Install a license, an approval or a clock reset by a trusted vendor, and return it. Again, it is harmless.

    `connect` opens hardware of a kind; nothing is asked of it before the signatures hold. Where a license takes less
    hardware than it names, what is not here is told to `absent`: it could not be checked.
    Raises RefusedError (VENDOR_UNTRUSTED, WRONG_VENDOR, WRONG_DEVICE, LICENSE_SUPERSEDED, WRONG_PRODUCT,
    APPROVAL_WITHDRAWN, LICENSE_ABSENT, CLOCK_SET_BACK), DamagedError, HardwareError.
    """
    forbid_dumps()  # the shares of the license secret pass through ordinary memory
    payload_type = disassemble(raw).payloadType
    if payload_type == PAYLOAD_TYPES[ClockReset]:
        return install_clock_reset(home, raw)
    if payload_type in {PAYLOAD_TYPES[License], PAYLOAD_TYPES[Approval]}:
        storage.make_folders(home.path)
        with storage.exclusive(home.path):
            if payload_type == PAYLOAD_TYPES[License]:
                return _install_license(home, raw, connect, absent)
            return _install_approval(home, raw, connect)
    what = f"Only licenses, approvals and clock resets are installed; the file is of type {payload_type!r}."
    raise UsageError(Reason.USAGE, what, "Give a .hwlic, .hwapp or .hwclk file.")


def _install_license(home: Home, raw: bytes, connect: Connect, absent: Callable[[HwlicenseError], None]) -> License:
    licensed, vendor = verified_by_any(raw, License, home.trusted())
    check_license(licensed, vendor)
    before = None
    for other, _ in home.licenses([vendor])[0]:
        if other.grant.license != licensed.grant.license:
            continue
        before = other
        if other.grant.revision > licensed.grant.revision:
            older, newer = licensed.grant.revision, other.grant.revision
            what = f"Revision {newer} of this license is installed; the file is revision {older}."
            raise RefusedError(
                Reason.LICENSE_SUPERSEDED, what, "Nothing is to be done: the newer revision stays in force."
            )
    if home.holder(licensed.grant.license) not in (None, vendor.fingerprint):
        what = f"Another vendor's license {licensed.grant.license} is installed here, which this one would replace."
        raise RefusedError(Reason.WRONG_VENDOR, what, "Ask the vendor for a license with an identifier of its own.")
    held, missing = bound.install(connect, licensed, licensed.approvals)
    if any(_counted(binding) for binding in licensed.bindings):
        # Before the older revision ends: a full disk is to be found out now. Installing again mends a cut from here on.
        home.prepare_license(licensed, raw, held)
        try:
            bound.commit(connect, licensed, held, home.approvals(licensed, vendor))
        except RefusedError as refusal:
            if refusal.reason in _NEVER:
                home.forget_pending(licensed)
            raise
    for old in _ended(before, licensed) if before else []:
        bound.retire(connect, old)
    home.keep_license(licensed, raw, held)
    for error in missing:
        absent(error)
    return licensed


_NEVER: Final = {Reason.LICENSE_SUPERSEDED, Reason.COUNTER_LOST}
"""Refusals of a license that no further try puts in force: what it names is not its own any more."""


def _counted(binding: Binding) -> bool:
    return isinstance(binding, TpmBinding) and binding.counter is not None


def _ended(before: License, licensed: License) -> list[TpmBinding]:
    """Bindings of the older revision whose counter the new one does without."""
    kept = {b.counter.handle for b in licensed.bindings if isinstance(b, TpmBinding) and b.counter}
    old = [b for b in before.bindings if isinstance(b, TpmBinding) and b.counter]
    return [binding for binding in old if binding.counter and binding.counter.handle not in kept]


def _install_approval(home: Home, raw: bytes, connect: Connect) -> Approval:
    approval, vendor = verified_by_any(raw, Approval, home.trusted())
    fitting = [i.license for i in home.licenses([vendor])[0] if i.license.grant.product == approval.product]
    if not fitting:
        what = f"No license for the product {approval.product!r} is installed here, so the approval serves nothing."
        raise RefusedError(
            Reason.WRONG_PRODUCT, what, "Install the license first, or give the approval to the right device."
        )
    oldest = min(licensed.grant.generation for licensed in fitting)
    if approval.generation < oldest:
        what = f"The approval is of generation {approval.generation}; the licenses here ask for generation {oldest}."
        raise RefusedError(Reason.APPROVAL_WITHDRAWN, what, "Ask the vendor for its current approval of this system.")
    with connect("tpm") as hardware:
        for licensed in fitting:
            if licensed.grant.generation == approval.generation and licensed.grant.pcrs:
                for binding in licensed.bindings:
                    if isinstance(binding, TpmBinding):
                        held = hardware.admit(binding, home.held(licensed, binding), approval)
                        home.keep_held(licensed, binding, held)
            home.keep_approval(licensed, approval, raw)
    return approval
