"""Taking in what the vendor sent: licenses, and approvals of platform states."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hwlicense import storage
from hwlicense.core.documents import PAYLOAD_TYPES, Approval, License
from hwlicense.core.envelope import disassemble
from hwlicense.core.errors import Reason, RefusedError, UsageError
from hwlicense.device.home import check_license, verified_by_any
from hwlicense.device.memory import forbid_dumps

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwlicense.core.hardware import Hardware
    from hwlicense.device.home import Home


def install(home: Home, raw: bytes, connect: Callable[[], Hardware]) -> License | Approval:
    """Install a license or an approval by a trusted vendor, and return it. Doing it again is harmless.

    `connect` opens the hardware; nothing is asked of it before the signatures hold.
    Raises RefusedError (VENDOR_UNTRUSTED, WRONG_VENDOR, WRONG_DEVICE, LICENSE_SUPERSEDED, WRONG_PRODUCT,
    APPROVAL_WITHDRAWN), DamagedError, HardwareError.
    """
    forbid_dumps()  # the shares of the license secret pass through ordinary memory
    payload_type = disassemble(raw).payloadType
    if payload_type in {PAYLOAD_TYPES[License], PAYLOAD_TYPES[Approval]}:
        storage.make_folders(home.path)
        with storage.exclusive(home.path):
            act = _install_license if payload_type == PAYLOAD_TYPES[License] else _install_approval
            return act(home, raw, connect)
    what = f"Only licenses and approvals are installed; the file is of type {payload_type!r}."
    raise UsageError(Reason.USAGE, what, "Give a .hwlic or .hwapp file.")


def _install_license(home: Home, raw: bytes, connect: Callable[[], Hardware]) -> License:
    licensed, vendor = verified_by_any(raw, License, home.trusted())
    check_license(licensed, vendor)
    for other, _ in home.licenses([vendor])[0]:
        if other.grant.license == licensed.grant.license and other.grant.revision > licensed.grant.revision:
            older, newer = licensed.grant.revision, other.grant.revision
            what = f"Revision {newer} of this license is installed; the file is revision {older}."
            raise RefusedError(
                Reason.LICENSE_SUPERSEDED, what, "Nothing is to be done: the newer revision stays in force."
            )
    with connect() as hardware:
        held = [hardware.install(binding, licensed.approvals) for binding in licensed.bindings]
    home.keep_license(licensed, raw, held)
    return licensed


def _install_approval(home: Home, raw: bytes, connect: Callable[[], Hardware]) -> Approval:
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
    with connect() as hardware:
        for licensed in fitting:
            if licensed.grant.generation == approval.generation and licensed.grant.pcrs:
                for binding in licensed.bindings:
                    home.keep_held(licensed, binding, hardware.admit(binding, home.held(licensed, binding), approval))
            home.keep_approval(licensed, approval, raw)
    return approval
