"""What a process has loaded: interpreter and native libraries, by its mappings, and the files of its Python modules.

A file is known by SHA-256 of its content. What lies on the path now need not be what was loaded: mapped code is
compared with the file that is digested, byte for byte, and cached bytecode with the source that it is said to be of.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import hashlib
import importlib.util
import marshal
import os
import signal
import stat
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from hwlicense.program import origins, written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

_DELETED: Final = " (deleted)"
_STEP: Final = 1 << 20
_HEADER: Final = 16  # of a cache of bytecode (PEP 552)
_STANDARD: Final = {"_frozen_importlib_external", "_frozen_importlib", "importlib.util", "zipimport"}
_OWN: Final = "hwlicense."


class Loaded(NamedTuple):
    """A file that was loaded. `digest` is None where that cannot be said, and `problem` says why, or what is wrong."""

    name: str
    digest: bytes | None
    problem: str = ""


class Mapping(NamedTuple):
    """A part of a file that is mapped to be executed, from `start` to before `end`."""

    start: int
    end: int
    readable: bool
    offset: int
    inode: int
    path: str


def everything(memory_files: frozenset[int] = frozenset(), *, anew: bool = True) -> Iterator[Loaded]:
    """All that this process has loaded. Files in memory with these inodes are its own, and left out.

    `anew` compares mapped code with its files again, where that was done before. Raises OSError without /proc.
    """
    yield from native(os.getpid(), memory_files, anew=anew)
    yield from program()
    yield from modules()


# ---- native code -----------------------------------------------------------------------------------------


def mappings(process: int) -> list[Mapping]:
    """What a process may execute of files. Raises OSError."""
    with open(f"/proc/{process}/maps", "rb") as lines:  # noqa: PTH123  # the kernel's file
        split = [os.fsdecode(line.rstrip(b"\n")).split(maxsplit=5) for line in lines]
    found = []
    for area, permissions, offset, _, inode, *path in split:
        if "x" in permissions and path and inode != "0":
            start, end = (int(part, 16) for part in area.split("-"))
            place = path[0].replace("\\012", "\n")
            found.append(Mapping(start, end, "r" in permissions, int(offset, 16), int(inode), place))
    return found


def native(process: int, memory_files: frozenset[int] = frozenset(), *, anew: bool = True) -> Iterator[Loaded]:
    """The interpreter and native libraries of a process. Raises OSError."""
    named: dict[tuple[str, int], list[Mapping]] = {}
    for each in mappings(process):
        if not (each.path.startswith("/memfd:") and each.inode in memory_files):
            named.setdefault((each.path, each.inode), []).append(each)
    for (path, _), parts in named.items():
        yield _mapped(process, path, parts, anew=anew)


def _mapped(process: int, path: str, parts: list[Mapping], *, anew: bool) -> Loaded:
    name = path.removesuffix(_DELETED)
    try:
        with _behind(process, path, parts[0]) as fd:
            status = os.fstat(fd)
            if status.st_ino != parts[0].inode:
                return Loaded(name, None, "replaced since it was loaded")
            if process == os.getpid():
                for key in ((part, status.st_ctime_ns) for part in parts):
                    if (anew or key not in _compared) and not _same(fd, key[0]):
                        return Loaded(name, None, "changed in memory, or on the disk since it was loaded")
                    _compared.add(key)
            return Loaded(name, _digest(fd, status))
    except FileNotFoundError:
        return Loaded(name, None, "deleted since it was loaded")
    except OSError as error:
        return Loaded(name, None, f"cannot be read ({error.strerror})")


_compared: set[tuple[Mapping, int]] = set()
_LOOKS: Final = 9  # at what differs: another thread may unload it meanwhile, and load it again at the same place


@contextmanager
def _behind(process: int, path: str, part: Mapping) -> Iterator[int]:
    """What is mapped, by the kernel's own link, which takes CAP_CHECKPOINT_RESTORE; else what lies on the path."""
    try:
        fd = os.open(f"/proc/{process}/map_files/{part.start:x}-{part.end:x}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        root = "" if process == os.getpid() else f"/proc/{process}/root"
        fd = os.open(root + path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _same(fd: int, part: Mapping) -> bool:
    """Whether memory holds what the file has there."""
    if not part.readable:
        return True
    size = min(part.end - part.start, os.fstat(fd).st_size - part.offset)
    for at in range(0, size, _STEP):
        length = min(_STEP, size - at)
        for _ in range(_LOOKS):
            if _memory(part.start + at, length) == os.pread(fd, length, part.offset + at):
                break
            if part not in mappings(os.getpid()):
                return True
        else:
            return False
    return True


class _Span(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _memory(address: int, length: int) -> bytes:
    """Of this process, as far as it can be read: the kernel stops at what is unmapped, or beyond a file's end, where
    reading it oneself is the end of the process. Raises OSError.
    """
    buffer = ctypes.create_string_buffer(length)
    into, out_of = _Span(ctypes.addressof(buffer), length), _Span(address, length)
    got: int = _libc.process_vm_readv(os.getpid(), ctypes.byref(into), 1, ctypes.byref(out_of), 1, 0)
    if got < 0 and ctypes.get_errno() != errno.EFAULT:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return buffer.raw[: max(0, got)]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


# ---- Python modules --------------------------------------------------------------------------------------


def modules() -> Iterator[Loaded]:
    """The files of all imported modules, each once. Sealed code is left out: its package's signatures cover it.

    And the program, of which its own module may say what it likes.
    """
    seen: set[str] = set()
    for name, module in list(sys.modules.items()):
        if name == "__main__":
            continue
        space = getattr(module, "__dict__", {})
        loader = getattr(space.get("__spec__"), "loader", None) or space.get("__loader__")
        kind = loader if isinstance(loader, type) else type(loader)
        if loader is not None and not _known(kind):
            yield Loaded(name, None, f"imported by {kind.__module__}.{kind.__qualname__}, which is in no module")
        elif (file := _file_of(module, space, kind, loader)) and file not in seen:
            seen.add(file)
            yield _source(file, space, kind)


def program() -> Iterator[Loaded]:
    """The file of the program that runs, as `hwlicense.program` finds it."""
    for file, problem in origins():
        try:
            yield Loaded(file, None, problem) if problem else Loaded(file, file_digest(file))
        except OSError as error:
            yield Loaded(file, None, f"cannot be read ({error.strerror})")


def _known(kind: type) -> bool:
    """Whether a loader is Python's own, or of a module whose own file is looked at like any other's."""
    module = sys.modules.get(kind.__module__)
    return kind.__module__ in _STANDARD or (module is not None and vars(module).get(kind.__name__) is kind)


def _file_of(module: ModuleType, space: dict[str, Any], kind: type, loader: object) -> str:
    if kind.__name__ in {"BuiltinImporter", "FrozenImporter"} and kind.__module__ in _STANDARD:
        return ""  # within the interpreter
    if kind.__module__.startswith(_OWN):
        return ""
    if kind.__module__ == "zipimport":
        return str(getattr(loader, "archive", ""))
    spec = space.get("__spec__")
    found = spec.origin if spec is not None and spec.has_location else space.get("__file__")
    return found if isinstance(found, str) and hasattr(module, "__dict__") else ""


def _source(file: str, space: dict[str, Any], kind: type) -> Loaded:
    try:
        digest = file_digest(file)
        cached = getattr(space.get("__spec__"), "cached", None) if kind.__name__ == "SourceFileLoader" else None
        if cached and not _cache_is_of(file, cached):
            return Loaded(file, None, f"has other code in its cache, {cached}")
    except OSError as error:
        return Loaded(file, None, f"cannot be read ({error.strerror})")
    return Loaded(file, digest)


def _cache_is_of(source: str, cached: str) -> bool:
    """Whether the bytecode that Python would take for a source is what compiling it gives. Raises OSError."""
    with suppress(FileNotFoundError):
        status, compiled = Path(source).stat(), Path(cached).stat()
        key = (_identity(status), _identity(compiled))
        if key not in _caches:
            with open(cached, "rb") as file:  # noqa: PTH123  # modules' own paths
                raw = file.read()
            with open(source, "rb") as file:  # noqa: PTH123
                text = file.read()
            _caches[key] = not _taken(raw, status, text) or _compiles_to(text, raw[_HEADER:])
        return _caches[key]
    return True


_Identity = tuple[int, int, int, int, int]
_caches: dict[tuple[_Identity, _Identity], bool] = {}


def _taken(raw: bytes, status: os.stat_result, text: bytes) -> bool:
    """Whether an import takes this bytecode, by its header (PEP 552)."""
    flags = int.from_bytes(raw[4:8], "little")
    if raw[:4] != importlib.util.MAGIC_NUMBER or len(raw) < _HEADER:
        return False
    if not flags:
        wanted = (int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF)
        return (int.from_bytes(raw[8:12], "little"), int.from_bytes(raw[12:16], "little")) == wanted
    return not flags & 2 or raw[8:16] == importlib.util.source_hash(text)


def _compiles_to(text: bytes, bytecode: bytes) -> bool:
    try:
        found = marshal.loads(bytecode)  # noqa: S302  # as the import did, long before
        made = compile(text, found.co_filename, "exec", dont_inherit=True)
    except (ValueError, EOFError, TypeError, SyntaxError, AttributeError):
        return False
    return written(found) == written(made)


# ---- a program that is run to be measured ----------------------------------------------------------------


def report(fd: int, arguments: list[str], memory_files: Callable[[], frozenset[int]]) -> None:
    """Run a program (SCRIPT or -m MODULE, and its arguments) as Python does, and write down what it had loaded.

    Each line on `fd` is a file as a pair of Python's literals: the name, and its digest or what is wrong with it. The
    first is the program, the second the interpreter. All is written when the program ends, and again, with what came
    later, when the process does. SIGTERM ends the program unless it has a handler of its own. `memory_files`: as for
    `everything`.
    """
    os.set_inheritable(fd, False)  # noqa: FBT003  # as it is called
    os.register_at_fork(after_in_child=lambda: os.close(fd))  # so that whoever reads does not wait for children
    import runpy  # noqa: PLC0415  # for programs that are measured alone

    by_name = arguments[0] == "-m"
    if by_name:
        arguments = arguments[1:]
        program = _file_of_module(arguments[0])
    else:
        program = os.path.realpath(arguments[0])
        sys.path[0] = os.path.dirname(program)  # noqa: PTH120  # as Python spells it
    process, leave = os.getpid(), os._exit

    def write() -> None:
        if os.getpid() != process:
            return
        interpreter = os.readlink("/proc/self/exe")  # noqa: PTH115  # as in the mappings
        # Which of its own modules this package loads depends on the license
        own_files = map(str, sorted(Path(__file__).parent.rglob("*.py")))
        found = [Loaded(each, file_digest(each)) for each in (program, interpreter, *own_files)]
        _say(fd, [*found, *native(os.getpid(), memory_files()), *modules()])

    def leave_at_once(status: int) -> NoReturn:
        write()
        leave(status)

    if not program:
        _say(fd, [Loaded(arguments[0], None, "is no module that this Python finds")])
        return
    sys.argv = arguments
    unheeded = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if unheeded:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os._exit = leave_at_once
    atexit.register(write)
    try:
        if by_name:
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        write()
        if unheeded:  # from here on only threads are waited for
            signal.signal(signal.SIGTERM, lambda *_: leave(143))


def _file_of_module(name: str) -> str:
    """What `-m` runs of a module. Empty where there is none."""
    with suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
        return str((spec and spec.origin) or "")
    return ""


def _say(fd: int, found: list[Loaded]) -> None:
    with os.fdopen(os.dup(fd), "w") as out:
        out.writelines(ascii((one.name, one.digest or one.problem)) + "\n" for one in found)


# ---- digests ---------------------------------------------------------------------------------------------


def file_digest(path: str | os.PathLike[str]) -> bytes:
    """SHA-256 of a file's content, 32 bytes. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _digest(fd, os.fstat(fd))
    finally:
        os.close(fd)


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


_digests: dict[_Identity, bytes] = {}


def _digest(fd: int, status: os.stat_result) -> bytes:
    key = _identity(status)
    if key not in _digests:
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "no regular file")
        digest = hashlib.sha256()
        at = 0
        while part := os.pread(fd, _STEP, at):
            digest.update(part)
            at += len(part)
        _digests[key] = digest.digest()
    return _digests[key]
