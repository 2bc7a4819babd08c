"""GGUF: files of a package by path, for llama.cpp and others that map them. Nothing here needs a framework.

What maps such a file keeps its pages until it unmaps them, also when the model is closed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hwlicense.core.errors import Reason, StorageError, UsageError
from hwlicense.integrations.extras import check_model, extra

if TYPE_CHECKING:
    from collections.abc import Iterator

    import gguf

    from hwlicense.device.model import Model

MEMORY: Final = "/dev/shm"  # noqa: S108  # a folder of its own within, for links alone
PREFIX: Final = "hwlicense-gguf-"
_SPLIT = re.compile(r"(?P<start>.+)-(?P<number>\d{5})-of-(?P<count>(?!00000)\d{5})\.gguf")


def reader(model: Model, name: str | os.PathLike[str]) -> gguf.GGUFReader:
    """The fields and tensors of a member, by the library gguf, without a copy. Raises as `Model.read`, EXTRA_MISSING.

    A file that is malformed raises the library's own ValueError and IndexError.
    """
    with extra("gguf", "gguf"):
        import gguf  # noqa: PLC0415  # `path` does without
    check_model(model)
    return gguf.GGUFReader(model.path(name))


@contextmanager
def path(model: Model, name: str | os.PathLike[str]) -> Iterator[str]:
    """A path for a library that loads GGUF, such as llama.cpp, until the end of the block: load within it.

    Of a file in several parts, `name` is the first (NAME-00001-of-00003.gguf), and the others lie beside it, by their
    numbers alone: a folder of links into memory, in memory itself where that can be. A process that is killed leaves it
    with dead links; the next use removes it. Raises as `Model.read`, StorageError.
    """
    check_model(model)
    name = os.fspath(name)
    parts = _parts(name)
    if len(parts) == 1:
        yield model.path(name)
        return
    leading = [model.path(part) for part in parts]
    with ExitStack() as stack:
        folder = None
        try:
            folder = _folder(stack)
            for number, target in enumerate(leading, 1):
                (folder / f"part-{number:05}-of-{len(parts):05}.gguf").symlink_to(target)
        except OSError as error:
            where = folder or f"{MEMORY}, or where TMPDIR says"
            what = f"The links to the parts of {name!r} cannot be made in {where}: {error.strerror or error}."
            hint = f"Make room in {MEMORY}, or name a folder that can be written to in TMPDIR."
            raise StorageError(Reason.STORAGE, what, hint) from error
        yield str(folder / f"part-00001-of-{len(parts):05}.gguf")


def _folder(stack: ExitStack) -> Path:
    """A new one, in memory if that can be. Raises OSError."""
    try:
        return _made(MEMORY, stack)
    except OSError:  # it is absent, full or read-only; the links say nothing that a disk must not hold
        return _made(tempfile.gettempdir(), stack)


def _made(where: str, stack: ExitStack) -> Path:
    """A new one, until `stack` ends; those of processes that were killed are removed. Raises OSError."""
    for left in Path(where).glob(f"{PREFIX}*"):
        with suppress(OSError), _lock(left):  # in use, another user's, or removed meanwhile
            shutil.rmtree(left, ignore_errors=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=where))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        with suppress(BlockingIOError, FileNotFoundError):  # another process took it for one that was left
            stack.enter_context(_lock(folder))
            folder.stat()
            return folder


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold it, as the kernel does for no longer than the process lives. Raises OSError where another does."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(folder))
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _parts(name: str) -> list[str]:
    found = _SPLIT.fullmatch(name)
    if not found:
        return [name]
    if int(found["number"]) != 1:
        what = f"{name!r} is not the first of its parts."
        raise UsageError(Reason.USAGE, what, f"Give {found['start']}-00001-of-{found['count']}.gguf.")
    return [f"{found['start']}-{part:05}-of-{found['count']}.gguf" for part in range(1, int(found["count"]) + 1)]
