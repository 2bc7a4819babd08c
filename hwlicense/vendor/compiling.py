"""Code to pack: the modules of packages as bytecode, what else lies in them as it is. Sources stay with the vendor.

Each version of Python compiles its own bytecode, in a process of its own that reads sources and gives bytecode back
through pipes: nothing is written. Code objects name a file that is nowhere, so no path of the vendor's travels either.
"""

from __future__ import annotations

import ast
import keyword
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Final, NamedTuple

from hwlicense.core import code
from hwlicense.core.documents import Code
from hwlicense.core.errors import Reason, UsageError
from hwlicense.storage import read_limited, reporting
from hwlicense.vendor import packing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

SOURCE_LIMIT: Final = 16 << 20
_PYTHON: Final = (".py", ".pyw", ".pyc", ".pyo", ".pyi", ".pyx", ".pxd", ".pxi")
_NATIVE: Final = (".c", ".cc", ".cpp", ".cxx", ".h", ".hh", ".hpp", ".hxx", ".o", ".a")
LEFT_OUT: Final = frozenset((*_PYTHON, *_NATIVE))
"""Endings that never travel: sources of Python and of native modules, and what was compiled from them before."""
_OLDEST: Final = (3, 11)
_SECONDS: Final = 600
_OWN: Final = frozenset({
    "hwlicense", "hwlicense_simulators", "blake3", "cffi", "_cffi_backend", "click", "cryptography", "msgspec",
    "pkcs11", "pycparser", "tpm2_pytss", "usb", "__main__", "sitecustomize", "usercustomize",
})  # fmt: skip
"""hwlicense and what it needs, which lie wherever sealed code runs; and names with a meaning of their own to Python."""

# For any CPython 3: records of (u32 length, bytes) in, two for a module: its file's name and its source. Out: a line of
# the version and its standard library's names, then a record for each module, whose first byte is 0 for a .pyc file
# (PEP 552, hash-based), 1 for an error
_COMPILER: Final = """
import importlib.util as util, marshal, sys
given, out, level = sys.stdin.buffer, sys.stdout.buffer, int(sys.argv[1])
assert sys.implementation.name == "cpython"
out.write(b"%d.%d " % sys.version_info[:2] + " ".join(sorted(sys.stdlib_module_names)).encode() + b"\\n")
while size := given.read(4):
    name = given.read(int.from_bytes(size, "little")).decode()
    source = given.read(int.from_bytes(given.read(4), "little"))
    try:
        code = compile(source, name, "exec", dont_inherit=True, optimize=level)
        made = b"\\0" + util.MAGIC_NUMBER + b"\\1\\0\\0\\0" + bytes(8) + marshal.dumps(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        made = b"\\1" + (f"line {line}: " if line else "").encode() + str(getattr(error, "msg", error)).encode()
    out.write(len(made).to_bytes(4, "little") + made)
"""


class Compiled(NamedTuple):
    """Code as it is packed; `left_out` counts the files that stay here."""

    sources: list[packing.Source]
    code: Code
    left_out: int


class _Module(NamedTuple):
    member: str  # below the folder of code, without its suffix
    path: Path
    source: bytes


def compile_code(
    inputs: Sequence[Path], package: str, entry: str | None = None, pythons: Sequence[str] = (), optimize: int = 0
) -> Compiled:
    """Compile `inputs`, each an importable package's folder or a single module, for the package named `package`.

    For the running Python and for `pythons`: versions, found on PATH, or paths of interpreters. `optimize` is Python's:
    1 takes assertions out, 2 docstrings as well. Hidden files, `__pycache__` and what `LEFT_OUT` names stay here, and
    so does the bytecode of a module that lies there as a native one, too. Links out of a folder, and what is no file,
    are refused as in any packing.

    Raises UsageError (CODE_INVALID, ENTRY_ABSENT, PYTHON_UNSUPPORTED, FILE_ABSENT, USAGE), StorageError.
    """
    modules: list[_Module] = []
    others: list[packing.Source] = []
    left_out = 0
    taken: dict[str, Path] = {}
    for given in inputs:
        top = _top(given, taken)
        found = list(_files(given, top))
        native = {member.partition(".")[0] for member, path, _ in found if path.suffix == code.NATIVE}
        for member, path, root in found:
            if path.suffix == ".py" and member.removesuffix(".py") in native:
                left_out += 1  # it was compiled to keep it from being read
            elif path.suffix == ".py":
                _check_module(path, member)
                source = packing.source_of(member, path, root)
                modules.append(_Module(member.removesuffix(".py"), path, read_limited(source.path, SOURCE_LIMIT)))
            elif path.suffix in LEFT_OUT or path.name.endswith("~"):
                left_out += 1
            else:
                others.append(packing.source_of(code.FOLDER + member, path, root))
    if entry is not None:
        _check_entry(entry, modules, others)
    made: dict[str, list[packing.Source]] = {}
    for python in _interpreters(pythons):
        version, standard, compiled = _compiled(python, modules, package, optimize)
        if clashing := sorted(standard & taken.keys()):
            raise _clash(clashing[0], f"of Python {version}'s standard library")
        made[version] = [
            packing.made(code.FOLDER + module.member + code.bytecode_suffix(version), module.path, raw)
            for module, raw in zip(modules, compiled, strict=True)
        ]
    versions = sorted(made, key=lambda version: int(version.partition(".")[2]))
    sources = [*others, *(source for version in versions for source in made[version])]
    return Compiled(sources, Code(entry, versions), left_out + len(modules))


# ---- what there is ---------------------------------------------------------------------------------------


def _top(given: Path, taken: dict[str, Path]) -> str:
    """The name that `given` is imported by."""
    with reporting(given):
        resolved = given.resolve(strict=True)
        folder = resolved.is_dir()
    name = resolved.name if folder else given.name.partition(".")[0]
    if folder:
        if not any(resolved.glob("__init__.py")) and not any(resolved.glob(f"__init__.*{code.NATIVE}")):
            what = f"{given} is no Python package: it has no __init__.py."
            hint = "Give the folder of one top-level package, or a single module."
            raise UsageError(Reason.CODE_INVALID, what, hint)
    elif given.suffix not in {".py", code.NATIVE}:
        what = f"{given} is neither a package's folder nor a module."
        raise UsageError(Reason.CODE_INVALID, what, "Give a folder, a .py file or a native module (.so).")
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UsageError(Reason.CODE_INVALID, f"{name!r} cannot be imported.", "Give it the name of a module.")
    if name in _OWN:
        raise _clash(name, "that Python or hwlicense itself needs")
    if name in taken:
        what = f"{given} and {taken[name]} are both imported as {name!r}."
        raise UsageError(Reason.CODE_INVALID, what, "Give each top-level package once.")
    taken[name] = given
    return name


def _clash(name: str, whose: str) -> UsageError:
    what = f"{name!r} is the name of a module {whose}."
    return UsageError(Reason.CODE_INVALID, what, "Rename it: sealed code shadows nothing.")


def _files(given: Path, top: str) -> Iterator[tuple[str, Path, Path | None]]:
    """Each file's place below the folder of code, its path, and the folder that it must not lead out of."""
    if not given.is_dir():
        yield given.name, given, None
        return
    root = given.resolve()
    for path in sorted(packing.walk(root, _hidden)):
        if not _hidden(path.name):
            yield f"{top}/{path.relative_to(root).as_posix()}", path, root


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _check_module(path: Path, member: str) -> None:
    parts = member.removesuffix(".py").split("/")
    odd = next((part for part in parts if not part.isidentifier()), None)
    if odd is not None:
        what = f"{path} is a module that cannot be imported: {odd!r} is no name of Python's."
        raise UsageError(Reason.CODE_INVALID, what, "Rename it, or keep it out of the package's folder.")


# ---- where it begins -------------------------------------------------------------------------------------


def _check_entry(entry: str, modules: Iterable[_Module], others: Iterable[packing.Source]) -> None:
    """As far as that can be known without running anything."""
    module, function = code.parse_entry(entry)
    path = module.replace(".", "/")
    for found in modules:
        if found.member in {path, f"{path}/__init__"}:
            if _defines(found, function.partition(".")[0]):
                return
            what = f"{found.path} defines no {function.partition('.')[0]!r}, where the program is to begin."
            raise UsageError(Reason.ENTRY_ABSENT, what, "Give --entry package.module:function.")
    native = [source.name for source in others if source.name.endswith(code.NATIVE)]
    if not any(name.startswith((f"{code.FOLDER}{path}.", f"{code.FOLDER}{path}/__init__.")) for name in native):
        what = f"The code has no module {module!r}, where the program is to begin."
        raise UsageError(Reason.ENTRY_ABSENT, what, "Give --entry package.module:function.")


def _defines(module: _Module, name: str) -> bool:
    """Whether the module's own level may bind `name`: by any statement, in any branch; `import *` may bind all."""
    try:
        waiting: list[ast.AST] = list(ast.parse(module.source).body)
    except (SyntaxError, ValueError, RecursionError):
        return True  # its compilation says what is wrong, and where
    while waiting:
        match node := waiting.pop():
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                if node.name == name:
                    return True
                continue  # what is bound within is not the module's
            case ast.alias():
                if (node.asname or node.name.partition(".")[0]) in {name, "*"}:
                    return True
            case ast.Name(ctx=ast.Store()):
                if node.id == name:
                    return True
            case ast.Lambda():
                continue
        waiting.extend(ast.iter_child_nodes(node))
    return False


# ---- other Pythons ---------------------------------------------------------------------------------------


def _interpreters(pythons: Sequence[str]) -> Iterator[str]:
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    yield sys.executable
    for given in pythons:
        if "/" in given:
            yield given
        elif not re.search(code.VERSION, given):
            what = f"{given!r} is no version of Python that hwlicense compiles for."
            raise UsageError(Reason.PYTHON_UNSUPPORTED, what, "Give --python 3.12, or the path of an interpreter.")
        elif given != running:
            found = shutil.which(f"python{given}")
            if found is None:
                what = f"There is no python{given} on PATH to compile for Python {given}."
                raise UsageError(Reason.PYTHON_UNSUPPORTED, what, "Install it, or give the path of its interpreter.")
            yield found


def _compiled(
    python: str, modules: Sequence[_Module], package: str, optimize: int
) -> tuple[str, frozenset[str], list[bytes]]:
    """The interpreter's version, the names of its standard library, and the modules in order."""
    given = b"".join(_record(code.filename(package, m.member).encode()) + _record(m.source) for m in modules)
    command = [python, "-I", "-S", "-B", "-W", "ignore", "-c", _COMPILER, str(optimize)]
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=_SECONDS, check=False)  # noqa: S603  # what the vendor named
    except (OSError, subprocess.TimeoutExpired) as error:
        why = error.strerror if isinstance(error, OSError) else f"it was not done after {_SECONDS} s"
        what = f"{python} could not compile the code: {why}."
        raise UsageError(Reason.PYTHON_UNSUPPORTED, what, "Give --python a CPython interpreter.") from None
    told, _, records = done.stdout.partition(b"\n")
    version, *standard = told.split(b" ")
    made = list(_records(records))
    if done.returncode or not re.fullmatch(rb"3\.[0-9]{1,3}", version) or len(made) != len(modules):
        said = done.stderr.decode(errors="replace").strip().splitlines()
        what = f"{python} did not compile the code{': ' + said[0] if said else '; it is no CPython, or failed'}."
        hint = "Give --python a CPython interpreter, by its full path where the one on PATH is a stand-in."
        raise UsageError(Reason.PYTHON_UNSUPPORTED, what, hint)
    text = version.decode()
    if tuple(map(int, text.split("."))) < _OLDEST:
        what = f"{python} is Python {text}; hwlicense runs on {'.'.join(map(str, _OLDEST))} and newer."
        raise UsageError(Reason.PYTHON_UNSUPPORTED, what, "Compile for a newer one.")
    for module, raw in zip(modules, made, strict=True):
        if raw[:1] != b"\0":
            what = f"{module.path} is no module for Python {text}: {raw[1:].decode(errors='replace')}."
            hint = "Mend it." if python == sys.executable else "Mend it, or leave that version out."
            raise UsageError(Reason.CODE_INVALID, what, hint)
    return text, frozenset(name.decode() for name in standard), [raw[1:] for raw in made]


def _record(content: bytes) -> bytes:
    return len(content).to_bytes(4, "little") + content


def _records(raw: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 4], "little")
        yield raw[at + 4 : at + 4 + size]
        at += 4 + size
