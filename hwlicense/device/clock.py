"""This machine's clocks, and which boot it is."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Final

from hwlicense.core.errors import Reason, RefusedError
from hwlicense.storage import reporting

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
OFFSETS: Final = Path("/proc/self/timens_offsets")


def wall() -> int:
    """Seconds since 1970, UTC, as far as anyone has set the clock."""
    return int(time.time())


def boot_time() -> int:
    """Nanoseconds since the boot, suspension included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def running_time() -> int:
    """Nanoseconds since the boot, suspension left out: what a TPM counts at the least."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def check_shared() -> None:
    """Raises RefusedError CLOCK_SET_BACK where this process's time since the boot is not the machine's."""
    try:
        offsets = OFFSETS.read_text("ascii").split()
    except (OSError, ValueError):  # a kernel without time namespaces
        return
    if any(word.lstrip("-").isdigit() and int(word) for word in offsets):
        what = "The process runs in a time namespace whose clocks are not the machine's (time_namespaces(7))."
        raise RefusedError(Reason.CLOCK_SET_BACK, what, "Run it outside of that namespace.")


def boot_name() -> str:
    """The kernel's name for this boot, which no other has. Raises StorageError."""
    with reporting(BOOT_ID):
        return BOOT_ID.read_text("ascii").strip()


def boot_identifier() -> tuple[int, int]:
    """Two numbers of 63 bits that no other boot has. Raises StorageError."""
    value = uuid.UUID(boot_name()).int
    return value >> 65, value & (1 << 63) - 1
