"""Sealed code for processes that multiprocessing starts afresh, by spawn or forkserver.

Such a child begins by unpickling what the parent tells it, `sys.path` first. So the importer's entry there hands the
decrypted code over, and only code: in a file in sealed memory whose descriptor multiprocessing passes on. The model,
its keys and its members stay with the parent, and no second opening is spent. Whatever else pickles `sys.path` gets
text.

The file is a u32 (little-endian), so many bytes of JSON (identity, root, and names with sizes), then the files.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from typing import TYPE_CHECKING, Any

from hwlicense.core import code
from hwlicense.device.memory import SealedFile, mapped_content

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwlicense.device.sealed_code import Importer, Source


class PathEntry(str):
    """The importer's entry in `sys.path`, and its way into a child."""

    __slots__ = ("importer",)

    importer: weakref.ref[Importer]

    def __reduce__(self) -> tuple[Callable[..., str], tuple[Any, ...]]:
        context = sys.modules.get("multiprocessing.context")
        popen, importer = context.get_spawning_popen() if context else None, self.importer()
        if popen is None or importer is None or importer not in sys.meta_path:
            return str, (str(self),)
        from multiprocessing.reduction import DupFd  # noqa: PLC0415  # it is being used

        file = importer.handed.to(popen)
        return _received, (DupFd(file.fd), file.size)


class Handed:
    """The file that is handed over, while a child lives that has it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._files: weakref.WeakKeyDictionary[object, SealedFile] = weakref.WeakKeyDictionary()

    def to(self, popen: object) -> SealedFile:
        """The code for the child that `popen` starts. Raises what importing it here would."""
        self._source.check()
        file = next(iter(self._files.values()), None) or self._written()
        self._files[popen] = file  # its descriptor must be open until the child is started, which is later
        return file

    def _written(self) -> SealedFile:
        source = self._source
        contents = {name: source.read(name) for name in sorted(source.tree.files) if _wanted(source, name)}
        sizes = {name: len(content) for name, content in contents.items()}
        head = json.dumps({"identity": source.identity, "root": source.root, "sizes": sizes}).encode()
        pieces: list[bytes | memoryview] = [len(head).to_bytes(4, "little"), head, *contents.values()]

        def fill(view: memoryview) -> None:
            at = 0
            for piece in pieces:
                view[at : at + len(piece)] = piece
                at += len(piece)

        return SealedFile(sum(map(len, pieces)), fill)


class HandedCode:
    """The code that the parent handed over."""

    def __init__(self, fd: int, size: int) -> None:
        from hwlicense.device.sealed_code import SUFFIXES  # noqa: PLC0415  # which imports this module

        self._view = memoryview(mapped_content(fd, size))
        at = 4 + int.from_bytes(self._view[:4], "little")
        head = json.loads(bytes(self._view[4:at]))
        self.identity: str = head["identity"]
        self.root: str = head["root"]
        self._places: dict[str, tuple[int, int]] = {}
        for name, length in head["sizes"].items():
            self._places[name] = at, at + length
            at += length
        self.tree = code.Tree((code.FOLDER + name for name in self._places), SUFFIXES)
        self._files: dict[str, SealedFile] = {}

    def read(self, path: str) -> memoryview:
        """A file of the code."""
        start, end = self._places[path]
        return self._view[start:end]

    def path(self, path: str) -> str:
        """A path to sealed memory, for the life of the process. Raises StorageError."""
        if path not in self._files:
            content = self.read(path)

            def fill(view: memoryview) -> None:
                view[:] = content

            self._files[path] = SealedFile(len(content), fill)
        return self._files[path].path

    def check(self) -> None:
        """What was handed over stays."""


def _received(passed: Any, size: int) -> str:  # noqa: ANN401  # multiprocessing's own, without a type
    """In the child: take the code, and let it be imported. The entry for its own children."""
    from hwlicense.device.sealed_code import Importer  # noqa: PLC0415  # which imports this module

    fd = passed.detach()
    importer = Importer(HandedCode(fd, size))
    os.close(fd)
    importer.take_over()
    return importer.entry


def _wanted(source: Source, name: str) -> bool:
    """Whether this Python can use it."""
    return not name.endswith(".pyc") or name.endswith(source.tree.suffixes[-1])
