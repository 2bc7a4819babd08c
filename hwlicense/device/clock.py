"""This machine's clocks, and which boot it is."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import time
import uuid
from pathlib import Path
from typing import Final

from hwlicense.core.errors import Reason, RefusedError
from hwlicense.storage import reporting

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
PROC: Final = Path("/proc")

_PROC_MAGIC: Final = 0x9FA0  # f_type of procfs (statfs(2))
_OPENAT2: Final = 437  # the system call's number on every architecture
_NO_XDEV, _NO_MAGICLINKS = 0x01, 0x02  # of struct open_how (openat2(2)): nothing is mounted over what is opened

_libc = ctypes.CDLL(None, use_errno=True)


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
        shared = _shared()
    except NotImplementedError:  # a kernel without time namespaces
        return
    except (OSError, ValueError) as error:
        what = f"Whether the process has the machine's clocks cannot be told from {PROC} ({error})."
        hint = "Mount the kernel's own /proc with nothing over it, and allow the system call openat2."
        raise RefusedError(Reason.CLOCK_SET_BACK, what, hint) from error
    if not shared:
        what = "The process runs in a time namespace whose clocks are not the machine's (time_namespaces(7))."
        raise RefusedError(Reason.CLOCK_SET_BACK, what, "Run it outside of that namespace.")


def _shared() -> bool:
    """Raises OSError, ValueError where something covers the kernel's word, NotImplementedError where it has none."""
    proc = os.open(PROC, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _kind(proc) != _PROC_MAGIC:
            raise ValueError("no procfs is mounted there")
        if not _of_children(proc):
            return False
        with open(_uncovered(proc, "self/timens_offsets", os.O_RDONLY), encoding="ascii") as file:
            return not any(int(word) for line in file for word in line.split()[1:])
    finally:
        os.close(proc)


def _of_children(proc: int) -> bool:
    """Whether children get this process's time namespace: the offsets that the kernel shows are theirs."""
    own = _uncovered(proc, "self/ns", os.O_PATH | os.O_DIRECTORY)
    try:
        return os.readlink("time", dir_fd=own) == os.readlink("time_for_children", dir_fd=own)
    except FileNotFoundError:
        raise NotImplementedError from None
    finally:
        os.close(own)


def _uncovered(folder: int, name: str, flags: int) -> int:
    """A descriptor of a file on the file system of `folder` itself. Raises OSError: EXDEV where another covers it."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, _NO_XDEV | _NO_MAGICLINKS)
    fd = _libc.syscall(_OPENAT2, folder, name.encode(), how, len(how))
    if fd < 0:
        number = ctypes.get_errno()
        if number == errno.ENOSYS:  # before Linux 5.6, which has time namespaces, too
            raise NotImplementedError
        raise OSError(number, os.strerror(number))
    return int(fd)


def _kind(fd: int) -> int:
    """What kind of file system a descriptor is on: `f_type` of struct statfs, its first field."""
    found = ctypes.create_string_buffer(256)  # larger than the structure of any architecture
    if _libc.fstatfs(fd, found):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(ctypes.cast(found, ctypes.POINTER(ctypes.c_ulong))[0])


def boot_name() -> str:
    """The kernel's name for this boot, which no other has. Raises StorageError."""
    with reporting(BOOT_ID):
        return BOOT_ID.read_text("ascii").strip()


def boot_identifier() -> tuple[int, int]:
    """Two numbers of 63 bits that no other boot has. Raises StorageError."""
    value = uuid.UUID(boot_name()).int
    return value >> 65, value & (1 << 63) - 1
