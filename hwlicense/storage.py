"""Files, read within limits and written whole or not at all.

A new file has no name until it is complete and on the disk (O_TMPFILE, open(2)): a crash, a full disk or SIGKILL leaves
what was there before. File systems without unnamed files (vfat, NFS) get a hidden name beside the final one instead,
removed on every failure that the process survives. Every OSError leaves here as UsageError or StorageError.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Self

from hwlicense.core.errors import DamagedError, Reason, StorageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HINTS: Final = {
    errno.ENOSPC: "Free some space, or write to another disk.",
    errno.EDQUOT: "The user's quota is used up: free some space, or write to another disk.",
    errno.EFBIG: "The file would be larger than the file system or the process may write (see `ulimit -f`).",
    errno.EROFS: "The file system is read-only: write elsewhere, or mount it writable.",
    errno.EACCES: "Check the permissions of the file and of every folder above it.",
    errno.EPERM: "Check the permissions of the file and of every folder above it.",
    errno.EIO: "The disk failed: look at the kernel's log, and restore the file from a copy.",
    errno.EMFILE: "The process has too many files open (see `ulimit -n`).",
    errno.ENFILE: "The system has too many files open: end some programs.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}
_STANDARD_ERROR: Final = 2
_NO_UNNAMED_FILES: Final = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}
_NO_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}


class OpenFile:
    """A regular file, open for reading at any place. It has no position, so threads and forked processes share it.

    Raises UsageError FILE_ABSENT, StorageError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reporting(path):
            # O_NONBLOCK: opening a FIFO must not wait for its other end
            self.fd = above_standard(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        try:
            self.status = _regular(self.fd, path)
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Bytes in the file when it was opened."""
        return self.status.st_size

    def read(self, size: int, offset: int) -> bytes:
        """`size` bytes from `offset`; fewer only where the file ends before. Callers bound `size`."""
        buffer = bytearray(size)
        return bytes(memoryview(buffer)[: self.read_into(buffer, offset)])

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill `buffer` from `offset`; the bytes read, fewer only where the file ends before."""
        view, done = memoryview(buffer), 0
        with reporting(self.path):
            while done < len(view) and (got := os.preadv(self.fd, [view[done:]], offset + done)):
                done += got
        return done

    def close(self) -> None:
        """Close the descriptor; reading fails from then on."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def above_standard(fd: int) -> int:
    """The same file under a number above 2. A daemon may have closed those: what is then printed would land in it."""
    if fd > _STANDARD_ERROR:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _STANDARD_ERROR + 1)
    finally:
        os.close(fd)


def read_limited(path: Path, limit: int) -> bytes:
    """The whole of a regular file of at most `limit` bytes.

    Raises UsageError FILE_ABSENT, DamagedError DOCUMENT_TOO_LARGE before anything is read, StorageError.
    """
    with OpenFile(path) as file:
        data = file.read(min(file.size, limit) + 1, 0)  # one more than it should have: it may be growing
    if file.size > limit or len(data) > limit:
        what = f"{path} is larger than {limit:,} bytes."
        raise DamagedError(Reason.DOCUMENT_TOO_LARGE, what, "Check the file's name.")
    if len(data) != file.size:
        raise StorageError(Reason.STORAGE, f"{path} changed while it was read.", "Try again when nothing writes to it.")
    return data


def atomic_write(path: Path, data: bytes, mode: int = 0o600, *, force: bool = True) -> None:
    """Write `data` under `path`, on the disk when this returns; whoever reads sees the old file or the new one."""
    with new_file(path, mode, force=force) as file:
        file.write(data)


@contextmanager
def new_file(path: Path, mode: int = 0o644, *, force: bool = False) -> Iterator[BinaryIO]:
    """A file that gets its name, and its old namesake replaced, when the block ends well; otherwise nothing remains.

    `mode` is subject to the umask. Raises UsageError FILE_EXISTS unless `force`, FILE_ABSENT for a missing folder, and
    StorageError. A symbolic link of that name is replaced, not followed.
    """
    with reporting(path):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _check_target(path, force=force)
            fd, hidden = _create(folder, path.name, mode)
            try:
                with os.fdopen(fd, "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(fd)
                    hidden = _publish(fd, folder, hidden, path.name, force=force)
                try:
                    _sync(folder)
                except OSError:
                    if not force:  # who tries again must not find its own file in the way
                        with suppress(OSError):
                            os.unlink(path.name, dir_fd=folder)
                    raise
            finally:
                if hidden:
                    with suppress(FileNotFoundError):
                        os.unlink(hidden, dir_fd=folder)
        finally:
            os.close(folder)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """All of `data` at `offset`; several threads may write to one file. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder (mode 0700) that takes its name, whole, when the block ends well; otherwise nothing remains.

    The block writes into the folder that it is given. Raises UsageError FILE_EXISTS unless `path` is absent or an empty
    folder, USAGE for one that cannot be replaced, and StorageError. Missing parents are made, and stay.
    """
    make_folders(path.parent)
    with reporting(path):
        if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
            raise _used(path)
        target = path.resolve()  # "." has no name to be taken
        if target == Path.cwd():  # the caller's shell would be left in the folder that was replaced
            what = f"{path} is the current folder, which cannot be replaced by a new one."
            raise UsageError(Reason.USAGE, what, f"Go to the folder above it, and give {target.name!r} as the path.")
        building = target.parent / _hidden_name(target.name)
        building.mkdir(mode=0o700)
        try:
            yield building
            for folder in (*(entry for entry in building.rglob("*") if entry.is_dir()), building):
                sync_folder(folder)
            _rename_folder(building, target)
            sync_folder(target.parent)
        except BaseException:
            from shutil import rmtree  # noqa: PLC0415  # slow to import, and for failures alone

            rmtree(building, ignore_errors=True)
            raise


def make_folders(path: Path, mode: int = 0o700) -> None:
    """Make `path` and what is missing above it, on the disk when this returns. Existing folders stay as they are."""
    with reporting(path):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        with reporting(folder), suppress(FileExistsError):  # another process made it meanwhile
            folder.mkdir(mode)
            sync_folder(folder.parent)
    if not path.is_dir():
        raise UsageError(Reason.USAGE, f"{path} is not a folder.", "Give the path of a folder.")


@contextmanager
def exclusive(path: Path, seconds: float | None = None) -> Iterator[None]:
    """Let one process at a time work in the folder `path`; others wait. The kernel lets go when a process dies.

    Raises StorageError where it took longer than so many `seconds`, or cannot be locked at all.
    """
    with reporting(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if seconds is None:
            taken(fd, path, wait=True)
        elif not patiently(lambda: taken(fd, path), seconds):
            raise busy(path, seconds)
        try:
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # also for the copy that a child forked meanwhile may hold
    finally:
        os.close(fd)


def taken(fd: int, path: Path, how: int = fcntl.LOCK_EX, *, wait: bool = False) -> bool:
    """Whether a file is locked for its descriptor now. Raises StorageError where it cannot be locked at all."""
    try:
        fcntl.flock(fd, how if wait else how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        hint = "Keep it on a local disk: some network file systems lock no files or folders."
        raise StorageError(Reason.STORAGE, f"{path} cannot be locked: {error.strerror}.", hint) from error
    return True


def patiently(tried: Callable[[], bool], seconds: float) -> bool:
    """Whether `tried` gave True within so many seconds; without any, at once."""
    give_up, pause = 0.0, 0.00005
    while not tried():
        now = time.monotonic()
        give_up = give_up or now + seconds
        if now >= give_up:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.005)
    return True


def busy(path: Path, seconds: float) -> StorageError:
    """What is said of a file or folder that another has locked for so long."""
    what = f"{path} has been locked for {seconds:g} s."
    return StorageError(Reason.STORAGE, what, "See which process works there (`lsof`).")


def check_room(folder: Path, size: int) -> None:
    """See whether a file of `size` bytes could be written there; nothing of it remains. Raises StorageError."""
    with reporting(folder):
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd, hidden = _create(at, "room", 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
            finally:
                os.close(fd)
                if hidden:
                    os.unlink(hidden, dir_fd=at)
        finally:
            os.close(at)


def remove(path: Path) -> None:
    """Remove a file, on the disk when this returns. One that is absent is no error."""
    with reporting(path), suppress(FileNotFoundError):
        path.unlink()
        sync_folder(path.parent)


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Turn an OSError about `path` into an error of the tree."""
    try:
        yield
    except FileNotFoundError as error:
        missing = path if path.parent.is_dir() else path.parent
        raise UsageError(Reason.FILE_ABSENT, f"{missing} does not exist.", "Check the path.") from error
    except NotADirectoryError as error:
        raise UsageError(Reason.USAGE, f"{path}: a part of this path is not a folder.", "Check the path.") from error
    except FileExistsError as error:
        hint = "Give another name, or --force to replace it."
        raise UsageError(Reason.FILE_EXISTS, f"{path} exists already.", hint) from error
    except IsADirectoryError as error:
        raise UsageError(Reason.USAGE, f"{path} is a folder, not a file.", "Give the path of a file.") from error
    except OSError as error:
        what, hint = f"{path}: {error.strerror or error}.", HINTS.get(error.errno or 0, "Check the path and the disk.")
        raise StorageError(Reason.STORAGE, what, hint) from error


def _rename_folder(building: Path, target: Path) -> None:
    try:
        building.rename(target)  # rename(2) replaces a folder only while it is empty
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
            raise _used(target) from error
        if error.errno in {errno.EBUSY, errno.EXDEV}:
            what = f"{target} cannot be replaced by a new folder: something is mounted there."
            raise UsageError(Reason.USAGE, what, "Give the path of a new folder inside it.") from error
        raise


def _used(path: Path) -> UsageError:
    hint = "Give another folder, or remove what is in it."
    return UsageError(Reason.FILE_EXISTS, f"{path} exists already and is not an empty folder.", hint)


def _regular(fd: int, path: Path) -> os.stat_result:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(Reason.USAGE, f"{path} is not a regular file.", "Give the path of a file.")
    return status


def _check_target(path: Path, *, force: bool) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):  # a rename over /dev/null would go through
        raise UsageError(Reason.USAGE, f"{path} exists and is not a regular file.", "Give the path of a file.")
    if not force:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _create(folder: int, name: str, mode: int) -> tuple[int, str]:
    """A new file in `folder`: its descriptor, and its hidden name where it cannot do without one."""
    if Path("/proc/self/fd").is_dir():  # only through there does an unnamed file get its name without privilege
        try:
            return above_standard(os.open(".", os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, mode, dir_fd=folder)), ""
        except OSError as error:
            if error.errno not in _NO_UNNAMED_FILES:
                raise
    hidden = _hidden_name(name)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return above_standard(os.open(hidden, flags, mode, dir_fd=folder)), hidden


def _publish(fd: int, folder: int, hidden: str, name: str, *, force: bool) -> str:
    """Give the file its name. Returns the hidden name that is left to remove."""
    unnamed = f"/proc/self/fd/{fd}"
    if not force:  # link(2), unlike rename(2), refuses to replace what appeared meanwhile
        try:
            os.link(hidden or unnamed, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=not hidden)
        except OSError as error:
            if not hidden or error.errno not in _NO_LINKS:
                raise
        else:
            return hidden
        _check_target(Path(f"/proc/self/fd/{folder}", name), force=False)
    if not hidden:
        hidden = _hidden_name(name)
        os.link(unnamed, hidden, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
    try:
        os.rename(hidden, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(FileNotFoundError):  # where it was renamed, and then interrupted
            os.unlink(hidden, dir_fd=folder)
        raise
    return ""


def _hidden_name(name: str) -> str:
    return f".{name[:100]}.{secrets.token_hex(8)}"


def sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _sync(folder)
    finally:
        os.close(folder)


def _sync(folder: int) -> None:
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # FUSE and CIFS file systems that cannot sync a folder
            raise
