"""GGUF: files of a package by path, for llama.cpp and others that map them. Nothing here needs a framework.

What maps such a file keeps its pages until it unmaps them, also when the model is closed.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from hwlicense.core.errors import Reason, StorageError, UsageError
from hwlicense.integrations.extras import extra
from hwlicense.storage import HINTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    import gguf

    from hwlicense.device.model import Model

MEMORY: Final = "/dev/shm"  # noqa: S108  # a folder of its own within, for names alone
_SPLIT = re.compile(r"(?P<start>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def reader(model: Model, name: str) -> gguf.GGUFReader:
    """The fields and tensors of a member, by the library gguf, without a copy. Raises as `Model.read`, EXTRA_MISSING.

    A file that is malformed raises the library's own ValueError and IndexError.
    """
    with extra("gguf", "gguf"):
        import gguf  # noqa: PLC0415  # `path` does without
    return gguf.GGUFReader(model.path(name))


@contextmanager
def path(model: Model, name: str) -> Iterator[str]:
    """A path for a library that loads GGUF, such as llama.cpp, until the end of the block: load within it.

    Of a file in several parts, `name` is the first (NAME-00001-of-00003.gguf), and the others lie beside it: a folder
    of links into memory, in memory itself. Raises as `Model.read`, StorageError.
    """
    parts = _parts(name)
    if len(parts) == 1:
        yield model.path(name)
        return
    leading = {PurePosixPath(part).name: model.path(part) for part in parts}
    with ExitStack() as stack:
        try:
            folder = Path(tempfile.mkdtemp(prefix="hwlicense-", dir=MEMORY if Path(MEMORY).is_dir() else None))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            for part, target in leading.items():
                (folder / part).symlink_to(target)
        except OSError as error:
            what = f"The links to the parts of {name!r} cannot be made: {error.strerror or error}."
            raise StorageError(Reason.STORAGE, what, HINTS.get(error.errno or 0, f"Look at {MEMORY}.")) from error
        yield str(folder / PurePosixPath(name).name)


def _parts(name: str) -> list[str]:
    found = _SPLIT.fullmatch(name)
    if not found:
        return [name]
    if int(found["number"]) != 1:
        what = f"{name!r} is not the first of its parts."
        raise UsageError(Reason.USAGE, what, f"Give {found['start']}-00001-of-{found['count']}.gguf.")
    return [f"{found['start']}-{part:05}-of-{found['count']}.gguf" for part in range(1, int(found["count"]) + 1)]
