"""Clock resets: the vendor's word for what time it is, for a device that remembers a time that was wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hwlicense.core.documents import ClockReset
from hwlicense.core.envelope import seal
from hwlicense.core.schema import SCHEMA, check

if TYPE_CHECKING:
    import datetime

    from hwlicense.core.documents import License
    from hwlicense.vendor.signing import Keys


def reset_clock(keys: Keys, licensed: License, now: datetime.datetime) -> tuple[ClockReset, bytes]:
    """A clock reset for the device of a license of this vendor, and its envelope. `now` is in UTC; UsageError."""
    reset = ClockReset(SCHEMA, licensed.grant.vendor, licensed.grant.license, int(now.timestamp()))
    check(reset)
    return reset, seal(reset, keys.signers)
