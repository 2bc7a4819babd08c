"""Whether the functions of this package, and those of others that it decrypts with, are still its own.

Each function's code is compared with what its module's loader gives, and each name that a module imports with what it
names there, so that one that was put in its place from Python shows, whenever that was done. Code that is changed in
memory by other means does not show here, nor does what is put into others' modules beyond those named below.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from functools import _lru_cache_wrapper, cached_property
from importlib.machinery import ExtensionFileLoader, SourceFileLoader, SourcelessFileLoader
from opcode import opmap
from types import BuiltinFunctionType, CodeType, FunctionType, MethodDescriptorType
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from zipimport import zipimporter

from hwlicense.loaded import mappings
from hwlicense.program import written

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import ModuleType

_PACKAGE: Final = __name__.partition(".")[0]
_CALLED_BY_PEOPLE: Final = f"{_PACKAGE}.cli"  # its commands are click's objects, and decrypt nothing themselves
_FUNCTION: Final = 0x3  # CO_OPTIMIZED and CO_NEWLOCALS; the body of a class has neither

_RUST: Final = "cryptography.hazmat.bindings._rust"
_FOREIGN: Final[tuple[tuple[str, str, tuple[str, ...]], ...]] = (
    (_RUST, "openssl.aead.AESGCM", ("decrypt_into",)),
    (_RUST, "openssl.kdf.HKDF", ("derive_into",)),
    (_RUST, "openssl.ed25519.Ed25519PublicKey", ("verify",)),
    (_RUST, "openssl.ec.ECPublicKey", ("verify",)),
    (_RUST, "openssl.mldsa.MLDSA65PublicKey", ("verify",)),
    (_RUST, "openssl.keys.load_der_public_key", ()),
    ("blake3.blake3", "blake3", ("update", "digest")),
)
"""Extension module, what of it is called, and which methods."""

_OF_PYTHON: Final[tuple[tuple[str, str, tuple[str, ...]], ...]] = (
    ("hmac", "compare_digest", ("_hashlib", "_operator")),
    ("hashlib", "sha256", ("_hashlib", "_sha256", "_sha2")),
    ("marshal", "loads", ("marshal",)),
    ("marshal", "dumps", ("marshal",)),
)
"""Module of the standard library, what of it is called, and which modules have it in native code, under a like name."""

_FOLLOWED: Final = ("cryptography", "hmac", "msgspec", "secrets")
"""Packages in Python that keys pass through: functions of each module that is imported from are compared, too."""

_LOADERS: Final = (SourceFileLoader, SourcelessFileLoader, zipimporter)


def replaced(objects: Iterable[object] = ()) -> Iterator[str]:
    """What is not as it was written, by its name; methods that were put on one of `objects` itself, too."""
    followed: set[str] = set()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == _PACKAGE and not name.startswith(_CALLED_BY_PEOPLE):
            written_ = _written(name, module)
            if written_ is None:
                yield f"{name}, whose code cannot be found"
                continue
            yield from _functions_of(name, module, written_, whole=True)
            yield from _imports_of(name, module, written_)
            followed |= written_.followed
    for name in sorted(followed & sys.modules.keys()):
        if written_ := _written(name, sys.modules[name]):
            yield from _functions_of(name, sys.modules[name], written_, whole=False)
    yield from _foreign()
    for each in objects:
        for name in vars(each):
            if hasattr(type(each), name):
                yield f"{type(each).__name__}.{name} of an open one"


# ---- functions in Python ---------------------------------------------------------------------------------


def _functions_of(name: str, module: ModuleType, asked: _Written, *, whole: bool) -> Iterator[str]:
    """Those that are others than written; where the `whole` module must be there, those that are not there too."""
    for path, codes in asked.functions.items():
        found = _within(module, path)
        if (found is None and whole) or (found is not None and not _is_one(found, module, codes)):
            yield f"{name}.{path}"


def _imports_of(name: str, module: ModuleType, asked: _Written) -> Iterator[str]:
    """Names that no longer lead to what was imported. Those for annotations alone are not there."""
    space = vars(module)
    for own, sources in asked.imports.items():
        if own in space and not any(_is_from(space[own], there, path) for there, path in sources):
            yield f"{name}.{own}"


def _is_from(found: object, there: str, path: str) -> bool:
    if not path:
        return found is sys.modules.get(there)
    if there.partition(".")[0] == _PACKAGE and (submodule := sys.modules.get(f"{there}.{path}")):
        return found is submodule
    source = sys.modules.get(there)
    return found is getattr(source, path, _within(source, path))


def _within(holder: Any, path: str) -> Any:  # noqa: ANN401  # whatever lies there
    for part in path.split("."):
        holder = getattr(holder, "__dict__", {}).get(part)
    return holder


def _is_one(found: object, module: ModuleType, codes: list[CodeType]) -> bool:
    function = _unwrapped(found)
    if not isinstance(function, FunctionType) or function.__globals__ is not vars(module):
        return False
    code = function.__code__
    if _seen.get(id(code)) is not code:
        if written(code) not in map(written, codes):
            return False
        _seen[id(code)] = code
    return True


_seen: dict[int, CodeType] = {}
"""Code that is as written. Nothing in Python changes a code object, and what is kept here has its number for itself."""


def _unwrapped(found: object) -> object:
    """The function in what the language's own decorators make of one."""
    match found:
        case staticmethod() | classmethod():
            return found.__func__
        case property():
            return found.fget
        case cached_property():
            return found.func
        case _lru_cache_wrapper():
            return found.__wrapped__
        case FunctionType() if found.__code__ is _MANAGED and found.__closure__:
            return found.__closure__[0].cell_contents  # what it calls; its `__wrapped__` is but a label
    return found


@contextmanager
def _managed() -> Iterator[None]:
    yield


_MANAGED: Final = vars(sys.modules[__name__])["_managed"].__code__


class _Written(NamedTuple):
    """What a module's code holds: functions of it and its classes, by qualified name; names that it imports, and where
    from; and modules of others among these whose functions matter.
    """

    functions: dict[str, list[CodeType]]
    imports: dict[str, list[tuple[str, str]]]
    followed: set[str]


def _written(name: str, module: ModuleType) -> _Written | None:
    """None where there is no code to be had."""
    if name not in _known:
        loader: Any = getattr(vars(module).get("__spec__"), "loader", None)
        try:
            code = type(loader).get_code(loader, name) if type(loader) in _LOADERS else None
        except (ImportError, OSError):
            code = None
        _known[name] = _parts_of(code) if code else None
    return _known[name]


_known: dict[str, _Written | None] = {}


def _parts_of(code: CodeType) -> _Written:
    functions: dict[str, list[CodeType]] = {}
    for each in _functions(code):
        functions.setdefault(each.co_qualname, []).append(each)
    imports: dict[str, list[tuple[str, str]]] = {}
    for own, source in _imports(code):
        imports.setdefault(own, []).append(source)
    modules = {there for sources in imports.values() for there, _ in sources}
    return _Written(functions, imports, {each for each in modules if each.partition(".")[0] in _FOLLOWED})


def _imports(code: CodeType) -> Iterator[tuple[str, tuple[str, str]]]:
    """Each name that a module's body binds by `import X` and `from X import Y`: with X, and Y or nothing."""
    module, path, high, imported = "", "", 0, False
    for operation, argument in zip(code.co_code[::2], code.co_code[1::2], strict=True):
        at = high | argument
        high = at << 8 if operation == opmap["EXTENDED_ARG"] else 0
        if operation == opmap["IMPORT_NAME"]:
            module, path, imported = code.co_names[at], "", True
        elif operation == opmap["IMPORT_FROM"]:
            path, imported = code.co_names[at], True
        elif operation == opmap["STORE_NAME"] and imported:
            yield code.co_names[at], (module if path else module.partition(".")[0], path)
            path, imported = "", False
        elif operation not in _BETWEEN:  # as in `import X.Y as Z`, which is not followed
            imported = False


_BETWEEN: Final = {opmap["EXTENDED_ARG"], opmap["CACHE"], opmap["NOP"]}


def _functions(code: CodeType) -> Iterator[CodeType]:
    """Those of a module's or a class's body; not what functions define within themselves."""
    for each in code.co_consts:
        if isinstance(each, CodeType):
            if each.co_flags & _FUNCTION == _FUNCTION:
                if "<" not in each.co_qualname:
                    yield each
            else:
                yield from _functions(each)


# ---- functions of others ---------------------------------------------------------------------------------


def _foreign() -> Iterator[str]:
    mapped = {each.path for each in mappings(os.getpid())}
    for name in sorted({name for name, *_ in _FOREIGN}):
        if (module := sys.modules.get(name)) and not _is_mapped(module, mapped):
            yield f"{name}, which is no library that is loaded"
    for name, path, methods in _FOREIGN:
        found = _within(sys.modules[name], path) if name in sys.modules else None
        if found is None or not (_is_type(found, methods) if methods else isinstance(found, BuiltinFunctionType)):
            yield f"{name}.{path}"
    for name, path, homes in _OF_PYTHON:
        if name in sys.modules and not _is_of(_within(sys.modules[name], path), path, homes):
            yield f"{name}.{path}"


def _is_mapped(module: ModuleType, mapped: set[str]) -> bool:
    loader = getattr(vars(module).get("__spec__"), "loader", None)
    return isinstance(loader, ExtensionFileLoader) and os.path.realpath(loader.path) in mapped


def _is_of(found: object, name: str, homes: tuple[str, ...]) -> bool:
    if not isinstance(found, BuiltinFunctionType) or not found.__name__.endswith(name):
        return False
    return any(_within(sys.modules.get(home), found.__name__) is found for home in homes)


def _is_type(found: object, methods: tuple[str, ...]) -> bool:
    """Whether these are the type's own methods, in native code: one that is borrowed from another type says so."""
    own = [vars(found).get(name) for name in methods] if isinstance(found, type) else [None]
    return all(isinstance(each, MethodDescriptorType) and each.__objclass__ is found for each in own)
