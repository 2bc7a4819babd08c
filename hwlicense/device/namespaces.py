"""Namespaces of one's own, and memory mounted where only they see it: what Python 3.11 has no calls for."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Final

_NEW_MOUNTS, _NEW_USERS, _NEW_PROCESSES = 0x20000, 0x10000000, 0x20000000
_READ_ONLY, _NO_SETUID, _NO_DEVICES, _NO_EXECUTION = 1, 2, 4, 8
_REMOUNT, _RECURSIVE, _PRIVATE = 0x20, 0x4000, 0x40000
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36

_TMPFS: Final = 0x01021994
_libc = ctypes.CDLL(None, use_errno=True)
_libc.unshare.argtypes = [ctypes.c_int]
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


def leave() -> None:
    """Enter a new mount namespace; what this process forks from now on lives in a new process namespace.

    Who may not do that does it in a new user namespace, with no user and group but its own. Raises OSError.
    """
    try:
        _checked(_libc.unshare(_NEW_MOUNTS | _NEW_PROCESSES))
    except PermissionError:
        user, group = os.geteuid(), os.getegid()
        _checked(_libc.unshare(_NEW_MOUNTS | _NEW_PROCESSES | _NEW_USERS))
        Path("/proc/self/setgroups").write_text("deny")  # what the kernel asks for before it maps a group
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def separate() -> None:
    """As the first process of the new namespaces: pass no mount on to others, take none, and see one's own processes.

    Raises OSError.
    """
    _mount(None, "/", None, _RECURSIVE | _PRIVATE)
    try:
        _mount("proc", "/proc", "proc", _NO_SETUID | _NO_DEVICES | _NO_EXECUTION)
    except OSError as error:
        if error.errno not in {
            errno.EPERM,
            errno.EACCES,
        }:  # in a container that hides parts of /proc, the old one stays
            raise


def mount_memory(folder: int, size: int, files: int, *, executable: bool) -> bool:
    """Mount memory of `size` bytes, in so many files, on an open folder. True where it stays out of swap.

    Raises OSError.
    """
    flags = _NO_SETUID | _NO_DEVICES | (0 if executable else _NO_EXECUTION)
    options = f"mode=0700,size={size},nr_inodes={files}"
    target = f"/proc/self/fd/{folder}"  # the folder that was looked at, whatever its path leads to by now
    try:
        _mount("hwlicense", target, "tmpfs", flags, f"{options},noswap")
    except OSError as error:
        if error.errno != errno.EINVAL:  # so says a kernel before 6.3, and any to who is in a user namespace
            raise
        _mount("hwlicense", target, "tmpfs", flags, options)
        return False
    return True


def make_read_only(folder: int, *, executable: bool) -> None:
    """End writing below what was mounted. Raises OSError, EBUSY while a file is open for writing."""
    flags = _NO_SETUID | _NO_DEVICES | (0 if executable else _NO_EXECUTION)
    _mount(None, f"/proc/self/fd/{folder}", None, _REMOUNT | _READ_ONLY | flags)


def signal_from_parents_end(number: int) -> None:
    """Have the kernel send this process a signal when its parent ends. Raises OSError."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0))


def adopt_orphans() -> None:
    """Become the parent of those descendants whose own parents end. Raises OSError."""
    _checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    given = (None if text is None else text.encode() for text in (source, target, kind))
    _checked(_libc.mount(*given, flags, options.encode()))


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def in_memory(fd: int) -> bool:
    """Whether a descriptor is of a tmpfs: `f_type` of struct statfs, its first field."""
    found = ctypes.create_string_buffer(256)  # larger than the structure of any architecture
    _checked(_libc.fstatfs(fd, found))
    return bool(ctypes.cast(found, ctypes.POINTER(ctypes.c_ulong))[0] == _TMPFS)
