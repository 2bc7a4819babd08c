"""Whether the functions of this package, and those of others that it decrypts with, are still its own.

Each function's code is compared with what its module's loader gives, so that one that was put in its place from Python
shows, whenever that was done. Code that is changed in memory by other means does not show here.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from functools import _lru_cache_wrapper, cached_property
from importlib.machinery import ExtensionFileLoader
from types import BuiltinFunctionType, CodeType, FunctionType, MethodDescriptorType
from typing import TYPE_CHECKING, Any, Final

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

_USED: Final = (
    ("core.package", "AESGCM", _RUST, "openssl.aead.AESGCM"),
    ("core.keys", "AESGCM", _RUST, "openssl.aead.AESGCM"),
    ("core.secret", "HKDF", _RUST, "openssl.kdf.HKDF"),
    ("core.envelope", "load_der_public_key", _RUST, "openssl.keys.load_der_public_key"),
    ("core.package", "blake3", "blake3.blake3", "blake3"),
)
"""Under which names this package calls them."""


def replaced(objects: Iterable[object] = ()) -> Iterator[str]:
    """What is not as it was written, by its name; methods that were put on one of `objects` itself, too."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == _PACKAGE and not name.startswith(_CALLED_BY_PEOPLE):
            yield from _of_module(name, module)
    yield from _foreign()
    for each in objects:
        for name in vars(each):
            if hasattr(type(each), name):
                yield f"{type(each).__name__}.{name} of an open one"


# ---- functions in Python ---------------------------------------------------------------------------------


def _of_module(name: str, module: ModuleType) -> Iterator[str]:
    expected = _expected(name, module)
    if expected is None:
        yield f"{name}, whose code cannot be found"
        return
    for path, codes in expected.items():
        found = _within(module, path)
        if found is not None and not _is_one(found, module, codes):
            yield f"{name}.{path}"


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


def _expected(name: str, module: ModuleType) -> dict[str, list[CodeType]] | None:
    """The code of each function of a module and its classes, by qualified name; None where there is none to be had."""
    if name not in _known:
        loader = getattr(vars(module).get("__spec__"), "loader", None)
        try:
            code = loader.get_code(name) if loader else None
        except (ImportError, OSError):
            code = None
        _known[name] = None if code is None else {}
        for each in _functions(code) if code else ():
            _known[name].setdefault(each.co_qualname, []).append(each)  # type: ignore[union-attr]  # not None here
    return _known[name]


_known: dict[str, dict[str, list[CodeType]] | None] = {}


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
    for here, name, there, path in _USED:
        module = sys.modules.get(f"{_PACKAGE}.{here}")
        if module and there in sys.modules and vars(module).get(name) is not _within(sys.modules[there], path):
            yield f"{_PACKAGE}.{here}.{name}"


def _is_mapped(module: ModuleType, mapped: set[str]) -> bool:
    loader = getattr(vars(module).get("__spec__"), "loader", None)
    return isinstance(loader, ExtensionFileLoader) and os.path.realpath(loader.path) in mapped


def _is_type(found: object, methods: tuple[str, ...]) -> bool:
    """Whether these are the type's own methods, in native code: one that is borrowed from another type says so."""
    own = [vars(found).get(name) for name in methods] if isinstance(found, type) else [None]
    return all(isinstance(each, MethodDescriptorType) and each.__objclass__ is found for each in own)
