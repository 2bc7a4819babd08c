"""In the module's process: the module, the tokens that are plugged in, and the sessions with them.

Slots are listed anew at each request. A session stays open, with its login, for as long as its token stays; what a
token answered once it was out or in again is never taken for what it is now.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, get_args

import pkcs11
from pkcs11 import KDF, MGF, Attribute, KeyType, Mechanism, PKCS11Error, Session, Slot, Token
from pkcs11 import TokenNotPresent as TokenGone

from hwlicense.binders.pkcs11 import objects, protocol
from hwlicense.binders.pkcs11.codes import STALE, code
from hwlicense.binders.pkcs11.protocol import (
    Ability,
    Absent,
    Answer,
    Compute,
    Computed,
    Done,
    Failed,
    Generate,
    Generated,
    Inspect,
    Inspected,
    LogIn,
    Look,
    PinNeeded,
    Place,
    Seen,
    Tokens,
    TokenState,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11 import Object

    from hwlicense.binders.pkcs11.objects import Public
    from hwlicense.core.documents import Mechanism as Named
    from hwlicense.core.uri import TokenUri

T = TypeVar("T")

_HASHES: Final[dict[Named, tuple[Mechanism, MGF]]] = {
    "rsa-oaep-sha256": (Mechanism.SHA256, MGF.SHA256),
    "rsa-oaep-sha1": (Mechanism.SHA_1, MGF.SHA1),
}
_SECRET_BITS: Final = 256
_ATTEMPTS, _MOMENT = 10, 0.01  # seconds between them
_PIN_REFUSED: Final = (
    pkcs11.PinExpired,
    pkcs11.PinIncorrect,
    pkcs11.PinInvalid,
    pkcs11.PinLenRange,
    pkcs11.PinLocked,
)


class Opened(NamedTuple):
    """A session, and whether it is logged in."""

    session: Session
    logged_in: bool


class Plugged(NamedTuple):
    """A token as it was listed just now: `token.flags` are of that moment."""

    place: Place
    token: Token


class Found(NamedTuple):
    """What a token shows of one key. `shy`: it shows no keys at all, so this one may be among them."""

    public: Public | None
    private: Object | None
    shy: bool


class Pin:
    """A PIN in the clothes of a text: python-pkcs11 asks a text for its bytes, and copies them nowhere itself."""

    def __init__(self, pin: bytearray) -> None:
        self._pin = pin

    def encode(self, _encoding: str) -> bytearray:
        """The very bytes that are wiped afterwards."""
        return self._pin


class Module:
    """A loaded module. Methods raise python-pkcs11's errors, and whatever it stumbles over in the module's answers."""

    def __init__(self, path: str) -> None:
        self._library = pkcs11.lib(path)
        self._sessions: dict[Place, Opened] = {}
        self.leaking = False
        """Whether sessions are open that nobody can close: python-pkcs11 forgets them when a login fails."""

    @property
    def logins(self) -> int:
        """How many tokens this process is logged in to."""
        return sum(opened.logged_in for opened in self._sessions.values())

    def close(self) -> None:
        """Log out of everything and finalize the module."""
        for place in tuple(self._sessions):
            self._forget(place)
        self._library.finalize()

    # requests

    def tokens(self) -> Tokens:
        """All tokens."""
        return Tokens([self._state(plugged) for plugged in self._plugged()])

    def look(self, request: Look) -> Answer:
        """Whether the key is here, without using it."""
        shy: list[Plugged] = []
        plugged, problems = self._plugged(request.hint), list[tuple[Place, PKCS11Error]]()
        for one in plugged:
            found = self._found(one, request.key, problems)
            if found and found.public:
                return Seen(self._state(one), hidden=False)
            if found and found.shy and _named(request.hint, one.place):
                shy.append(one)
        return Seen(self._state(shy[0]), hidden=True) if shy else self._absent(plugged, problems)

    def compute(self, request: Compute, pin: bytearray) -> tuple[Answer, bytearray]:
        """The answer, and in its secret part what the token computed.

        A token that is ready goes before one that needs a login, and one that shows the key before one that is shy.
        """
        waiting, shy = list[Answer](), list[Answer]()
        plugged, problems = self._plugged(request.hint), list[tuple[Place, PKCS11Error]]()
        for one in plugged:
            found = None if one.place in request.skip else self._found(one, request.key, problems)
            if found is not None and found.public is not None:
                answer, secret = self._computed(one, found.private, request, pin)
                if isinstance(answer, PinNeeded):
                    waiting.append(answer)
                elif answer is not None:
                    return answer, secret
            elif found is not None and found.shy and self._closed(one) and _named(request.hint, one.place):
                shy.append(PinNeeded(self._state(one), each_time=False))
        return next(iter(waiting + shy), None) or self._absent(plugged, problems), bytearray()

    def log_in(self, request: LogIn, pin: bytearray) -> Answer:
        """One try, at a token that is as whoever gave the PIN was told."""
        one = self._at(request.place)
        if self._logged_in(one.place):
            return Done()
        if one.token.flags & protocol.PIN_LOCKED:
            return Failed("PIN_LOCKED", self._state(one))
        if one.token.flags & protocol.PIN_FINAL_TRY and not request.last_try:
            return Failed(protocol.LAST_TRY_UNSEEN, self._state(one))
        try:
            session = one.token.open(user_pin=Pin(pin))
        except pkcs11.UserAlreadyLoggedIn:
            session = one.token.open()
        except PKCS11Error as error:
            self.leaking = True
            return self.refused(error, one.place)
        self._forget(one.place)
        self._sessions[one.place] = Opened(session, logged_in=True)
        return Done()

    def inspect(self, request: Inspect) -> Inspected:
        """Keys and certificates of one token."""
        one = self._at(request.place)
        closed = bool(one.token.flags & protocol.LOGIN_REQUIRED)
        found = self._with_session(one, lambda session: objects.keys(session, login_required=closed))
        return Inspected(self._state(one), found, self._with_session(one, objects.certificates))

    def generate(self, request: Generate) -> Generated:
        """A key pair whose private half never leaves the token."""
        one = self._at(request.place)
        session = one.token.open(rw=True)
        try:
            return Generated(objects.generate(session, request.kind, request.identifier, request.label))
        except pkcs11.UserNotLoggedIn:
            self._forget(one.place)
            raise
        finally:
            session.close()

    def refused(self, error: PKCS11Error, place: Place) -> Failed:
        """A PIN try that failed, with the token's flags as they are after it."""
        try:
            return Failed(code(error), self._state(self._at(place)))
        except PKCS11Error:
            return Failed(code(error))

    # tokens

    def _plugged(self, hint: TokenUri | None = None) -> list[Plugged]:
        """The tokens that are here now, those first that the hint names. Forgets sessions with all others."""
        found: list[Plugged] = []
        for slot in self._slots()[: protocol.TOKEN_LIMIT]:
            with suppress(PKCS11Error):  # gone since, or of no use: an empty slot of SoftHSM holds a blank token
                token = _token(slot)
                if token.flags & protocol.TOKEN_INITIALIZED or token.label:
                    found.append(Plugged(_place(slot, token), token))
        for place in self._sessions.keys() - {one.place for one in found}:
            self._forget(place)
        return sorted(found, key=lambda one: hint is not None and not hint.matches(one.place.uri))

    def _slots(self) -> list[Slot]:
        try:
            return self._library.get_slots(token_present=True)
        except STALE:  # one was taken out while they were counted
            return self._library.get_slots(token_present=True)

    def _at(self, place: Place) -> Plugged:
        """That token, also if it is in another slot by now. Raises TokenGone."""
        plugged = self._plugged()
        same = [one for one in plugged if one.place.uri == place.uri]
        here = [one for one in same if one.place == place]
        if len(here or same) != 1:
            raise TokenGone
        return (here or same)[0]

    def _state(self, one: Plugged) -> TokenState:
        abilities: list[Ability] = []
        with suppress(PKCS11Error):
            mechanisms = one.token.slot.get_mechanisms()
            abilities += [name for name in get_args(Ability) if Mechanism[name] in mechanisms]
        return TokenState(one.place, int(one.token.flags), abilities, self._logged_in(one.place))

    def _gone(self, place: Place) -> bool:
        try:
            return all(one.place != place for one in self._plugged())
        except PKCS11Error:
            return True

    def _absent(self, plugged: list[Plugged], problems: list[tuple[Place, PKCS11Error]]) -> Absent:
        """Raises what went wrong with a token that is here all the same: it may have been the one."""
        for place, error in problems:
            if not self._gone(place):
                raise error
        return Absent([one.place.label for one in plugged], self.logins)

    # sessions

    def _logged_in(self, place: Place) -> bool:
        return place in self._sessions and self._sessions[place].logged_in

    def _with_session(self, one: Plugged, work: Callable[[Session], T]) -> T:
        """`work` is done twice where the session turns out to be from before the token was put back: it only reads."""
        kept = one.place in self._sessions
        if not kept:
            self._sessions[one.place] = Opened(one.token.open(), logged_in=False)
        try:
            return work(self._sessions[one.place].session)
        except STALE:
            self._forget(one.place)
            if not kept:
                raise
        return self._with_session(one, work)

    def _forget(self, place: Place) -> None:
        """Log out and close, if there is anything left to be closed."""
        opened = self._sessions.pop(place, None)
        if opened is not None:
            with suppress(PKCS11Error):
                opened.session.close()

    def _closed(self, one: Plugged) -> bool:
        return bool(one.token.flags & protocol.LOGIN_REQUIRED) and not self._logged_in(one.place)

    # keys

    def _found(self, one: Plugged, key: bytes, problems: list[tuple[Place, PKCS11Error]]) -> Found | None:
        def search(session: Session) -> Found:
            found, shy = Found(None, None, shy=False), True
            for public in objects.publics(session):
                shy = False
                if public.key == key and found.private is None:
                    found = Found(public, objects.private(session, public), shy=False)
            return found._replace(shy=shy)

        try:
            return self._with_session(one, search)
        except PKCS11Error as error:  # other tokens are looked at all the same
            problems.append((one.place, error))
            return None

    def _computed(
        self, one: Plugged, private: Object | None, request: Compute, pin: bytearray
    ) -> tuple[Answer | None, bytearray]:
        """The answer of a token that shows the public key; none where it has nothing but that."""
        closed = self._closed(one)
        if private is None or (closed and request.login):
            # Without a login private keys are hidden; with one, it is not there.
            return PinNeeded(self._state(one), each_time=False) if closed else None, bytearray()
        each_time = objects.each_time(private)
        if refusal := self._unasked(one, request, each_time=each_time):
            return refusal, bytearray()
        try:
            return Computed(one.place), self._operate(one.place, private, request, pin)
        except _PIN_REFUSED as error:
            self._forget(one.place)  # the operation that waits for a PIN ends with its session
            return self.refused(error, one.place), bytearray()
        except pkcs11.UserNotLoggedIn:
            if each_time and not closed and request.mechanism == "ecdh":
                return Failed("PIN_AT_EACH_USE"), bytearray()
            self._forget(one.place)  # a login that was here is gone, whoever ended it
            return PinNeeded(self._state(one), each_time=False), bytearray()

    def _unasked(self, one: Plugged, request: Compute, *, each_time: bool) -> Answer | None:
        """Why a key that takes its PIN at each use is not tried: none was given, or it was for another state."""
        if request.pin_for != one.place:
            return PinNeeded(self._state(one), each_time=True) if each_time and request.mechanism != "ecdh" else None
        if one.token.flags & protocol.PIN_FINAL_TRY and not request.last_try:
            return Failed(protocol.LAST_TRY_UNSEEN, self._state(one))
        return None

    def _operate(self, place: Place, private: Any, request: Compute, pin: bytearray) -> bytearray:  # noqa: ANN401  # python-pkcs11 makes a class for each key
        """Never unwrap_key, which some modules lack, nor PKCS#1 v1.5, which tells too much by its errors."""
        try:
            if request.mechanism == "ecdh":
                return _derive(private, request.encapsulated, {Attribute.PRIVATE: self._logged_in(place)})
            asked = Pin(pin) if request.pin_for == place else None
            if request.mechanism == "ecdsa":
                return _sign(private, request.encapsulated, asked)
            algorithm, mask = _HASHES[request.mechanism]
            return bytearray(
                private.decrypt(
                    request.encapsulated,
                    mechanism=Mechanism.RSA_PKCS_OAEP,
                    mechanism_param=(algorithm, mask, None),
                    pin=asked,
                )
            )
        except STALE as error:
            if self._gone(place):
                raise TokenGone from error
            raise
        except pkcs11.OperationActive:
            self._forget(place)  # what an operation that failed left behind
            raise


def _derive(private: Any, point: bytes, access: dict[Attribute, bool]) -> bytearray:  # noqa: ANN401
    """The x-coordinate, 32 bytes (PKCS#11 v2.40 mechanisms, 2.3.17), by the template that all modules take.

    The derived key is an object of this session, gone before anything else is done; who is not logged in may make no
    private one.
    """
    if not hasattr(private, "derive_key"):
        raise PKCS11Error("0x68")
    derived = private.derive_key(
        KeyType.GENERIC_SECRET,
        _SECRET_BITS,
        mechanism=Mechanism.ECDH1_DERIVE,
        mechanism_param=(KDF.NULL, None, point),
        template={Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True, **access},
    )
    try:
        return bytearray(derived[Attribute.VALUE])
    finally:
        with suppress(PKCS11Error):
            derived.destroy()


def _sign(private: Any, digest: bytes, pin: Pin | None) -> bytearray:  # noqa: ANN401
    if not hasattr(private, "sign"):
        raise PKCS11Error("0x68")
    return bytearray(private.sign(digest, mechanism=Mechanism.ECDSA, pin=pin))


def _token(slot: Slot) -> Token:
    """The token in a slot. Where another process writes to it, some modules fail for a moment, as SoftHSM does."""
    for _ in range(_ATTEMPTS):
        try:
            return slot.get_token()
        except (pkcs11.GeneralError, pkcs11.FunctionFailed, pkcs11.DeviceError):
            time.sleep(_MOMENT)
    return slot.get_token()


def _place(slot: Slot, token: Token) -> Place:
    serial = token.serial.decode(errors="replace").rstrip("\0 ")
    return Place(slot.slot_id, token.label, token.manufacturer_id, token.model, serial)


def _named(hint: TokenUri, place: Place) -> bool:
    """Whether the hint names this very token: reason enough to ask for its PIN before its keys are seen."""
    return (hint.serial is not None or hint.token is not None) and hint.matches(place.uri)
