"""Sealed code: how Python modules are named in a package, what is found under a name, and where a program begins.

Members under `.code/` are the code: below it lie the modules as an importer of Python would have them, bytecode in
place of sources. `PACKAGE/MODULE.cpython-311.pyc` is a module for CPython 3.11, `PACKAGE/__init__.cpython-311.pyc` the
package's own, `PACKAGE/NAME.so` with whatever tags a native one, and anything else is data.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from hwlicense.core.errors import Reason, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hwlicense.core.documents import Manifest

FOLDER: Final = ".code/"
VERSION: Final = r"^3\.(?:0|[1-9][0-9]{0,2})\Z"
ENTRY: Final = r"^[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*\Z"
NATIVE: Final = ".so"
_ROOT: Final = "/proc/self/hwlicense"
_UNSHOWN: Final = re.compile(r"[^\w .+-]")


class Entry(NamedTuple):
    """Where a program begins: a function (or `Class.method`) of a module, called without arguments."""

    module: str
    function: str


class Found(NamedTuple):
    """A module's member below `FOLDER`, none for a folder without code of its own."""

    member: str | None
    package: bool


def parse_entry(text: str) -> Entry:
    """`package.module:function`. Raises UsageError ENTRY_ABSENT."""
    if not re.search(ENTRY, text):
        what = f"{text!r} is no entry point."
        raise UsageError(Reason.ENTRY_ABSENT, what, "Give package.module:function.")
    return Entry(*text.split(":"))


def reserved(name: str) -> bool:
    """Whether a member's name is for code alone, on whatever file system."""
    return name.partition("/")[0].casefold() == FOLDER[:-1]


def bytecode_suffix(version: str) -> str:
    """What follows a module's name in its member, for a version such as 3.11."""
    return f".cpython-{version.replace('.', '')}.pyc"


def root(package: str) -> str:
    """The folder that a package's code says it lies in: its `__path__` and `__file__`.

    Nobody can make it, as the kernel has no such name there. So no file is ever taken for a sealed module or its data,
    whatever the working directory, and whoever may write where.
    """
    return f"{_ROOT}/{_UNSHOWN.sub('_', package)}"


def filename(package: str, module: str) -> str:
    """What tracebacks say of a module; `module` is its path below `FOLDER`, without a suffix.

    In angle brackets, or Python would look for a file of the last part's name in `sys.path`, and show a line of it.
    """
    return f"<sealed {_UNSHOWN.sub('_', package)}/{module}.py>"


def fault(manifest: Manifest) -> str:
    """What is wrong with a manifest's code, or nothing."""
    members = [member.name for member in manifest.members if reserved(member.name)]
    if manifest.code is None:
        return f"{members[0]!r} is code, and the manifest tells of none" if members else ""
    if not members:
        return "it tells of code, and there is none"
    odd = [name for name in members if not name.startswith(FOLDER)]
    return f"{odd[0]!r} is not below {FOLDER}" if odd else ""


class Tree:
    """What a package's code is made of; paths are below `FOLDER`, the top itself is the empty path."""

    def __init__(self, members: Iterable[str], suffixes: Sequence[str]) -> None:
        """`suffixes` are those of modules that this Python takes, the preferred first."""
        self.files = frozenset(name.removeprefix(FOLDER) for name in members if name.startswith(FOLDER))
        self.suffixes = suffixes
        self.folders: dict[str, set[str]] = {"": set()}
        for file in self.files:
            path = file
            while path:
                folder, _, name = path.rpartition("/")
                self.folders.setdefault(folder, set()).add(name)
                path = folder
        self.tops = frozenset(self.modules(""))

    def find(self, module: str) -> Found | None:
        """The module of that full name, found as Python finds it: a package first, then a module, then a folder."""
        path = module.replace(".", "/")
        for stem, package in ((f"{path}/__init__", True), (path, False)):
            for suffix in self.suffixes:
                if stem + suffix in self.files:
                    return Found(stem + suffix, package)
        return Found(None, package=True) if path in self.folders else None

    def modules(self, folder: str) -> dict[str, bool]:
        """The modules in a folder, in order, and whether each is a package."""
        found: dict[str, bool] = {}
        for name in self.folders.get(folder, ()):
            module = name.partition(".")[0]
            path = f"{folder}/{module}" if folder else module
            if module.isidentifier() and module != "__init__" and module not in found:
                there = self.find(path.replace("/", "."))
                if there and (there.member or not folder):
                    found[module] = there.package
        return dict(sorted(found.items()))
