"""Sealed code: the modules of an open package, imported from memory through Python's own import system.

A sealed name comes from the package or not at all: the importer stands before all others, answers for every name below
a sealed top level, and the `__path__` of a sealed package leads nowhere (`core.code.root`), so without the importer
there is no way to its submodules either. Installing is refused where a sealed top level is already someone else's.

What keeps a module from coming is raised as it is, a RefusedError or ClosedError and no ImportError: code that does
without a module that is not installed must not take a lost dongle for one.
"""

from __future__ import annotations

import errno
import importlib.abc
import importlib.machinery
import importlib.util
import marshal
import os
import sys
import weakref
from typing import TYPE_CHECKING, Final, Protocol, Self

from hwlicense.core import code
from hwlicense.core.errors import Reason, UsageError
from hwlicense.device import handing_over, sealed_resources
from hwlicense.device.memory import SealedFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType

    from hwlicense.core.documents import Manifest
    from hwlicense.device.model import Model

PYTHON: Final = f"{sys.version_info.major}.{sys.version_info.minor}"
SUFFIXES: Final = (*importlib.machinery.EXTENSION_SUFFIXES, code.bytecode_suffix(PYTHON))
_HEADER: Final = 16
"""Bytes before the code in a .pyc file (PEP 552)."""

# The loader knows libraries by their paths, for the life of the process: a path that came back for another library
# would give the first one. So these stay open.
_libraries: dict[tuple[str, str], SealedFile] = {}


class Source(Protocol):
    """Where the code comes from: an open model, or what a parent process handed over. Paths are below `code.FOLDER`."""

    identity: str
    root: str
    tree: code.Tree

    def read(self, path: str) -> memoryview: ...  # noqa: D102
    def path(self, path: str) -> str: ...  # noqa: D102
    def check(self) -> None: ...  # noqa: D102


class ModelCode:
    """The code of an open model."""

    def __init__(self, model: Model, manifest: Manifest) -> None:
        """Raises UsageError CODE_ABSENT, PYTHON_UNSUPPORTED."""
        check_python(manifest)
        self.identity = manifest.content_key
        self.root = code.root(manifest.name)
        self.tree = code.Tree((member.name for member in manifest.members), SUFFIXES)
        self._model = model

    def read(self, path: str) -> memoryview:
        """Raises as `Model.read`."""
        return self._model.read(code.FOLDER + path)

    def path(self, path: str) -> str:
        """A path to sealed memory, until the model is closed. Raises as `Model.path`."""
        return self._model.path(code.FOLDER + path)

    def check(self) -> None:
        """Raises what reading would."""
        self._model.size(code.FOLDER + next(iter(self.tree.files)))


def check_python(manifest: Manifest) -> None:
    """Raises UsageError CODE_ABSENT where there is no code, PYTHON_UNSUPPORTED where it is for other versions."""
    if manifest.code is None:
        what = f"The package {manifest.name!r} holds no code."
        raise UsageError(Reason.CODE_ABSENT, what, "Pack it with `hwlicense vendor pack --code`.")
    if PYTHON not in manifest.code.versions or sys.implementation.name != "cpython":
        here = f"{sys.implementation.name} {PYTHON}".replace("cpython", "Python")
        what = f"The code in {manifest.name!r} is for Python {', '.join(manifest.code.versions)}; this is {here}."
        hint = f"Use one of those, or ask the vendor for a package with code for it (`vendor pack --python {PYTHON}`)."
        raise UsageError(Reason.PYTHON_UNSUPPORTED, what, hint)


class Importer:
    """Imports sealed code while it is installed: `install` and `remove`, or a `with` block. Modules outlive both."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.entry = handing_over.PathEntry(source.root)
        self.entry.importer = weakref.ref(self)
        self.handed = handing_over.Handed(source)

    def install(self) -> None:
        """Let sealed code be imported from now on. Doing it again changes nothing.

        Raises UsageError MODULE_SHADOWED where a sealed top-level name is another module's, or could be.
        """
        if self not in sys.meta_path:
            self._check_names()
            self.take_over()

    def take_over(self) -> None:
        """As `install`, in a process whose parent has checked the names."""
        sys.meta_path.insert(0, self)
        sys.path_hooks.insert(0, self._hook)
        sys.path.append(self.entry)

    def remove(self) -> None:
        """Import no more of it. Modules that were imported stay, and work."""
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        sys.path_hooks[:] = [hook for hook in sys.path_hooks if hook != self._hook]
        sys.path[:] = [entry for entry in sys.path if entry is not self.entry]
        for path in [path for path in sys.path_importer_cache if _below(str(path), self.source.root)]:
            del sys.path_importer_cache[path]

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *_error: object) -> None:
        self.remove()

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As Python's importers have it. Raises ModuleNotFoundError for a sealed name that is not in the package."""
        if fullname.partition(".")[0] not in self.source.tree.tops:
            return None
        found = self.source.tree.find(fullname)
        if found is None:
            msg = f"No module named {fullname!r} in the sealed code"
            raise ModuleNotFoundError(msg, name=fullname)
        native = found.member is not None and found.member.endswith(code.NATIVE)
        place = f"{self.source.root}/{fullname.replace('.', '/')}"
        loader = (_NativeLoader if native else _Loader)(self.source, fullname, found)
        spec = importlib.machinery.ModuleSpec(fullname, loader, origin=loader.file, is_package=found.package)
        spec.has_location = found.member is not None
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(place)
        return spec

    def iter_modules(self, prefix: str = "") -> Iterator[tuple[str, bool]]:
        """The top-level modules, for pkgutil."""
        return _Folder(self, "").iter_modules(prefix)

    def _hook(self, path: str) -> _Folder:
        if not _below(str(path), self.source.root):
            raise ImportError(f"{path!r} is not of this package", path=path)
        return _Folder(self, path.removeprefix(self.source.root).lstrip("/"))

    def _check_names(self) -> None:
        for finder in sys.meta_path:
            if isinstance(finder, Importer) and finder.source.root == self.source.root:
                what = "The code of a package of this name is being imported already."
                raise UsageError(Reason.MODULE_SHADOWED, what, "Remove that importer first.")
        for name, module in list(sys.modules.items()):
            top = name.partition(".")[0]
            if top not in self.source.tree.tops:
                continue
            loader = getattr(getattr(module, "__spec__", None), "loader", None)
            if not isinstance(loader, _Loader | _NativeLoader) or loader.source.identity != self.source.identity:
                raise _shadowed(top, f"already imported from {getattr(module, '__file__', None) or 'elsewhere'}")
            loader.source = self.source  # of an earlier opening of this very package, whose data now come from here
        for top in sorted(self.source.tree.tops):
            for finder in sys.meta_path:
                find = getattr(finder, "find_spec", None)
                if find and (spec := find(top, None, None)):
                    places = spec.submodule_search_locations or ["another importer"]
                    raise _shadowed(top, f"also found in {spec.origin or next(iter(places))}")


class _Folder:
    """What `sys.path_hooks` give for the `__path__` of a sealed package."""

    def __init__(self, importer: Importer, folder: str) -> None:
        self._importer, self._folder = importer, folder

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        return self._importer.find_spec(fullname, None, target)

    def iter_modules(self, prefix: str = "") -> Iterator[tuple[str, bool]]:
        for name, package in self._importer.source.tree.modules(self._folder).items():
            yield prefix + name, package


class _Sealed:
    """What the loaders of bytecode and of native modules share."""

    def __init__(self, source: Source, fullname: str, found: code.Found) -> None:
        self.source, self.found = source, found
        path = fullname.replace(".", "/")
        self.folder = path if found.package else path.rpartition("/")[0]
        self.file = f"{source.root}/{path}{'/__init__' if found.package else ''}.py"

    def get_data(self, path: str) -> bytes:
        """For pkgutil.get_data, which asks beside `__file__`. Raises FileNotFoundError, and as the model reads."""
        if not _below(path, self.source.root):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return sealed_resources.read(self.source, path[len(self.source.root) + 1 :])

    def get_resource_reader(self, _fullname: str) -> sealed_resources.Reader:
        return sealed_resources.Reader(self.source, self.folder)


class _Loader(_Sealed, importlib.abc.InspectLoader):
    def get_code(self, fullname: str) -> CodeType:
        if self.found.member is None:  # a folder
            return compile("", f"<{self.file}>", "exec", dont_inherit=True)
        raw = self.source.read(self.found.member)
        if raw[:4] != importlib.util.MAGIC_NUMBER:
            msg = f"The bytecode of {fullname!r} is for another build of Python {PYTHON}"
            raise ImportError(msg, name=fullname)
        made: CodeType = marshal.loads(raw[_HEADER:])  # noqa: S302  # what the vendor signed
        return made

    def get_filename(self, _fullname: str) -> str:
        return self.file

    def get_source(self, _fullname: str) -> None:
        return None

    def is_package(self, _fullname: str) -> bool:
        return self.found.package


class _NativeLoader(_Sealed, importlib.machinery.ExtensionFileLoader):  # type: ignore[misc]  # a reader of its own
    def __init__(self, source: Source, fullname: str, found: code.Found) -> None:
        _Sealed.__init__(self, source, fullname, found)
        importlib.machinery.ExtensionFileLoader.__init__(self, fullname, self.file)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        member = self.found.member
        assert member is not None  # noqa: S101  # by find_spec
        if (self.source.identity, member) not in _libraries:
            raw = self.source.read(member)

            def fill(view: memoryview) -> None:
                view[:] = raw

            _libraries[self.source.identity, member] = SealedFile(len(raw), fill)
        self.path = spec.origin = _libraries[self.source.identity, member].path
        return super().create_module(spec)

    def is_package(self, _fullname: str) -> bool:
        return self.found.package


def _below(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}/")


def _shadowed(top: str, how: str) -> UsageError:
    what = f"The sealed code has a module {top!r}, which is {how}."
    hint = "Take that other one away, or ask the vendor to rename the sealed one: neither may hide the other."
    return UsageError(Reason.MODULE_SHADOWED, what, hint)
