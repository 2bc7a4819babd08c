"""Data files of sealed code, as importlib.resources gives them; `as_file` gives paths to memory, never to a file."""

from __future__ import annotations

import errno
import importlib.resources
import io
import os
from contextlib import contextmanager
from importlib.resources.abc import Traversable, TraversableResources
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hwlicense.core.errors import Reason, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hwlicense.device.sealed_code import Source


def read(source: Source, path: str) -> bytes:
    """A data file. Raises FileNotFoundError, IsADirectoryError, and as the model reads."""
    if path in source.tree.folders:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if path not in source.tree.files or _module(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return bytes(source.read(path))


class Reader(TraversableResources):
    """The resources of one package."""

    def __init__(self, source: Source, folder: str) -> None:
        self._source, self._folder = source, folder

    def files(self) -> Resource:
        """The package's folder."""
        return Resource(self._source, self._folder)


class Resource(Traversable):
    """A file or folder of the code. Bytecode and native modules are not shown: they are imported."""

    def __init__(self, source: Source, path: str) -> None:
        self.source, self.path = source, path

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition("/")[2]

    def iterdir(self) -> Iterator[Resource]:
        """What a folder holds, in order. Raises NotADirectoryError."""
        if not self.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self.path)
        names = sorted(self.source.tree.folders[self.path])
        return iter([self / name for name in names if not _module(name)])

    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return self.path in self.source.tree.folders

    def is_file(self) -> bool:
        """Whether it is a data file."""
        return self.path in self.source.tree.files and not _module(self.path)

    def joinpath(self, *descendants: str | os.PathLike[str]) -> Resource:
        """What lies below. A path that leads up or away is one of nothing."""
        parts = [self.path, *(os.fspath(each) for each in descendants)]
        return Resource(self.source, "/".join(part for part in parts if part))

    def __truediv__(self, child: str | os.PathLike[str]) -> Resource:
        return self.joinpath(child)

    def read_bytes(self) -> bytes:
        """A copy of the content. Raises FileNotFoundError, IsADirectoryError, and as the model reads."""
        return read(self.source, self.path)

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """The content as text, in UTF-8 unless told otherwise. Raises as `read_bytes`."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def open(self, mode: str = "r", *args: Any, **options: Any) -> IO[Any]:  # noqa: ANN401  # as TextIOWrapper takes them
        """The content as a file for reading, `r` or `rb`. Raises as `read_bytes`, ValueError."""
        if mode not in {"r", "rt", "rb"}:
            raise ValueError(f"mode {mode!r}: sealed files are read, with 'r' or 'rb'")
        content = io.BytesIO(self.read_bytes())
        return content if mode == "rb" else io.TextIOWrapper(content, *args, **options)

    def __repr__(self) -> str:
        return f"<sealed {self.path}>"


@contextmanager
def _as_file(resource: Resource) -> Iterator[Path]:
    """A path to sealed memory, while the package is open. Raises UsageError for a folder."""
    if resource.is_dir():
        what = f"{resource.path} is a folder of the sealed code, which cannot be given as files."
        raise UsageError(Reason.USAGE, what, "Ask for its files one by one.")
    if not resource.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), resource.path)
    yield Path(resource.source.path(resource.path))


importlib.resources.as_file.register(Resource)(_as_file)  # type: ignore[attr-defined]  # documented to be a singledispatch


def _module(path: str) -> bool:
    return path.endswith((".pyc", ".so"))
