"""Clock resets: the vendor's word for what time it is, where a device remembers a time that was wrong.

licenses/ID/clock.hwclk     in the state folder: the latest that was taken in for this license, as it was sent
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Final

from hwlicense import storage
from hwlicense.core.documents import ClockReset
from hwlicense.core.envelope import unverified, verified
from hwlicense.core.errors import DamagedError, Reason, RefusedError
from hwlicense.core.schema import FILE_LIMIT
from hwlicense.device.home import by_any

if TYPE_CHECKING:
    from pathlib import Path

    from hwlicense.core.documents import License, VendorPublic
    from hwlicense.device.home import Home

NAME: Final = "clock.hwclk"


def install_clock_reset(home: Home, raw: bytes) -> ClockReset:
    """Take in a clock reset by a trusted vendor for a license that is installed here. Doing it again is harmless.

    The caller holds no lock on the home. Raises RefusedError VENDOR_UNTRUSTED, WRONG_VENDOR, LICENSE_ABSENT, or
    CLOCK_SET_BACK for one that is older than what was taken in; DamagedError; StorageError.
    """
    try:
        reset, vendor = by_any(home.trusted(), lambda vendor: verified(raw, ClockReset, vendor))
    except RefusedError:
        unverified(raw, ClockReset)  # where it is no such document at all, that is the thing to say
        raise
    if reset.vendor != vendor.fingerprint:
        what = "The clock reset names another vendor than the one that signed it."
        raise RefusedError(Reason.WRONG_VENDOR, what, "Ask the vendor for one that its own keys sign.")
    licensed = next((i.license for i in home.licenses([vendor])[0] if i.license.grant.license == reset.license), None)
    if licensed is None:
        what = f"The clock reset is for the license {reset.license} by {vendor.name!r}, which is not installed here."
        raise RefusedError(Reason.LICENSE_ABSENT, what, "Install that license first, or take it to the right device.")
    with storage.exclusive(home.path):
        kept = _readable(home, licensed, vendor)
        if kept and kept.time > reset.time:
            what = f"The clock reset is of {_shown(reset)}; a later one, of {_shown(kept)}, is installed here."
            raise RefusedError(Reason.CLOCK_SET_BACK, what, "Nothing is to be done: the later one stays in force.")
        folder = _path(home.state, licensed).parent
        storage.make_folders(folder, 0o700)
        storage.atomic_write(folder / NAME, raw, 0o600)
    return reset


def pending(home: Home, licensed: License, vendor: VendorPublic) -> ClockReset | None:
    """The latest clock reset that was taken in for a license. Raises DamagedError HOME_DAMAGED."""
    found = [_read(path, licensed, vendor) for path in _paths(home, licensed)]
    return max(found, key=lambda reset: reset.time, default=None)


def _readable(home: Home, licensed: License, vendor: VendorPublic) -> ClockReset | None:
    """As `pending`, but a damaged one counts for nothing: it may be replaced."""
    try:
        return pending(home, licensed, vendor)
    except DamagedError:
        return None


def _read(path: Path, licensed: License, vendor: VendorPublic) -> ClockReset:
    hint = "Remove the file; if the device's time is still refused, ask the vendor for a new clock reset."
    try:
        reset = verified(storage.read_limited(path, FILE_LIMIT), ClockReset, vendor)
    except (DamagedError, RefusedError) as error:
        raise DamagedError(Reason.HOME_DAMAGED, f"{path} is damaged. {error.what}", hint) from error
    if (reset.license, reset.vendor) != (licensed.grant.license, vendor.fingerprint):
        raise DamagedError(Reason.HOME_DAMAGED, f"{path} is for another license, {reset.license}.", hint)
    return reset


def _paths(home: Home, licensed: License) -> list[Path]:
    paths = [_path(base, licensed) for base in (home.state, home.path)]  # one alone, where the home is its own state
    with storage.reporting(paths[0]):
        return [path for path in dict.fromkeys(paths) if path.exists()]


def _path(base: Path, licensed: License) -> Path:
    return base / "licenses" / licensed.grant.license / NAME


def _shown(reset: ClockReset) -> str:
    try:
        return f"{datetime.datetime.fromtimestamp(reset.time, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError):  # further off than dates go
        return f"{reset.time:,} s after 1970"
