"""PKCS#11 tokens as `Hardware`: enrolling them, and opening licenses that are wrapped for their keys."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from hwlicense.binders.pkcs11 import enrolling, failures, protocol
from hwlicense.binders.pkcs11.answering import Challenge, Modules, Pins
from hwlicense.core import token as wrapping
from hwlicense.core.errors import DamagedError, HardwareError, Reason, UsageError
from hwlicense.core.hardware import Unwrapped
from hwlicense.core.uri import TokenUri

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from hwlicense.binders.pkcs11.protocol import NewKey
    from hwlicense.core.chain import TokenCertificate
    from hwlicense.core.documents import Approval, TokenBinding, TokenEvidence
    from hwlicense.core.hardware import PinSource, TouchRequest
    from hwlicense.core.tpm.pcrs import Selection

_RESTING: Final = 10.0
"""Seconds that a module's process lives at least before a proof of presence has it started anew."""


class TokenFacts(NamedTuple):
    """What a token says of itself, for people. `mechanisms` are those that matter here, without CKM_."""

    module: str
    uri: str
    label: str
    manufacturer: str
    model: str
    serial: str
    login_required: bool
    wrong_pin_before: bool
    last_try: bool
    locked: bool
    mechanisms: list[str]


class TokenHardware:
    """The tokens that some modules see. Safe for use by several threads and in forked children.

    Each module is a shared library by the token's maker, given by an absolute path, and runs in a process of its own:
    started when first used, shared by all objects of this class, and ended with the last of them, at the end of a
    `with` block. `uri` names the token, and perhaps the key, that is to be described and enrolled. `touch` is called
    when a token takes long.

    Raises UsageError for a module that is no file.
    """

    def __init__(
        self, modules: Sequence[str], uri: TokenUri | None = None, *, touch: TouchRequest | None = None
    ) -> None:
        self._uri = uri or TokenUri()
        paths = list(dict.fromkeys([*modules, self._uri.module] if self._uri.module else modules))
        _check_modules(paths)
        self._modules = Modules(paths, touch)
        self._enrolled: TokenEvidence | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.close()

    def close(self) -> None:
        """Log out and end the modules' processes, unless others use them. The next use starts them again."""
        self._modules.close()

    def tokens(self) -> list[TokenFacts]:
        """All tokens that are plugged in. Raises HardwareError for a module that does not work."""
        return [
            TokenFacts(
                module=path,
                uri=str(token.place.uri._replace(module=path)),
                label=failures.printable(token.place.label),
                manufacturer=failures.printable(token.place.manufacturer),
                model=failures.printable(token.place.model),
                serial=failures.printable(token.place.serial),
                login_required=bool(token.flags & protocol.LOGIN_REQUIRED),
                wrong_pin_before=bool(token.flags & protocol.PIN_COUNT_LOW),
                last_try=bool(token.flags & protocol.PIN_FINAL_TRY),
                locked=bool(token.flags & protocol.PIN_LOCKED),
                mechanisms=list(token.abilities),
            )
            for path, token in self._modules.tokens()
        ]

    def enroll(self, pin: PinSource | None, new_key: NewKey | None = None, label: str = "hwlicense") -> TokenEvidence:
        """Log in, make a key if asked, and find out by trying in which way the key works. `describe` gives the same.

        Raises UsageError where token or key are not the only ones, RefusedError PIN_NEEDED and PIN_WRONG, AbsentError,
        HardwareError TOKEN_UNSUPPORTED and what else goes wrong with the token. A key that was made stays.
        """
        if not 0 < len(label) <= protocol.LABEL_LIMIT:
            what = f"A key's label has 1 to {protocol.LABEL_LIMIT} characters."
            raise UsageError(Reason.USAGE, what, "Give a shorter one.")
        path, token = enrolling.chosen_token(self._modules, self._uri)
        with Pins(pin, failures.pin_needed) as pins:
            if token.flags & protocol.LOGIN_REQUIRED and not token.logged_in:
                self._modules.log_in(path, token, pins)
            made = enrolling.make_key(self._modules, path, token, new_key, label) if new_key else None
            inspected = self._modules.inspect(path, token.place)
            key = enrolling.chosen_key(inspected, self._uri, made)
            mechanism = enrolling.working_mechanism(self._modules, token, key, pins)
        self._enrolled = enrolling.evidence(inspected, key, mechanism)
        return self._enrolled

    def describe(self, selection: Selection) -> TokenEvidence:  # noqa: ARG002  # tokens measure no platform
        """What `enroll` found out; else what can be seen of the one token and key that are meant.

        Raises as `enroll` does; RefusedError PIN_NEEDED for an RSA key that was not tried, as nothing else tells which
        hash its OAEP takes.
        """
        if self._enrolled is not None:
            return self._enrolled
        path, token = enrolling.chosen_token(self._modules, self._uri)
        inspected = self._modules.inspect(path, token.place)
        key = enrolling.chosen_key(inspected, self._uri)
        if inspected.token.logged_in or key.open:
            with Pins(None, failures.pin_needed) as pins:
                mechanism = enrolling.working_mechanism(self._modules, token, key, pins)
        else:
            mechanism = enrolling.listed_mechanism(token, key)
        return enrolling.evidence(inspected, key, mechanism)

    def prove(self, evidence: TokenEvidence, statement: bytes) -> bytes:  # noqa: ARG002
        """Nothing: what is wrapped for the key opens nowhere else, whoever wrote the request."""
        return b""

    def install(self, binding: TokenBinding, approvals: Sequence[Approval]) -> bytes:  # noqa: ARG002
        """Nothing to keep. That the token is here is seen without its PIN. Raises AbsentError TOKEN_ABSENT."""
        self._modules.look(_hint(binding), binding.key)
        return b""

    def admit(self, binding: TokenBinding, held: bytes, approval: Approval) -> bytes:  # noqa: ARG002
        """A token knows no platform states."""
        return held

    def unwrap(
        self,
        binding: TokenBinding,
        held: bytes,  # noqa: ARG002
        approvals: Sequence[Approval],  # noqa: ARG002
        pin: PinSource | None,
    ) -> Unwrapped:
        """The member secret. The PIN is asked for only if the token is not logged in to yet, and tried once.

        Raises AbsentError TOKEN_ABSENT, RefusedError (PIN_NEEDED, PIN_WRONG, PIN_LAST_TRY), DamagedError,
        HardwareError (TOKEN_LOCKED, TOKEN_FORGED, TOKEN_HUNG, TOKEN_CRASHED and others).
        """
        hint = _hint(binding)
        asked = Challenge(hint, binding.key, binding.mechanism, binding.pin, binding.encapsulated, binding.check)
        with Pins(pin, failures.pin_needed) as pins:
            return Unwrapped(self._modules.answer(asked, pins))

    def present(self, binding: TokenBinding, held: bytes, number: int = 0) -> None:  # noqa: ARG002  # each is fresh
        """Prove by a fresh challenge that the token is here, by the login that `unwrap` made.

        Raises AbsentError TOKEN_ABSENT, RefusedError PIN_NEEDED where that login is gone, HardwareError.
        """
        asked = Challenge.fresh(
            _hint(binding), binding.key, binding.mechanism, login=binding.pin, purpose=b"token presence"
        )
        with Pins(None, failures.logged_out) as pins:
            self._modules.answer(asked, pins, _RESTING).wipe()

    def certify(
        self,
        binding: TokenBinding,
        selection: Selection,  # noqa: ARG002  # tokens measure no platform
        statement: bytes,
        pin: PinSource | None,
    ) -> TokenCertificate:
        """A signature over `statement` by the token's key, if that is a P-256 key that may sign.

        Raises as `unwrap` does; HardwareError CERTIFYING_UNSUPPORTED.
        """
        from hwlicense.core.chain import TokenCertificate  # noqa: PLC0415  # most applications have nothing certified

        if binding.mechanism != "ecdh":
            raise _cannot_sign("The license is bound to an RSA key, which is for decrypting alone")
        digest = hashlib.sha256(statement).digest()
        asked = Challenge(_hint(binding), binding.key, "ecdsa", binding.pin, digest, b"")
        try:
            with Pins(pin, failures.pin_needed) as pins, self._modules.answer(asked, pins) as signature:
                return TokenCertificate(binding.key, bytes(signature.buffer))
        except HardwareError as error:
            if error.reason == Reason.TOKEN_UNSUPPORTED:
                raise _cannot_sign("The token's key may derive and not sign (CKA_SIGN)") from error
            raise


def _cannot_sign(why: str) -> HardwareError:
    hint = "Make a P-256 key that may derive and sign (device enroll --new-key p256), and enroll with it."
    return HardwareError(Reason.CERTIFYING_UNSUPPORTED, f"{why}, so it cannot certify a recording.", hint)


def _check_modules(paths: Sequence[str]) -> None:
    if not paths:
        what = "It is not said which PKCS#11 module to use."
        raise UsageError(Reason.USAGE, what, "Name it: pkcs11:token=NAME?module-path=/usr/lib/MODULE.so")
    for path in paths:
        if path.startswith("/") and path.isprintable() and not Path(path).exists():
            what = f"The PKCS#11 module {path} does not exist."
            hint = "Install the token maker's module, or name another: --token, token= or HWLICENSE_TOKEN."
            raise UsageError(Reason.TOKEN_UNCONFIGURED, what, hint)
        if not path.startswith("/") or not path.isprintable() or not Path(path).is_file():  # never searched for by name
            what = f"{failures.printable(path)} is not the absolute path of a file."
            raise UsageError(Reason.USAGE, what, "Give the path of the PKCS#11 module, such as /usr/lib/MODULE.so.")


def _hint(binding: TokenBinding) -> TokenUri:
    """Where to look first. Raises DamagedError LICENSE_DAMAGED for a binding that contradicts itself."""
    wrapping.check_binding(binding)
    try:
        return TokenUri.parse_hint(binding.uri)
    except UsageError as error:
        raise DamagedError(Reason.LICENSE_DAMAGED, error.what, "Ask the vendor for the license again.") from error
