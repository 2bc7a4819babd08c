"""Getting a token to compute: which module sees it, whether it takes its PIN first, whether its answer is right."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from hwlicense.binders.pkcs11 import failures, process, protocol
from hwlicense.binders.pkcs11.protocol import (
    Absent,
    Compute,
    Computed,
    Done,
    Failed,
    Generate,
    Generated,
    Inspect,
    Inspected,
    List,
    LogIn,
    Look,
    PinNeeded,
    Place,
    Seen,
    Tokens,
    TokenState,
)
from hwlicense.core import token as wrapping
from hwlicense.core.errors import HardwareError, HwlicenseError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hwlicense.binders.pkcs11.process import ModuleProcess
    from hwlicense.binders.pkcs11.protocol import AnyAnswer, NewKey, Operation, Request
    from hwlicense.core.documents import Mechanism
    from hwlicense.core.hardware import PinSource, TouchRequest
    from hwlicense.core.secret import Secret
    from hwlicense.core.uri import TokenUri

DEADLINES: Final[dict[type[Request], float]] = {
    List: 10,
    Look: 10,
    Compute: 30,  # a finger may be waited for
    LogIn: 15,
    Inspect: 15,
    Generate: 300,  # RSA-3072 takes minutes on a slow card
}
"""Seconds, by request."""

_MOST_STEPS: Final = 32
_LOOKS, _PAUSE = 2, 0.05  # times that a token is looked for again, and seconds before
_TOUCH: Final = "The token works, or waits to be touched."


class Challenge(NamedTuple):
    """What only the token with this key can answer. `hint` says where to look first, `login` whether it takes one."""

    hint: TokenUri
    key: bytes
    mechanism: Operation
    login: bool
    encapsulated: bytes
    check: bytes
    purpose: bytes = b"token member"

    def outcome(self, content: Secret) -> Secret:
        """What the answer comes to, which is wiped. Raises HardwareError TOKEN_FORGED."""
        if self.mechanism == "ecdsa":
            return wrapping.checked_signature(content, self.key, self.encapsulated)
        return wrapping.unwrap(content, self.key, self.encapsulated, self.check, self.purpose)

    @classmethod
    def fresh(cls, hint: TokenUri, key: bytes, mechanism: Mechanism, *, login: bool, purpose: bytes) -> Challenge:
        """A new one that nobody has seen. Raises DamagedError where mechanism and key differ."""
        wrapped = wrapping.wrap(key, mechanism, purpose)
        wrapped.secret.wipe()  # the check tells as much
        return cls(hint, key, mechanism, login, wrapped.encapsulated, wrapped.check, purpose)


class Pins:
    """PINs for the time of one operation: asked for once for each token, and wiped at the end.

    `refusal` is the error where there is nobody to ask.
    """

    def __init__(self, source: PinSource | None, refusal: Callable[[TokenState], HwlicenseError]) -> None:
        self._source, self._refusal = source, refusal
        self._given: dict[Place, Secret] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        while self._given:
            self._given.popitem()[1].wipe()

    def of(self, token: TokenState) -> Secret:
        """The PIN. Raises HardwareError TOKEN_LOCKED without asking, the refusal, and what the source raises."""
        if token.flags & protocol.PIN_LOCKED:
            raise failures.locked(token)
        if token.place not in self._given:
            if self._source is None:
                raise self._refusal(token)
            last_try = bool(token.flags & protocol.PIN_FINAL_TRY)
            given = self._source(failures.pin_prompt(token), last_try=last_try)
            if len(given) > protocol.SECRET_LIMIT:
                given.wipe()
                raise failures.wrong_pin(token)
            self._given[token.place] = given
        return self._given[token.place]

    def forget(self, token: TokenState) -> None:
        """Ask for it again: it was given for another state of the token than it is in."""
        if token.place in self._given:
            self._given.pop(token.place).wipe()


class Modules:
    """The modules of one user, by their paths. Raises HardwareError for what goes wrong in them."""

    def __init__(self, paths: Sequence[str], touch: TouchRequest | None) -> None:
        self._paths = paths
        self._slow = None if touch is None else lambda: touch(_TOUCH)

    def close(self) -> None:
        """End the processes that nobody else uses."""
        for path in self._paths:
            process.give_back(path, self)

    def tokens(self) -> Iterator[tuple[str, TokenState]]:
        """All tokens, with the paths of the modules that see them."""
        for path in self._paths:
            answer = self._ask(path, List(DEADLINES[List]))
            if not isinstance(answer, Tokens):
                raise self.unexpected(path, answer)
            yield from ((path, token) for token in answer.tokens)

    def look(self, hint: TokenUri, key: bytes) -> None:
        """That a token with this key is here, or one of its name that shows no keys. Raises AbsentError."""

        def look_in(path: str) -> Sequence[str] | None:
            answer = self._ask(path, Look(DEADLINES[Look], hint, key))
            if isinstance(answer, Seen):
                return None
            if isinstance(answer, Absent):
                return answer.labels
            raise self.unexpected(path, answer)

        self._first(look_in, hint)

    def answer(self, challenge: Challenge, pins: Pins, patience: float = 0) -> Secret:
        """What the token's answer comes to, for whoever asked to wipe.

        A module process older than `patience` seconds that does not find the token is started anew once, if no login is
        lost by it: some modules look for tokens only when they are loaded.
        """
        found: list[Secret] = []

        def ask(path: str) -> Sequence[str] | None:
            outcome = _Asking(self, path, challenge, pins, patience).outcome()
            if isinstance(outcome, list):
                return outcome
            found.append(outcome)
            return None

        self._first(ask, challenge.hint)
        return found[0]

    def inspect(self, path: str, place: Place) -> Inspected:
        """The keys and certificates of a token."""
        answer = self._ask(path, Inspect(DEADLINES[Inspect], place))
        if not isinstance(answer, Inspected):
            raise self.unexpected(path, answer)
        return answer

    def generate(self, path: str, place: Place, kind: NewKey, label: str, identifier: bytes) -> bytes:
        """A new key on a token that is logged in to; its SubjectPublicKeyInfo."""
        answer = self._ask(path, Generate(DEADLINES[Generate], place, kind, label, identifier))
        if not isinstance(answer, Generated):
            raise self.unexpected(path, answer)
        return answer.key

    def log_in(self, path: str, token: TokenState, pins: Pins) -> None:
        """One try. Raises RefusedError PIN_WRONG, PIN_NEEDED, HardwareError TOKEN_LOCKED."""
        for _ in range(2):
            pin = pins.of(token)  # outside the turn at the module: a person may think for a while
            last_try = bool(token.flags & protocol.PIN_FINAL_TRY)
            answer = self._ask(path, LogIn(DEADLINES[LogIn], token.place, last_try), pin)
            if isinstance(answer, Done):
                return
            if not isinstance(answer, Failed) or answer.code != protocol.LAST_TRY_UNSEEN or answer.token is None:
                raise self.unexpected(path, answer)
            token = answer.token  # others used up tries meanwhile; this PIN was not tried
            pins.forget(token)
        raise failures.in_use_elsewhere(token)

    def request(
        self, path: str, request: Request, secret: Secret | None, *, patient: bool
    ) -> tuple[AnyAnswer, Secret, ModuleProcess]:
        """Ask the module's process. `patient`: a finger may be waited for."""
        asked = process.borrow(path, self)
        return (*asked.ask(request, secret, self._slow if patient else None), asked)

    def _ask(self, path: str, request: Request, secret: Secret | None = None) -> AnyAnswer:
        answer, content, _ = self.request(path, request, secret, patient=False)
        content.wipe()
        return answer

    def unexpected(self, path: str, answer: AnyAnswer) -> HwlicenseError:
        """The error for an answer to another question. Its process is not asked any more, if it is no failure."""
        if isinstance(answer, Failed):
            return failures.refused(answer, path)
        process.borrow(path, self).restart()
        return failures.nonsense(path)

    def _first(self, act: Callable[[str], Sequence[str] | None], hint: TokenUri) -> None:
        """Until a module has the token. Raises what the first said that did not work, else AbsentError."""
        problems, labels = list[HardwareError](), list[str]()
        for path in self._paths:
            try:
                here = act(path)
            except HardwareError as error:  # the token may be in another's reach
                problems.append(error)
            else:
                if here is None:
                    return
                labels += here
        raise problems[0] if problems else failures.absent(hint, labels)


class _Asking:
    """One challenge to one module: on to the next token where one lies, and on to a login where one is needed."""

    def __init__(self, modules: Modules, path: str, challenge: Challenge, pins: Pins, patience: float) -> None:
        self._modules, self._path, self._challenge, self._pins = modules, path, challenge, pins
        self._before = time.monotonic() - patience
        self._more = 0 if patience else _LOOKS
        self._skip: list[Place] = []
        self._pin: tuple[TokenState, Secret] | None = None
        self._taken: set[tuple[Place, bool]] = set()
        self._unseen = 0
        self._lie: HardwareError | None = None

    def outcome(self) -> Secret | list[str]:
        """The secret, or the labels of the tokens that are here instead."""
        answer: AnyAnswer = Done()
        for _ in range(_MOST_STEPS):  # each gets further, unless the process lies
            answer, content, asked = self._ask()
            match answer:
                case Computed(place):
                    if (secret := self._checked(content, place)) is not None:
                        return secret
                case PinNeeded():
                    self._give_pin(answer)
                case Failed(protocol.LAST_TRY_UNSEEN, TokenState() as token) if self._pin is not None:
                    self._pins.forget(token)
                    self._taken.discard((self._pin[0].place, True))
                    self._pin = None  # asked for anew, by the state in which the token is now
                    self._unseen += 1
                    if self._unseen > 1:
                        raise failures.in_use_elsewhere(token)
                case Absent(labels, logins):
                    if not logins and self._looked_again(asked):
                        continue
                    if self._lie is not None:
                        raise self._lie
                    return labels
                case _:
                    break
        raise self._modules.unexpected(self._path, answer)

    def _ask(self) -> tuple[AnyAnswer, Secret, ModuleProcess]:
        token, pin = self._pin or (None, None)
        asked = self._challenge
        request = Compute(
            DEADLINES[Compute],
            hint=asked.hint,
            key=asked.key,
            mechanism=asked.mechanism,
            encapsulated=asked.encapsulated,
            login=asked.login,
            skip=self._skip,
            pin_for=None if token is None else token.place,
            last_try=token is not None and bool(token.flags & protocol.PIN_FINAL_TRY),
        )
        return self._modules.request(self._path, request, pin, patient=True)

    def _looked_again(self, asked: ModuleProcess) -> bool:
        """Start the module anew, which loses nobody a login: it may have loaded just as the token was written to."""
        if self._more:
            self._more -= 1
            if asked.restart():
                time.sleep(_PAUSE)
            return True
        return asked.restart(self._before)

    def _checked(self, content: Secret, place: Place) -> Secret | None:
        try:
            return self._challenge.outcome(content)
        except HardwareError as error:
            if error.reason != Reason.TOKEN_FORGED:
                raise
            self._lie = error
            self._skip.append(place)  # a token may show any public key: another one may hold the private half
            return None

    def _give_pin(self, needed: PinNeeded) -> None:
        token, step = needed.token, (needed.token.place, needed.each_time)
        if step in self._taken:
            raise failures.asks_again(token)
        self._taken.add(step)
        if not token.logged_in:
            self._modules.log_in(self._path, token, self._pins)
        if needed.each_time:
            self._pin = token, self._pins.of(token)
