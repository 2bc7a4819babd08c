"""In the module's process: python-pkcs11's exceptions as the names of return values (PKCS#11 v2.40 base, 5.1)."""

from __future__ import annotations

import re
from typing import Final

from pkcs11 import (
    DeviceError,
    DeviceRemoved,
    GeneralError,
    ObjectHandleInvalid,
    PKCS11Error,
    SessionClosed,
    SessionHandleInvalid,
    SlotIDInvalid,
    TokenNotPresent,
)

from hwlicense.binders.pkcs11.protocol import ANSWER_INVALID

STALE: Final = (
    DeviceError,
    DeviceRemoved,
    GeneralError,
    ObjectHandleInvalid,
    SessionClosed,
    SessionHandleInvalid,
    SlotIDInvalid,
    TokenNotPresent,
)
"""What modules answer when a token was taken out, or put back since: sessions and handles are of no use any more."""

_SPELLED: Final = {  # unlike the return value
    "AnotherUserAlreadyLoggedIn": "USER_ANOTHER_ALREADY_LOGGED_IN",
    "FunctionCancelled": "FUNCTION_CANCELED",
    "TokenNotRecognised": "TOKEN_NOT_RECOGNIZED",
    "RandomNoRNG": "RANDOM_NO_RNG",
    "SessionReadWriteSOExists": "SESSION_READ_WRITE_SO_EXISTS",
    "SlotIDInvalid": "SLOT_ID_INVALID",
}
_UNNAMED: Final = {  # by number: the library has no exception for them
    0x1B: "ACTION_PROHIBITED",
    0x68: "KEY_FUNCTION_NOT_PERMITTED",
    0x140: "CURVE_NOT_SUPPORTED",
}


def code(error: Exception) -> str:
    """The CKR_ of an error without these letters; ANSWER_INVALID for one that the library itself stumbled over."""
    if not isinstance(error, PKCS11Error):
        return ANSWER_INVALID
    name = type(error).__name__
    if name == PKCS11Error.__name__:
        number = re.search(r"0x([0-9a-f]{1,16})", str(error))
        return _UNNAMED.get(int(number[1], 16), f"UNKNOWN_0X{number[1].upper()}") if number else ANSWER_INVALID
    return _SPELLED.get(name) or re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()
