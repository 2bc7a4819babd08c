"""The guard's checks: what in and around this process could read keys and plaintext, or change what becomes of them.

Nothing here prevents anything. Each check gives what it found, in a few words; docs/guard.md says what else can cause
it, and how far it goes. Code that runs in this process with the intent to hide can hide from all of them.
"""

from __future__ import annotations

import ctypes
import os
import site
import sys
import sysconfig
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hwlicense.core.process import CHECKS, PRELOADS
from hwlicense.device.memory import protection
from hwlicense.device.own_code import replaced
from hwlicense.loaded import mappings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import FrameType

    from hwlicense.core.process import Check

PRELOADED: Final = Path("/etc/ld.so.preload")

_PYTHON: Final = (
    "PYTHONPATH", "PYTHONHOME", "PYTHONPLATLIBDIR", "PYTHONUSERBASE", "PYTHONEXECUTABLE", "PYTHONSTARTUP",
    "PYTHONINSPECT", "PYTHONBREAKPOINT", "PYTHONWARNINGS", "PYTHONPYCACHEPREFIX", "PYTHONCASEOK", "PYTHONDEVMODE",
    "PYTHONTRACEMALLOC", "PYTHONMALLOC", "PYTHONDUMPREFS", "PYTHONDUMPREFSFILE", "PYTHONPERFSUPPORT",
    "PYTHON_PERF_JIT_SUPPORT", "PYTHON_PRESITE", "PYTHONOPTIMIZE",
)  # fmt: skip
"""Variables that change which code runs, or show what it does. Others change how text is read and written."""

_WATCHED: Final = ("hwlicense", "cryptography", "blake3", "msgspec", "tpm2_pytss", "pkcs11", "usb")
"""Packages that keys pass through. Where one is not installed, there is nothing to be found of it."""


class Finding(NamedTuple):
    """What one check found."""

    check: Check
    what: str


def findings(named: Sequence[Check] = CHECKS, objects: Iterable[object] = ()) -> list[Finding]:
    """All that these checks find now. `objects` are open models, which may have had their methods replaced."""
    found: list[Finding] = []
    for name in named:
        try:
            found += [Finding(name, what) for what in (_CHECKS[name]() if name != "replaced" else replaced(objects))]
        except OSError as error:
            found.append(Finding(name, f"cannot be looked at ({error.strerror or error}): is /proc mounted?"))
    return found


# ---- who watches -----------------------------------------------------------------------------------------


def _debugger() -> Iterator[str]:
    tracers = {_field(task / "status", "TracerPid") for task in Path("/proc/self/task").iterdir()}
    for tracer in sorted(tracers - {"0", ""}):
        yield f"process {tracer} ({_name_of(tracer)}) traces this one"
    if protection().dumpable:
        yield "the process can be traced and dumped (PR_SET_DUMPABLE was set)"


def _field(status: Path, name: str) -> str:
    with suppress(OSError):  # a thread that has just ended
        for line in status.read_text(errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return line.split()[1]
    return ""


def _name_of(process: str) -> str:
    try:
        return Path("/proc", process, "comm").read_text(errors="replace").strip()
    except OSError:  # hidden, or in another namespace
        return "not to be seen from here"


def _tracing() -> Iterator[str]:
    hooks: list[tuple[str, Callable[[], object]]] = [
        ("sys.settrace", sys.gettrace),
        ("sys.setprofile", sys.getprofile),
        ("threading.settrace", threading.gettrace),
        ("threading.setprofile", threading.getprofile),
    ]
    yield from (f"{name} has a function set" for name, get in hooks if get() is not None)
    if any(_traced(frame) for frame in sys._current_frames().values()):  # noqa: SLF001  # hooks of other threads
        yield "a thread is traced (sys.settrace)"
    monitoring: Any = getattr(sys, "monitoring", None)  # from Python 3.12 on
    for number in range(6 if monitoring else 0):
        if tool := monitoring.get_tool(number):
            yield f"sys.monitoring has the tool {tool!r}"


def _traced(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_trace is not None:
            return True
        frame = frame.f_back
    return False


# ---- how it was started ----------------------------------------------------------------------------------


def _preloaded() -> Iterator[str]:
    mapped = {os.path.basename(each.path) for each in mappings(os.getpid())}  # noqa: PTH119  # of text

    def told(source: str, libraries: list[str]) -> Iterator[str]:
        for library in libraries:
            loaded = "" if os.path.basename(library) in mapped else ", which is not loaded"  # noqa: PTH119
            yield f"{source} names {library}{loaded}"

    environment = _first_environment()
    for name in PRELOADS:
        yield from told(name, environment.get(name, "").replace(":", " ").split())
    with suppress(OSError):
        lines = PRELOADED.read_text(errors="replace").splitlines()
        named = [word for line in lines for word in line.partition("#")[0].replace(":", " ").split()]
        yield from told(str(PRELOADED), named)


def _first_environment() -> dict[str, str]:
    """The variables that this process was started with, whatever was taken out since.

    Read where the kernel put them: /proc/self/environ is closed to a process of an ordinary user that is not dumpable.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])  # env_start and env_end: 50 and 51 of all (proc(5))
    raw = ctypes.string_at(start, end - start) if start else b""
    pairs = (os.fsdecode(each).partition("=") for each in raw.split(b"\0"))
    return {name: value for name, equals, value in pairs if equals} | dict(os.environ)


def _environment() -> Iterator[str]:
    given = {} if sys.flags.ignore_environment else _first_environment()
    yield from (f"{name} is set" for name in _PYTHON if given.get(name))
    if sys.flags.optimize and not given.get("PYTHONOPTIMIZE"):
        yield "Python was started with -O"
    if sys.flags.inspect or sys.flags.interactive:
        yield "Python was started with -i"


def _site() -> Iterator[str]:
    for name in ("sitecustomize", "usercustomize"):
        if module := sys.modules.get(name):
            yield f"{name} was loaded from {getattr(module, '__file__', None)}"
    if not sys.flags.no_site:
        for folder in _packages():
            for file in sorted(folder.glob("*.pth")):
                with suppress(OSError):
                    if any(line.startswith(("import ", "import\t")) for line in _lines(file)):
                        yield f"{file} runs code"


def _lines(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines()


def _packages() -> list[Path]:
    """Folders whose .pth files are heeded at the start."""
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return list(dict.fromkeys(map(Path, [*site.getsitepackages(), *user])))


# ---- what it runs ----------------------------------------------------------------------------------------


def _swap() -> Iterator[str]:
    if left := protection().swappable:
        yield f"{left:,} bytes are not locked, and the system swaps"


def _shadowed() -> Iterator[str]:
    """Packages and parts of the standard library that were imported from elsewhere than where these are installed."""
    installed = _real([*site.getsitepackages(), *map(sysconfig.get_path, ("purelib", "platlib"))])
    standard = _real([*map(sysconfig.get_path, ("stdlib", "platstdlib")), *_zipped()])
    elsewhere: dict[tuple[str, str], str] = {}
    for name, module in sorted(sys.modules.items(), key=lambda item: item[0]):
        top = name.partition(".")[0]
        file = getattr(module, "__dict__", {}).get("__file__")
        if not isinstance(file, str) or top == "__main__":
            continue
        if top in sys.stdlib_module_names and top not in {"sitecustomize", "usercustomize"}:
            expected = standard
        elif top in _WATCHED:
            expected = installed
        else:
            continue
        if not os.path.realpath(file).startswith(expected):
            # A whole package that is elsewhere is one finding, not one for each of its modules
            package = os.path.dirname(file) if "." in name or hasattr(module, "__path__") else file  # noqa: PTH120
            if not any(of == top and package.startswith(os.path.join(seen, "")) for of, seen in elsewhere):  # noqa: PTH118
                elsewhere.setdefault((top, package), name)
    yield from (f"{name} was loaded from {place}" for (_, place), name in elsewhere.items())


def _real(folders: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(os.path.join(os.path.realpath(folder), "") for folder in folders if folder)  # noqa: PTH118


def _zipped() -> list[str]:
    return [folder for folder in sys.path if folder.endswith(".zip") and folder.startswith(sys.base_prefix)]


_CHECKS: Final[dict[Check, Callable[[], Iterator[str]]]] = {
    "debugger": _debugger,
    "tracing": _tracing,
    "preloaded": _preloaded,
    "environment": _environment,
    "site": _site,
    "swap": _swap,
    "shadowed": _shadowed,
}
