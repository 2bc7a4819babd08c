"""Simulated PKCS#11 tokens: a real SoftHSM2 behind a module of ours that takes tokens out, crashes, hangs and lies."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import quote

from hwlicense_simulators import softhsm
from hwlicense_simulators.errors import SimulatorError
from hwlicense_simulators.softhsm import Installation

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Literal

    from hwlicense_simulators.softhsm import Place

_EC_POINT: Final = 0x181
_LONGEST_FORGERY, _MOST_BYTES = 1024, 0x4000  # what the module has room for
_LONGEST_LABEL, _LONGEST_SERIAL = 32, 16  # bytes in a CK_TOKEN_INFO
_PIN_LENGTHS: Final = range(4, 256)  # SoftHSM's


class Reader:
    """A PKCS#11 module with tokens in it, as a context manager. Any process may load the module, at any time.

    Without `folder` the tokens are thrown away at the end; with one they are kept there and used again, with their
    keys, PIN tries and places. A copy of that folder is a copy of its tokens.

    Faults hold in all processes from the next call on, also in those that have loaded the module before; each counts
    calls by itself, process by process, from when it is set. A function is named as in the standard, "C_DeriveKey";
    None means any. A token that is made while a process has the module in use is seen there only after the next
    C_Initialize: make it before, with plugged=False, and plug it when its time comes.

    Methods raise SimulatorError.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self.installation = Installation(Path(folder).absolute() if folder is not None else None)
        self._next_fault = 1
        self._forgotten = 0

    def __enter__(self) -> Self:
        self.installation.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.installation.close()

    @property
    def module(self) -> Path:
        """The shared object to load; it needs nothing in the environment."""
        return self.installation.folder / softhsm.MODULE

    @property
    def tokens(self) -> tuple[Token, ...]:
        """All tokens, plugged in or not."""
        return tuple(Token(reader=self, place=place) for place in self.installation.places)

    def token(self, label: str = "hwlicense", pin: str = "123456", tries: int = 3, *, plugged: bool = True) -> Token:
        """A new token with a user PIN and no keys. Labels need not differ."""
        _check_length("label", label, range(_LONGEST_LABEL + 1))
        _check_length("PIN", pin, _PIN_LENGTHS)
        if tries < 1:
            raise SimulatorError("a token has one PIN try at least")
        with self.installation.changing:
            return Token(reader=self, place=self.installation.make_token(label, pin, tries, present=plugged))

    # what was done with it

    @property
    def calls(self) -> list[str]:
        """The functions that were called since the beginning or `forget`, by any process, in order."""
        return softhsm.called(self.installation.log, self._forgotten)

    @property
    def overlaps(self) -> list[str]:
        """Those of the `calls` that a process began while another thread of it was in a call: it shall take turns."""
        return softhsm.called(self.installation.log, self._forgotten, "overlap")

    def forget(self) -> None:
        """Begin `calls` and `overlaps` anew."""
        self._forgotten = self.installation.log.stat().st_size if self.installation.log.exists() else 0

    @property
    def open_sessions(self) -> int:
        """How many sessions are open now, in all processes that still run."""
        return sum(map(self._valid, softhsm.sessions(self.installation.log)[0]))

    @property
    def logged_in(self) -> bool:
        """Whether any process that still runs is logged in to a token."""
        return any(map(self._valid, softhsm.sessions(self.installation.log)[1]))

    @property
    def awaiting_touch(self) -> bool:
        """Whether a call waits for `touch` now."""
        return softhsm.awaiting_touch(self.installation.log)

    # faults

    def crash(self, function: str | None = None, nth: int = 1) -> None:
        """Kill the process by SIGSEGV at the nth call."""
        self._fault("crash", function, nth)

    def hang(self, function: str | None = None, nth: int = 1) -> None:
        """Never return from the nth call. Signals that end a process still do; those that are handled do not help."""
        self._fault("hang", function, nth)

    def slow(self, seconds: float, function: str | None = None) -> None:
        """Take that much longer for each call."""
        self._fault("slow", function, round(seconds * 1000))

    def fail(self, function: str, code: int) -> None:
        """Return a CK_RV and do nothing else; 0 claims success."""
        self._fault("fail", function, code)

    def wrong_secret(self) -> None:
        """Flip a bit in secret keys as their CKA_VALUE is read, and in what C_Decrypt gives."""
        self._secret("wrong", 0)

    def short_secret(self, by: int = 1) -> None:
        """Leave out the last bytes of secret keys and decrypted data."""
        self._secret("short", by)

    def long_secret(self, by: int = 1) -> None:
        """Append bytes to secret keys and decrypted data."""
        self._secret("long", by)

    def forge(self, attribute: int, value: bytes) -> None:
        """Give this value of an attribute for every object that has it; searches go by it, too."""
        if len(value) > _LONGEST_FORGERY:
            raise SimulatorError(f"no attribute of more than {_LONGEST_FORGERY} bytes can be forged")
        self.installation.set_fault(("forge", attribute), f"forge {attribute} x{value.hex()}")

    def forge_point(self, point: bytes) -> None:
        """Show another public key: an uncompressed point (04, x, y), which CKA_EC_POINT holds as an OCTET STRING."""
        if len(point) not in {65, 97}:
            raise SimulatorError("a point of P-256 has 65 bytes, one of P-384 has 97")
        self.forge(_EC_POINT, bytes((4, len(point))) + point)

    def hide_mechanisms(self, *numbers: int) -> None:
        """Be a token without these mechanisms: neither listed nor accepted."""
        for number in numbers:
            self.installation.set_fault(("hide", number), f"hide {number}")

    def await_touch(self, seconds: float = 15) -> None:
        """Let C_DeriveKey and C_Decrypt wait for `touch`, each for its own; after `seconds` they give up (CKR 0x50)."""
        self.installation.set_fault(("touch", None), f"touch {round(seconds * 1000)}")

    def touch(self, seconds: float = 10) -> None:
        """Touch the token as soon as a call asks for it. Raises SimulatorError if none does within `seconds`."""
        deadline = time.monotonic() + seconds
        while not self.awaiting_touch:
            if time.monotonic() > deadline:
                raise SimulatorError("nothing awaits a touch", "touch while a call waits: see await_touch()")
            time.sleep(0.005)
        self.installation.touch()

    def heal(self) -> None:
        """End all faults. Tokens stay where they are, and their PIN tries as they are: `plug` and `unlock` them."""
        self.installation.heal()

    # inside

    def _fault(self, kind: str, function: str | None, number: int) -> None:
        if function is not None and function not in softhsm.functions():
            raise SimulatorError(f"PKCS#11 has no function {function!r}", 'write it as "C_DeriveKey"')
        with self.installation.changing:
            self.installation.set_fault((kind, function), f"fault {kind} {function or '*'} {number} {self._next_fault}")
            self._next_fault += 1

    def _secret(self, how: str, by: int) -> None:
        if not 0 <= by <= _MOST_BYTES:
            raise SimulatorError(f"a secret differs by {_MOST_BYTES} bytes at most")
        self.installation.set_fault(("secret", None), f"secret {how[0]} {by}")

    def _valid(self, session: softhsm.Session) -> bool:
        """Whether the token has not been pulled since."""
        places = ((place.serial, place.generation) for place in self.installation.places)
        return (session.serial, session.generation) in places


class Token:
    """A PKCS#11 token, plugged in: one of a `Reader`, which its method `token` makes, or as a context manager alone.

    Alone it has a reader of its own, `reader`; with `folder` it is kept there, and stays what it was made as. After
    `tries` wrong PINs it is locked, as SoftHSM never is.

    Methods raise SimulatorError.
    """

    def __init__(
        self,
        label: str = "hwlicense",
        pin: str = "123456",
        tries: int = 3,
        *,
        folder: Path | str | None = None,
        reader: Reader | None = None,
        place: Place | None = None,
    ) -> None:
        self.reader = reader or Reader(folder)
        self._made_as = (label, pin, tries)
        self._place = place

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.enter_context(self.reader)
            kept = self.reader.tokens
            self._place = kept[0].place if kept else self.reader.token(*self._made_as).place
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.reader.__exit__(kind, error, traceback)

    @property
    def place(self) -> Place:
        """What its reader knows of it."""
        if self._place is None:
            raise SimulatorError("the simulated token is not in use", "use it as a context manager")
        return self._place

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Token) and self.place is other.place

    def __hash__(self) -> int:
        return hash(self.place.serial)

    # what it is

    @property
    def label(self) -> str:
        """The label it shows."""
        return self.place.label

    @property
    def serial(self) -> str:
        """The serial it shows."""
        return self.place.shown_serial

    @property
    def pin(self) -> str:
        """The user PIN it was made with."""
        return self.place.pin

    @property
    def slot(self) -> int:
        """The id of the slot it is in, or was in last."""
        return self.place.slot

    @property
    def plugged(self) -> bool:
        """Whether it is plugged in."""
        return self.place.present

    @property
    def uri(self) -> str:
        """Its PKCS#11 URI (RFC 7512), without the PIN."""
        return (
            f"pkcs11:token={quote(self.label, safe='')};serial={quote(self.serial, safe='')}"
            f"?module-path={quote(str(self.reader.module))}"
        )

    @property
    def environment(self) -> dict[str, str]:
        """The variable for a child process: HWLICENSE_TOKEN."""
        return {"HWLICENSE_TOKEN": self.uri}

    @property
    def folder(self) -> Path:
        """SoftHSM's folder of this token: what an attacker copies. Its keys are in it, encrypted under the PIN."""
        return self.reader.installation.home / "tokens" / self.place.folder

    # hands on it

    def pull(self) -> None:
        """Take it out: its sessions and logins are gone in all processes, for good."""
        with self._changing():
            self._take_out()

    def plug(self, slot: Literal["same", "other"] = "same") -> None:
        """Put it back, in the slot where it was or one that was never there."""
        with self._changing():
            self._put_into(self.slot if slot == "same" else self.reader.installation.new_slot())

    def swap(self, other: Token) -> None:
        """Take it out and put `other`, which was out, into its slot, at one stroke."""
        if other.plugged or other not in self.reader.tokens:
            raise SimulatorError("the other token must be unplugged, and one of the same reader")
        with self._changing():
            self._take_out()
            other._put_into(self.slot)

    def present_as(self, label: str | None = None, serial: str | None = None) -> None:
        """Show another label or serial, such as that of another token."""
        _check_length("label", label or "", range(_LONGEST_LABEL + 1))
        _check_length("serial", serial or "", range(_LONGEST_SERIAL + 1))
        with self._changing():
            self.place.label = self.label if label is None else label
            self.place.shown_serial = self.serial if serial is None else serial

    @property
    def tries_left(self) -> int:
        """How many wrong PINs it takes until it is locked."""
        path = self._tries
        text = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        return int(text) if text else self.place.tries

    def unlock(self) -> None:
        """Give it all PIN tries again."""
        softhsm.write(self._tries, [str(self.place.tries)])

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with self.reader.installation.changing:
            yield
            self.reader.installation.give_orders()

    def _take_out(self) -> None:
        if not self.plugged:
            raise SimulatorError(f"the token {self.label} is out already")
        self.place.present = False
        self.place.generation += 1

    def _put_into(self, slot: int) -> None:
        if self.plugged:
            raise SimulatorError(f"the token {self.label} is plugged in already")
        if any(token.plugged and token.slot == slot for token in self.reader.tokens):
            raise SimulatorError(f"another token is in slot {slot}", 'pull it, or use slot="other"')
        self.place.slot, self.place.present = slot, True

    @property
    def _tries(self) -> Path:
        return self.reader.installation.home / "tries" / self.place.serial


def _check_length(what: str, text: str, lengths: range) -> None:
    if len(text.encode()) not in lengths:
        raise SimulatorError(f"a {what} has {lengths.start} to {lengths.stop - 1} bytes")
