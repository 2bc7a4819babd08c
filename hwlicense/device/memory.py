"""Where keys and plaintext live: memory that is kept out of core dumps, swap and other processes, and zeroed after use.

A process that has any, or is about to, is not dumpable for the rest of its life (`forbid_dumps`): no core file, no
ptrace and no /proc/PID/mem for other processes of the same user, for a framework's own copies and for what opening
leaves in the ordinary heap as well. Pages are excluded from dumps (MADV_DONTDUMP), which a collector that runs as root
honours too, and locked (mlock(2)) as far as RLIMIT_MEMLOCK allows; where it does not, that is remembered and reported.
Keys lie, where the kernel has it, in memory that it does not map itself (memfd_secret(2), from Linux 5.14 on): no
/proc/PID/mem, ptrace or process_vm_readv reads it, root's neither. Its first use is slow, some 7 s for each GiB, so it
is for keys alone.

A forked child inherits everything but the locks. Such memory would be shared with it, and wiped for both: the child
moves to its own, from a copy that was made before the fork, as the parent may wipe at any moment after.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from hwlicense.core.errors import Reason, StorageError
from hwlicense.device.room import check_memory
from hwlicense.storage import HINTS, above_standard

if TYPE_CHECKING:
    from collections.abc import Callable

HUGE_PAGE: Final = 2 << 20
_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4
_MFD_NOEXEC_SEAL: Final = 8  # Linux 6.3; not among Python 3.11's constants
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = _libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = [ctypes.c_long, ctypes.c_ulong]
_MEMFD_SECRET, _MLOCK_ONFAULT = 447, 1  # the former on every architecture that has it
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


class Protection(NamedTuple):
    """How well this process guards the keys and plaintext that it holds now.

    `held`: bytes of them, of all models together. `locked`: how many of these stay out of swap; fewer where
    RLIMIT_MEMLOCK (`ulimit -l`) is too small. `dumpable`: whether core dumps and the same user's debuggers see the
    process. `secret`: how many bytes of keys lie in memory that only this process can read (memfd_secret(2)); 0 where
    the kernel does not give any. `swap`: whether the system swaps at all. `huge_pages`: the system's policy (always,
    madvise, never, or "" where it does not say).
    """

    held: int
    locked: int
    dumpable: bool
    secret: int
    swap: bool
    huge_pages: str

    @property
    def swappable(self) -> int:
        """How many of the bytes held may be swapped out."""
        return max(self.held - self.locked, 0) if self.swap else 0


def forbid_dumps() -> None:
    """Make this process not dumpable (PR_SET_DUMPABLE, prctl(2)), for good: nobody can know when the last copy is gone.

    Core files are switched off besides (the soft RLIMIT_CORE), as a change of user or group undoes the former where the
    system asks for that (fs.suid_dumpable).

    Plaintext lives on in mappings and copies of frameworks, and pieces of PINs and keys in freed heap. Whoever opens or
    installs calls this first; again changes nothing. Children inherit it by fork(2); execve(2) ends it, with all memory
    that it was for.
    """
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


class Memory:
    """Anonymous memory for keys or plaintext. `view` is writable until `wipe`, which zeroes it and gives it back."""

    def __init__(self, size: int, *, secret: bool = False) -> None:
        """`secret` is for keys: see above. Raises StorageError where the system has no `size` bytes left."""
        self.size = size
        forbid_dumps()
        check_memory(size)
        self._spare: Memory | None = None
        self._take(secret=secret)
        self.lent = self._wiped = False
        _remember(self)

    def _take(self, *, secret: bool) -> None:
        hidden = _secret(self.size) if secret else None
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._map = hidden or _mapped(-1, self.size, anonymous, mmap.PROT_READ | mmap.PROT_WRITE)
        self.secret = hidden is not None
        self.view = memoryview(self._map)[: self.size]
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        # Secret memory is never swapped; of other pages, faults then share out over the threads
        self.locked_by = os.getpid() if self.secret else _lock(self._address, self.size, _MLOCK_ONFAULT)

    def copy_before_fork(self) -> None:
        """What a child will move to. Nothing is copied of memory that a child does not share."""
        if self.secret and not self._wiped:
            with suppress(StorageError):  # the child then copies what is still there
                self._spare = Memory(self.size)
                self._spare.view[:] = self.view

    def forget_copy(self) -> None:
        """In the parent, after a fork."""
        spare, self._spare = self._spare, None
        if spare:
            spare.wipe()

    def after_fork_in_child(self) -> None:
        """In the child: to memory of its own, before anything is wiped there that the parent still uses."""
        if not self.secret:
            return
        before = self.view
        try:
            self._take(secret=True)
        except StorageError:  # it stays the parent's, who wipes it: here it is read, and left alone
            self._wiped = True
            return
        self.view[:] = self._spare.view if self._spare else before
        self.forget_copy()

    def wipe(self) -> None:
        """Zero it, even while someone still holds a view: only for what was never lent, or has come back."""
        if self._wiped:
            return
        self._wiped = True
        for start in range(0, self.size, HUGE_PAGE):
            size = min(HUGE_PAGE, self.size - start)
            ctypes.memset(self._address + start, 0, size)
            _libc.munlock(self._address + start, size)  # only now may it be swapped out
            # Zeroed pages go back at once: in a forked child, zeroing made a copy of each shared page.
            with suppress(OSError):
                self._map.madvise(mmap.MADV_DONTNEED, start, size)
        _forget(self)

    def __del__(self) -> None:
        if hasattr(self, "_wiped") and not self.lent:
            self.wipe()


def lend(memory: Memory) -> ctypes.Array[ctypes.c_ubyte]:
    """An object over `memory` whose buffers can be lent out: when it and the last of them are gone, memory is wiped.

    A memoryview, and whatever is built upon it (numpy.frombuffer, torch.frombuffer), keeps the object that it views
    alive. So its end is the moment at which nobody can see the bytes any more, and no buffer in use is ever zeroed.
    """
    memory.lent = True
    array = (ctypes.c_ubyte * memory.size).from_buffer(memory.view)
    # Not at exit: threads of a framework may still compute then, and the kernel clears pages before it reuses them.
    weakref.finalize(array, memory.wipe).atexit = False
    return array


class SealedFile:
    """A file in memory that nothing can change once it is filled (memfd_create(2)), for libraries that want a path.

    Its pages cannot be zeroed, as they are sealed and a library may map them beyond `close`: the kernel frees them with
    their last mapping, and clears them before reuse.
    """

    def __init__(self, size: int, fill: Callable[[memoryview], object]) -> None:
        """`fill` writes the content. Raises StorageError where memory or files are short."""
        self.size = size
        self.locked_by = 0
        self._map: mmap.mmap | None = None
        self.fd = -1
        forbid_dumps()
        check_memory(size)
        try:
            self.fd = memory_file()
            self.inode = os.fstat(self.fd).st_ino
            _fill(self.fd, size, fill)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map, self.locked_by = _locked_file(self.fd, size)
        except OSError as error:
            self.close()
            raise no_memory(size, error) from error
        except BaseException:
            self.close()
            raise
        _remember(self)

    @property
    def path(self) -> str:
        """Valid in this process and in what it forks, until `close`."""
        return f"/proc/self/fd/{self.fd}"

    def close(self) -> None:
        """Forget it. The kernel frees it when no library has it open or mapped any more."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
            self._map = None
            _forget(self)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            self.close()


class MountedFile:
    """A file on a file system that is memory, kept out of swap while this lives: by a lock, or by its mount."""

    def __init__(self, fd: int, size: int, fill: Callable[[memoryview], object], *, swappable: bool) -> None:
        """`fd`, open for reading and writing, is taken over. Raises StorageError where memory is short."""
        self.size = size
        self._map: mmap.mmap | None = None
        self.locked_by = os.getpid()
        forbid_dumps()
        reading = -1
        try:
            _fill(fd, size, fill)
            if swappable:
                # A mapping keeps the descriptor that it is made with: one that writes would forbid a read-only mount.
                reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
                self._map, self.locked_by = _locked_file(reading, size)
        except OSError as error:
            raise no_memory(size, error) from error
        finally:
            os.close(fd)
            if reading >= 0:
                os.close(reading)
        _remember(self)


def protection() -> Protection:
    """What guards the memory of this process now."""
    with _guard:
        alive = list(_alive)
    return Protection(
        held=sum(one.size for one in alive),
        locked=sum(one.size for one in alive if one.locked_by == os.getpid()),  # locks do not pass on to a child
        dumpable=_libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 1,
        secret=sum(one.size for one in alive if isinstance(one, Memory) and one.secret),
        swap=len(_kernel_says("/proc/swaps").splitlines()) > 1,
        huge_pages=_kernel_says("/sys/kernel/mm/transparent_hugepage/enabled").partition("[")[2].partition("]")[0],
    )


_guard = threading.RLock()  # reentrant: the collector may run a finalizer inside
_alive: weakref.WeakSet[Memory | SealedFile | MountedFile] = weakref.WeakSet()


def _remember(one: Memory | SealedFile | MountedFile) -> None:
    with _guard:
        _alive.add(one)


def _forget(one: Memory | SealedFile) -> None:
    with _guard:
        _alive.discard(one)


def _mapped(fd: int, size: int, flags: int, protection_: int) -> mmap.mmap:
    try:
        made = mmap.mmap(fd, size, flags, protection_)
    except OSError as error:
        raise no_memory(size, error) from error
    advice = [mmap.MADV_DONTDUMP, *([mmap.MADV_HUGEPAGE] if size >= HUGE_PAGE else [])]
    for each in advice:
        with suppress(OSError):  # a kernel without huge pages is slower, and one without MADV_DONTDUMP is not dumpable
            made.madvise(each)
    return made


def _secret(size: int) -> mmap.mmap | None:
    """Memory that the kernel does not map itself; None where it has none to give, for whatever reason."""
    fd = _libc.syscall(_MEMFD_SECRET, os.O_CLOEXEC)
    if fd < 0:
        return None
    try:
        os.ftruncate(fd, size)
        return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError:  # above all, RLIMIT_MEMLOCK
        return None
    finally:
        os.close(fd)


def sealed_inodes() -> frozenset[int]:
    """The inodes of the sealed files that this process holds: what is mapped of them came out of a package."""
    with _guard:
        alive = list(_alive)
    return frozenset(one.inode for one in alive if isinstance(one, SealedFile))


def memory_file() -> int:
    """A descriptor of an empty file that is nowhere but in memory, and can be sealed. Raises OSError."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return above_standard(os.memfd_create("hwlicense", flags | _MFD_NOEXEC_SEAL))
    except OSError as error:
        if error.errno != errno.EINVAL:  # so says a kernel before 6.3
            raise
        return above_standard(os.memfd_create("hwlicense", flags))


def _fill(fd: int, size: int, fill: Callable[[memoryview], object]) -> None:
    if size:
        os.ftruncate(fd, size)
        writable = _mapped(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        os.posix_fallocate(fd, 0, size)  # where memory is short, an error here and no SIGBUS in `fill`
        fill(memoryview(writable))
        writable.close()  # what then forbids writing waits for it


def _locked_file(fd: int, size: int) -> tuple[mmap.mmap | None, int]:
    """A mapping that keeps a file's pages locked while it lives, and by which process; None and 0 where none may."""
    if not size:
        return None, 0
    locked = _mapped(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    locked_by = _lock(_address_of(locked), size)
    return (locked if locked_by else None), locked_by


def mapped_content(fd: int, size: int) -> mmap.mmap:
    """The content of a `SealedFile` of another process, which handed its descriptor over. Raises StorageError."""
    forbid_dumps()
    made = _mapped(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    _lock(_address_of(made), size)  # locks do not pass on
    return made


def _lock(address: int, size: int, flags: int = 0) -> int:
    """The process that locked the pages, or 0 where the limit forbids it."""
    if flags and hasattr(_libc, "mlock2"):
        failed = _libc.mlock2(ctypes.c_void_p(address), ctypes.c_size_t(size), flags)
    else:
        failed = _libc.mlock(address, size)
    return 0 if failed else os.getpid()


def _address_of(readable: mmap.mmap) -> int:
    """Where a read-only mapping lies; ctypes itself takes writable buffers only."""
    view = ctypes.py_object(readable)
    buffer = (ctypes.c_void_p * 16)()  # Py_buffer (PEP 3118) begins with the address, and is under 16 pointers long
    ctypes.pythonapi.PyObject_GetBuffer(view, ctypes.byref(buffer), 0)
    try:
        return buffer[0] or 0
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))


def no_memory(size: int, error: OSError) -> StorageError:
    """The error for memory, or a file in it, that the system does not give."""
    if error.errno in {errno.ENOMEM, errno.ENOSPC}:  # the latter from a file in memory
        what = f"The system has no {size:,} bytes of memory left for the model."
        return StorageError(Reason.STORAGE, what, "Free some memory, or read the member in parts with `model.open`.")
    what = f"The system gives no memory of {size:,} bytes for the model: {error.strerror or error}."
    hint = HINTS.get(error.errno or 0, "Check the limits of the process (`ulimit -a`).")
    return StorageError(Reason.STORAGE, what, hint)


def _kernel_says(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # hidden in some containers
        return ""


_forking = threading.RLock()
"""Held over a fork: two threads that fork at once would take each other's copies."""


def _before_fork() -> None:
    _forking.acquire()
    with _guard:
        alive = list(_alive)
    for one in alive:
        if isinstance(one, Memory):
            one.copy_before_fork()


def _after_fork_in_parent() -> None:
    with _guard:
        alive = list(_alive)
    for one in alive:
        if isinstance(one, Memory):
            one.forget_copy()
    _forking.release()


def _after_fork_in_child() -> None:
    global _guard, _forking  # another thread may have held the first
    _guard, _forking = threading.RLock(), threading.RLock()
    for one in list(_alive):
        if isinstance(one, Memory):
            one.after_fork_in_child()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
