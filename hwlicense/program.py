"""Which program a process runs: by the code that its main thread began with, whatever its modules say of themselves.

`__file__`, `__spec__`, `sys.argv` and `sys.orig_argv` are the program's to write; frames, and the code that they run,
are not. A file counts where it holds that very code.
"""

from __future__ import annotations

import marshal
import sys
import threading
from functools import cache
from importlib.machinery import FrozenImporter
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from zipimport import ZipImportError, zipimporter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_FROZEN: Final = "<frozen "
_HEADER: Final = 16  # of a cache of bytecode (PEP 552)
_FUNCTION: Final = 0x2  # CO_NEWLOCALS
_MULTIPROCESSING: Final = ({"multiprocessing.spawn", "spawn_main"}, {"multiprocessing.forkserver", "main"})
"""All that is named by what a child of spawn or of forkserver is started with, by -c."""


class Origin(NamedTuple):
    """A file that the program's code is of; or what is wrong with it, and its name."""

    file: str
    problem: str = ""


def origins() -> tuple[Origin, ...]:
    """The file of the program; of a child that multiprocessing started afresh, those of all code that it is in.

    What was found once stays, as the main thread may leave the program later: while it ends, or in forked children.
    """
    try:
        return _found()
    except _DoubtfulError as error:
        return (Origin(*error.args),)


class _DoubtfulError(Exception):
    """Name and problem."""


@cache  # whose memory no other code of Python writes into
def _found() -> tuple[Origin, ...]:
    main = _codes(sys._current_frames().get(threading.main_thread().ident or 0))  # noqa: SLF001  # there is no other way
    runner: dict[Origin, None] = {}  # of -m, and of folders and archives, where it is a file like others
    while main:
        if _runs_modules(main[0]):
            runner[_origin(main[0], whole=False)] = None
        elif not _frozen(main[0], "runpy"):
            break
        del main[0]
    if main and set(main[0].co_names) in _MULTIPROCESSING and main[0].co_filename == "<string>":
        inside = [code for code in (*main, *_codes(sys._getframe())) if code is not main[0]]  # noqa: SLF001
        return tuple({_origin(code, whole=False): None for code in inside if not _frozen(code)})
    if not main or main[0].co_flags & _FUNCTION:
        raise _DoubtfulError("the program", "cannot be told: the main thread is not in it; open a package while it is")
    if main[0].co_filename.startswith("<"):
        raise _DoubtfulError("__main__", "is in no file: given on the command line, piped, or typed")
    return (*runner, _origin(main[0], whole=True))


def _runs_modules(code: CodeType) -> bool:
    return bool(code.co_flags & _FUNCTION) and code.co_filename.endswith("/runpy.py")


def _codes(frame: FrameType | None) -> list[CodeType]:
    """What a thread runs, from the outermost on."""
    found = []
    while frame is not None:
        found.append(frame.f_code)
        frame = frame.f_back
    return found[::-1]


def _frozen(code: CodeType, name: str = "") -> bool:
    """Whether it is code of a module within the interpreter, of that name or of its own."""
    told = code.co_filename[len(_FROZEN) : -1]
    if not code.co_filename.startswith(_FROZEN) or (name and told != name):
        return False
    try:
        made: Any = FrozenImporter.get_code(told)
    except ImportError:
        return False
    return written(code) in _parts(made)


def _origin(code: CodeType, *, whole: bool) -> Origin:
    """The file that holds this code: as a `whole`, or as a part of it."""
    claimed = getattr(sys.modules.get("__main__"), "__file__", None)
    if code.co_filename.startswith("<"):
        raise _DoubtfulError(code.co_filename, "is code in no file")
    problem = "does not hold the code that runs under its name"
    for path in (code.co_filename, *([claimed] if whole and isinstance(claimed, str) else [])):
        try:
            file, made = _compiled(path, code.co_filename)
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        else:
            if made is not None and (written(code) == written(made) if whole else written(code) in _parts(made)):
                return Origin(file)
    raise _DoubtfulError(code.co_filename, problem)


def _compiled(path: str, name: str) -> tuple[str, CodeType | None]:
    """The file that lies there, the archive where it is in one, and the code of its module. Raises OSError."""
    archive = next((str(each) for each in Path(path).parents if each.is_file()), "")
    try:
        if archive:
            module = path.removeprefix(archive).strip("/").removesuffix(".py").replace("/", ".")
            return archive, zipimporter(archive).get_code(module)
        raw = Path(path).read_bytes()
        if path.endswith(".pyc"):
            made = marshal.loads(raw[_HEADER:])  # noqa: S302  # as the interpreter did
            return path, made if isinstance(made, CodeType) else None
        return path, compile(raw, name, "exec", dont_inherit=True)
    except (ZipImportError, ValueError, EOFError, TypeError, SyntaxError):
        return path, None


def _parts(code: CodeType) -> set[bytes]:
    return {written(each) for each in _within(code)}


def _within(code: CodeType) -> Iterator[CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _within(each)


def written(code: CodeType) -> bytes:
    """A code object in one form: version 0 of the format does not depend on who else refers to its parts."""
    return marshal.dumps(code, 0)
