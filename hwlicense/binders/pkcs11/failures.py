"""What goes wrong with tokens, in sentences: return values (PKCS#11 v2.40 base, 5.1) and ends of the module's process.

Labels, serials and messages are the token's and the module's own: they are shown without what could move a cursor.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

from hwlicense.binders.pkcs11 import protocol
from hwlicense.core.errors import AbsentError, HardwareError, HwlicenseError, Reason, RefusedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hwlicense.binders.pkcs11.protocol import Failed, KeyFound, TokenState
    from hwlicense.core.uri import TokenUri

WRONG_PIN: Final = ("PIN_INCORRECT", "PIN_INVALID", "PIN_LEN_RANGE")

_GONE: Final = ("DEVICE_REMOVED", "OBJECT_HANDLE_INVALID", "SESSION_CLOSED", "SESSION_HANDLE_INVALID")
_GONE_SLOT: Final = ("SLOT_ID_INVALID", "TOKEN_NOT_PRESENT")
_UNABLE: Final = (
    "ACTION_PROHIBITED",
    "ARGUMENTS_BAD",
    "ATTRIBUTE_SENSITIVE",
    "ATTRIBUTE_TYPE_INVALID",
    "ATTRIBUTE_VALUE_INVALID",
    "CURVE_NOT_SUPPORTED",
    "DATA_INVALID",
    "DATA_LEN_RANGE",
    "DOMAIN_PARAMS_INVALID",
    "ENCRYPTED_DATA_INVALID",
    "ENCRYPTED_DATA_LEN_RANGE",
    "FUNCTION_FAILED",
    "FUNCTION_NOT_SUPPORTED",
    "KEY_FUNCTION_NOT_PERMITTED",
    "KEY_SIZE_RANGE",
    "KEY_TYPE_INCONSISTENT",
    "MECHANISM_INVALID",
    "MECHANISM_PARAM_INVALID",
    "TEMPLATE_INCOMPLETE",
    "TEMPLATE_INCONSISTENT",
)
_FROM_ELSEWHERE: Final = "Use the token maker's own module, or update it; see that the token works with pkcs11-tool."
_BY_CODE: Final[dict[str, tuple[Reason, str, str]]] = {
    **dict.fromkeys(
        _UNABLE,
        (
            Reason.TOKEN_UNSUPPORTED,
            "The token, its module or this key cannot do what is asked",
            "Use a P-256 key that may derive (ECDH), or an RSA key that may decrypt (OAEP).",
        ),
    ),
    **dict.fromkeys(
        ("SESSION_COUNT", "OPERATION_ACTIVE"),
        (Reason.TOKEN_BUSY, "The token is in use by other programs", "Close them, then try again."),
    ),
    "DEVICE_MEMORY": (Reason.TOKEN_FAILED, "The token is full", "Delete keys that are not needed any more."),
    "FUNCTION_CANCELED": (
        Reason.TOKEN_FAILED,
        "The token gave up, perhaps because nobody touched it in time",
        "Try again, and touch the token when it blinks.",
    ),
    "PIN_AT_EACH_USE": (
        Reason.TOKEN_UNSUPPORTED,
        "This key takes its PIN at each use, which the module has no way for when it derives",
        "Make a P-256 key without CKA_ALWAYS_AUTHENTICATE (on a YubiKey: --pin-policy once), and enroll with it.",
    ),
    "PIN_EXPIRED": (Reason.TOKEN_FAILED, "The token's PIN has expired", "Set another with the token maker's tool."),
    "TOKEN_WRITE_PROTECTED": (Reason.TOKEN_FAILED, "The token is write-protected", "Use another token."),
    "USER_ANOTHER_ALREADY_LOGGED_IN": (
        Reason.TOKEN_BUSY,
        "Someone else is logged in to the token",
        "Close other programs that use it, then try again.",
    ),
    "USER_NOT_LOGGED_IN": (
        Reason.TOKEN_FAILED,
        "The token is not logged in any more, perhaps because it was taken out meanwhile",
        "Try again.",
    ),
    "USER_PIN_NOT_INITIALIZED": (
        Reason.TOKEN_FAILED,
        "The token has no user PIN yet",
        "Set one with the token maker's tool, or with pkcs11-tool --init-pin.",
    ),
    protocol.ANSWER_INVALID: (Reason.TOKEN_FAILED, "The module's answer makes no sense", _FROM_ELSEWHERE),
}


def printable(text: str) -> str:
    """A text from a token or module, as far as it can be shown in a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def name(token: TokenState) -> str:
    """A token in a sentence."""
    place = token.place
    serial = f" (serial {printable(place.serial)})" if place.serial else ""
    return f'the token "{printable(place.label)}"{serial}'


def refused(failed: Failed, module: str) -> HwlicenseError:
    """The error for an answer that is one."""
    code, token = failed.code, failed.token
    if code in WRONG_PIN:
        return wrong_pin(token)
    if code == "PIN_LOCKED":
        return locked(token)
    if code in _GONE or code in _GONE_SLOT:
        what = f"The token was taken out meanwhile (CKR_{code})."
        return AbsentError(Reason.TOKEN_ABSENT, what, "Leave it plugged in, and try again.")
    if code == "NOT_LOADED":
        what = f"{module} is no PKCS#11 module that can be loaded here ({printable(failed.detail)})."
        return HardwareError(Reason.TOKEN_FAILED, what, "Give the path of the token maker's module, for this machine.")
    known = _BY_CODE.get(code)
    reason, meaning, hint = known or (Reason.TOKEN_FAILED, "The token or its module failed", _FROM_ELSEWHERE)
    shown = code if code in _OWN else f"CKR_{code}"
    return HardwareError(reason, f"{meaning} ({module}, {shown}).", hint)


_OWN: Final = (protocol.ANSWER_INVALID, "PIN_AT_EACH_USE")


def locked(token: TokenState | None) -> HardwareError:
    """Too many wrong PINs."""
    what = f"The PIN of {name(token) if token else 'the token'} is locked after too many wrong ones."
    return HardwareError(
        Reason.TOKEN_LOCKED, what, "Unlock it with its PUK or security officer's PIN (the maker's tool)."
    )


def wrong_pin(token: TokenState | None) -> RefusedError:
    """One try less."""
    what = f"The PIN of {name(token) if token else 'the token'} is wrong."
    flags = token.flags if token else 0
    if flags & protocol.PIN_LOCKED:
        hint = "It was the last try: the token is locked. Unlock it with the token maker's tool."
    elif flags & protocol.PIN_FINAL_TRY:
        hint = "One try is left. After another wrong one the token is locked."
    else:
        hint = "Try again with the right one. After a few wrong ones the token is locked."
    return RefusedError(Reason.PIN_WRONG, what, hint)


def pin_prompt(token: TokenState) -> str:
    """What to ask a person for, with what is known of the tries left."""
    prompt = f"PIN of {name(token)}"
    if token.flags & protocol.PIN_FINAL_TRY:
        return f"{prompt}; this is the last try before it locks"
    if token.flags & protocol.PIN_COUNT_LOW:
        return f"{prompt}; a wrong one was entered before"
    return prompt


def pin_needed(token: TokenState) -> RefusedError:
    """Nobody to ask."""
    what = f"{_sentence(name(token))} asks for its PIN."
    return RefusedError(Reason.PIN_NEEDED, what, "Give it when asked, in a file (--pin-file), or by pin= in Python.")


def logged_out(token: TokenState) -> RefusedError:
    """The login that opening made is gone."""
    what = f"{_sentence(name(token))} is here, but not logged in any more: it was taken out, or its module restarted."
    return RefusedError(Reason.PIN_NEEDED, what, "Open the package again, with the PIN.")


def asks_again(token: TokenState) -> HardwareError:
    """A login that helps nothing."""
    what = f"{_sentence(name(token))} took its PIN and asks for it again."
    return HardwareError(Reason.TOKEN_UNSUPPORTED, what, _FROM_ELSEWHERE)


def absent(hint: TokenUri, labels: Iterable[str]) -> AbsentError:
    """None of the tokens that are here has the key."""
    here = ", ".join(f'"{printable(label)}"' for label in labels)
    known = [f'"{printable(hint.token)}"'] if hint.token else []
    known += [f"serial {printable(hint.serial)}"] if hint.serial else []
    name = f" ({', '.join(known)})" if known else ""
    wanted = f"The license's token{name} is not here"
    what = f"{wanted}; {f'plugged in: {here}' if here else 'none is plugged in'}."
    return AbsentError(Reason.TOKEN_ABSENT, what, "Plug in the token that this license was issued for.")


def none_named(uri: str, labels: Iterable[str]) -> AbsentError:
    """No token is what the URI says."""
    here = ", ".join(f'"{printable(label)}"' for label in labels)
    what = f"There is no token {uri}; {f'plugged in: {here}' if here else 'none is plugged in'}."
    return AbsentError(Reason.TOKEN_ABSENT, what, "Plug it in, or name another.")


def several_tokens(uris: Iterable[str]) -> UsageError:
    """It is not said which token."""
    return UsageError(Reason.USAGE, "There are several tokens.", f"Name one of them: {', '.join(uris)}")


def several_keys(keys: Iterable[KeyFound], uris: Iterable[str]) -> UsageError:
    """It is not said which key."""
    labels = ", ".join(f'"{printable(key.label)}"' for key in keys)
    return UsageError(Reason.USAGE, f"The token holds several keys: {labels}.", f"Name one of them: {', '.join(uris)}")


def no_key(token: TokenState) -> UsageError:
    """Nothing that a license could be bound to."""
    what = f"{_sentence(name(token))} holds no usable key."
    return UsageError(
        Reason.USAGE, what, "Make one with --new-key p256, or name the key that is meant by a URI with id=."
    )


def useless(last: HwlicenseError) -> HardwareError:
    """A key with which no mechanism works."""
    what = f"The key on the token works in none of the ways that are known here. {last.what}"
    return HardwareError(Reason.TOKEN_UNSUPPORTED, what, _BY_CODE["MECHANISM_INVALID"][2])


def hung(module: str, seconds: float) -> HardwareError:
    """No answer in time."""
    what = f"The token's module {module} did not answer within {seconds:g} s, and was ended."
    return HardwareError(Reason.TOKEN_HUNG, what, "Take the token out and put it back; update its module.")


def crashed(module: str, status: int | None) -> HardwareError:
    """The module's process is gone. `status` as in subprocess, None where somebody else has heard of it first."""
    how = "ended"
    if status is not None and status < 0:
        names = {int(number): number.name for number in signal.Signals}
        how = f"crashed ({names.get(-status, f'signal {-status}')})"
    elif status:
        how = f"ended (status {status})"
    what = f"The token's module {module} {how} in the middle of its work."
    return HardwareError(Reason.TOKEN_CRASHED, what, "Try again; if it happens again, update the module.")


def nonsense(module: str) -> HardwareError:
    """What came from the module's process is no answer: it belongs to whoever wrote the module."""
    what = f"The process of the token's module {module} gave an answer that makes no sense, and was ended."
    return HardwareError(Reason.TOKEN_FORGED, what, _FROM_ELSEWHERE)


def not_started(module: str, why: str) -> HardwareError:
    """There is no process to load the module into."""
    what = f"No process could be started for the token's module {module}: {why}."
    return HardwareError(Reason.TOKEN_FAILED, what, "See that sys.executable is a Python interpreter that may be run.")


def in_use() -> HardwareError:
    """A signal handler cannot wait for what its own thread is in the middle of."""
    what = (
        "The token is in the middle of a request of this very thread: a signal handler or touch request interrupted it."
    )
    return HardwareError(Reason.TOKEN_BUSY, what, "Let the handler set a flag, and use the token when it has returned.")


def in_use_elsewhere(token: TokenState) -> HardwareError:
    """Others try PINs at the same time."""
    what = f"Others try PINs of {name(token)} at this moment; yours was not tried."
    return HardwareError(Reason.TOKEN_BUSY, what, "Find out who else uses the token before you try again.")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
