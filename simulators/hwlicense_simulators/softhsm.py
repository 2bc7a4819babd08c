"""The folder of a simulated token's module: a SoftHSM2 of its own, what it is ordered to do, and what it recorded."""

from __future__ import annotations

import fcntl
import functools
import os
import re
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hwlicense_simulators.errors import ProgramMissingError, SimulatorError, program
from hwlicense_simulators.process import ShortFolder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MODULE: Final = "simulated-token.so"
_LIBRARY: Final = "libsofthsm2.so"
_FOLDERS: Final = (
    "usr/lib/softhsm",
    "usr/lib/*/softhsm",
    "usr/lib64/softhsm",
    "usr/lib64/pkcs11",
    "usr/local/lib/softhsm",
)
SECURITY_OFFICER_PIN: Final = "87654321"
_SERIAL: Final = 16  # digits: the last of the UUID that SoftHSM gives to a token's folder
_MOST_TOKENS: Final = 16  # as many as the module has room for
_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass
class Place:
    """One token, and where it is. `serial` is SoftHSM's; what is `shown` may differ."""

    folder: str
    label: str
    pin: str
    tries: int
    slot: int
    present: bool
    shown_serial: str = ""
    generation: int = 0

    @property
    def serial(self) -> str:
        """The serial that SoftHSM made from the name of the token's folder."""
        return self.folder.replace("-", "")[-_SERIAL:]

    @property
    def line(self) -> str:
        """What the module is told; the last two words are for `parse` alone."""
        numbers = f"{self.slot} {self.present:d} {self.generation} {self.tries}"
        texts = " ".join(map(_hexadecimal, (self.label, self.shown_serial, self.pin)))
        return f"token {self.serial} {numbers} {texts} {self.folder}"

    @classmethod
    def parse(cls, line: str) -> Place:
        """The token that `line` tells of. Raises SimulatorError."""
        try:
            _, _, slot, present, generation, tries, *texts, folder = line.split()
            label, shown, pin = (bytes.fromhex(text.removeprefix("x")).decode() for text in texts)
            return cls(folder, label, pin, int(tries), int(slot), present == "1", shown, int(generation))
        except ValueError as error:
            raise SimulatorError(f"this is no kept token: {line!r}", "use another folder") from error


@dataclass(frozen=True)
class Session:
    """A session that was opened, or a login: what must still be true if it is to count."""

    process: int
    serial: str
    generation: int


def _hexadecimal(text: str) -> str:
    return f"x{text.encode().hex()}"


class Installation:
    """A module with its SoftHSM2 in a folder of their own, and the tokens, kept elsewhere if there is a `kept`.

    Methods raise SimulatorError. Whoever changes `places` holds `changing`, and gives orders before letting go.
    """

    def __init__(self, kept: Path | None) -> None:
        self.places: list[Place] = []
        self.changing = threading.RLock()  # so that one thread may touch or pull while another works
        self._kept = kept
        self._short: ShortFolder | None = None
        self._lock: int | None = None
        self._faults: dict[tuple[str, object], str] = {}
        self._touches = 0

    def open(self) -> None:
        """Install everything, and take up the tokens that were kept."""
        try:
            self._short = ShortFolder()
            self._open_home()
            self._install()
            self.give_orders()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove what is not kept."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._short is not None:
            self._short.close()

    @property
    def folder(self) -> Path:
        """Where the module is, for as long as it is in use."""
        if self._short is None:
            raise SimulatorError("the simulated token is not in use", "use it as a context manager")
        return self._short.path

    @property
    def home(self) -> Path:
        """Where the tokens are."""
        return self._kept or self.folder / "home"

    @property
    def log(self) -> Path:
        """What the module records: a line for each call, and for what came of some."""
        return self.folder / "log"

    def make_token(self, label: str, pin: str, tries: int, *, present: bool) -> Place:
        """Make a new token, in a new slot, with SoftHSM's own tool."""
        if len(self.places) == _MOST_TOKENS:
            raise SimulatorError(f"a reader has room for {_MOST_TOKENS} tokens")
        before = set((self.home / "tokens").iterdir())
        command = (
            *(program("softhsm2-util"), "--module", self.folder / _LIBRARY, "--init-token", "--free"),
            *("--label", label, "--so-pin", SECURITY_OFFICER_PIN, "--pin", pin),
        )
        done = subprocess.run(
            command,
            env=os.environ | {"SOFTHSM2_CONF": str(self.folder / "softhsm2.conf")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        made = set((self.home / "tokens").iterdir()) - before
        if done.returncode or len(made) != 1:
            raise SimulatorError(f"SoftHSM did not make a token: {(done.stderr or done.stdout).strip()}")
        place = Place(made.pop().name, label, pin, tries, self.new_slot(), present=present)
        place.shown_serial = place.serial
        self.places.append(place)
        self.give_orders()
        return place

    def new_slot(self) -> int:
        """The id of a slot where no token was before."""
        return max((place.slot for place in self.places), default=-1) + 1

    def set_fault(self, key: tuple[str, object], line: str) -> None:
        """Order a fault, instead of the one that was ordered under this key."""
        with self.changing:
            self._faults[key] = line
            self.give_orders()

    def heal(self) -> None:
        """End all faults."""
        with self.changing:
            self._faults.clear()
            self.give_orders()

    def touch(self) -> None:
        """Touch the token."""
        with self.changing:
            self._touches += 1
            self.give_orders()

    def give_orders(self) -> None:
        """Tell the module, in all processes that have loaded it."""
        tokens = [place.line for place in self.places]
        write(self.home / "places", tokens)
        write(self.folder / "orders", [*tokens, f"touches {self._touches}", *self._faults.values()])

    def _open_home(self) -> None:
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self.home / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SimulatorError(
                f"another process uses the tokens in {self.home}", "wait for it, or use another folder"
            ) from None
        places = self.home / "places"
        if places.exists():
            self.places = [Place.parse(line) for line in places.read_text(encoding="utf-8").splitlines()]

    def _install(self) -> None:
        if os.statvfs(self.folder).f_flag & os.ST_NOEXEC:
            raise SimulatorError(
                f"no library can be loaded from {self.folder}", "set TMPDIR to a folder that is not mounted noexec"
            )
        for name in ("tokens", "tries"):
            (self.home / name).mkdir(mode=0o700, exist_ok=True)
            (self.folder / name).symlink_to(self.home / name)
        shutil.copyfile(_library(), self.folder / _LIBRARY)
        (self.folder / MODULE).write_bytes(_compiled())
        # The path is short and plain: SoftHSM would take a # in it for a comment.
        configuration = ("objectstore.backend = file", "log.level = ERROR", "slots.removable = true")
        write(self.folder / "softhsm2.conf", [f"directories.tokendir = {self.folder}/tokens", *configuration])


def _library() -> Path:
    found = (path for folder in _FOLDERS for path in sorted(Path("/").glob(f"{folder}/{_LIBRARY}")))
    if path := next(found, None):
        return path
    raise ProgramMissingError(f"{_LIBRARY} is not installed", "sudo apt-get install softhsm2")


@functools.cache
def _compiled() -> bytes:
    compiler = program("cc")
    source = Path(__file__).with_name("token_module.c")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "module.so")
        options = ("-std=gnu11", "-shared", "-fPIC", "-O1", "-fvisibility=hidden")
        done = subprocess.run(
            [compiler, *options, "-o", built, source, "-ldl"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SimulatorError(
                f"the simulated token's module did not compile: {done.stderr.strip()}",
                "sudo apt-get install gcc libc6-dev",
            )
        return built.read_bytes()


def write(path: Path, lines: Iterable[str]) -> None:
    """Replace a file in one go: who reads it sees the old lines or the new ones."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    fresh.replace(path)


@functools.cache
def functions() -> frozenset[str]:
    """The names of all functions of the module."""
    source = Path(__file__).with_name("token_module.c").read_text(encoding="utf-8")
    return frozenset(re.findall(r"\bF\((C_\w+), \w+\)", source))


def called(log: Path, start: int = 0, word: str = "call") -> list[str]:
    """The names of the functions that were called, by any process, in order, from byte `start` of the log."""
    return [words[0] for _, _, first, *words in _read(log, start) if first == word]


def awaiting_touch(log: Path) -> bool:
    """Whether a call in some process that still runs awaits a touch."""
    waiting: dict[int, int] = {}
    for process, at, word, *_ in _read(log):
        if word == "awaiting":
            waiting[int(process)] = int(at)
        elif word == "awaited":
            waiting.pop(int(process), None)
    return any(_runs(process, at) for process, at in waiting.items())


def sessions(log: Path) -> tuple[list[Session], list[Session]]:
    """What processes that still run have opened and not closed, and to which tokens they have logged in."""
    opened: dict[tuple[int, str], Session] = {}
    logins: set[Session] = set()
    last: dict[int, int] = {}
    for number, at, word, *words in _read(log):
        process = int(number)
        last[process] = int(at)
        if word == "restarted":
            opened = {key: session for key, session in opened.items() if session.process != process}
            logins = {login for login in logins if login.process != process}
        elif word in {"opened", "closed", "in", "out"}:
            session = Session(process, words[0], int(words[1]))
            if word == "opened":
                opened[process, words[2]] = session
            elif word == "closed":
                opened.pop((process, words[2]), None)
            elif word == "in":
                logins.add(session)
            else:
                logins.discard(session)
            logins &= set(opened.values())  # the last session that is closed takes the login with it
    running = {process for process, at in last.items() if _runs(process, at)}
    return (
        [session for session in opened.values() if session.process in running],
        [login for login in logins if login.process in running],
    )


def _read(log: Path, start: int = 0) -> Iterator[list[str]]:
    try:
        with log.open("rb") as file:
            file.seek(start)
            lines = file.read().decode()
    except FileNotFoundError:
        return
    yield from (line.split() for line in lines[: lines.rfind("\n") + 1].splitlines())


def _runs(process: int, at: int) -> bool:
    """Whether the process that had this number `at` (milliseconds since boot) still runs."""
    try:
        state, *numbers = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX" and int(numbers[18]) * 1000 // _TICKS <= at
