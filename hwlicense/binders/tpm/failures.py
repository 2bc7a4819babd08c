"""What the TPM's response codes mean to people (Part 2, 6.6). Every error names the command and the code."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Final

from tpm2_pytss.constants import TPM2_RC, TSS2_RC

from hwlicense.core.errors import AbsentError, HardwareError, Reason

if TYPE_CHECKING:
    from tpm2_pytss import TSS2_Exception

BUSY: Final = (TPM2_RC.RETRY, TPM2_RC.YIELDED, TPM2_RC.TESTING, TPM2_RC.NV_RATE)
"""The same command succeeds a little later."""

FULL: Final = (
    TPM2_RC.OBJECT_MEMORY,
    TPM2_RC.SESSION_MEMORY,
    TPM2_RC.MEMORY,
    TPM2_RC.SESSION_HANDLES,
    TPM2_RC.OBJECT_HANDLES,
)
"""No room for a further object or session."""

WRONG_AUTHORIZATION: Final = (TPM2_RC.AUTH_FAIL, TPM2_RC.BAD_AUTH)

NOT_ITS_OWN: Final = (
    TPM2_RC.INTEGRITY,
    TPM2_RC.BINDING,
    TPM2_RC.VALUE,
    TPM2_RC.SIZE,
    TPM2_RC.INSUFFICIENT,
    TPM2_RC.ECC_POINT,
)
"""What was wrapped was wrapped for another key, or was changed."""

NOT_UNWRAPPED: Final = (*NOT_ITS_OWN, TPM2_RC.FAILURE)
"""The same for seeds, where some TPMs answer a bad RSA padding like this. One that really failed says so before."""

_LAYER: Final = 0xFF0000
_FROM_TPM: Final = (0, TSS2_RC.RESMGR_RC_LAYER, TSS2_RC.RESMGR_TPM_RC_LAYER)  # the kernel answers in the TPM's stead
_FORGED: Final = (
    TSS2_RC.ESYS_RC_RSP_AUTH_FAILED,
    TSS2_RC.ESYS_RC_MALFORMED_RESPONSE,
    TSS2_RC.ESYS_RC_INSUFFICIENT_RESPONSE,
    TSS2_RC.SYS_RC_MALFORMED_RESPONSE,
    TSS2_RC.SYS_RC_INSUFFICIENT_RESPONSE,
    TSS2_RC.MU_RC_BAD_SIZE,
    TSS2_RC.MU_RC_BAD_VALUE,
    TSS2_RC.MU_RC_INSUFFICIENT_BUFFER,
)
_BY_TPM: Final[dict[int, tuple[Reason, str, str]]] = {
    TPM2_RC.LOCKOUT: (
        Reason.TPM_LOCKOUT,
        "The TPM refuses PINs after too many wrong ones, or after power cuts while PINs were in use",
        "Wait for the TPM's recovery time, or reset the lockout with tpm2_dictionarylockout --clear-lockout.",
    ),
    **dict.fromkeys(
        WRONG_AUTHORIZATION,
        (
            Reason.TPM_AUTHORIZATION,
            "The TPM's owner or endorsement hierarchy has a password, or its storage root key has one",
            "Ask whoever administers the TPM for an empty password (tpm2_changeauth).",
        ),
    ),
    **dict.fromkeys(
        FULL, (Reason.TPM_BUSY, "The TPM is full of the objects and sessions of other programs", "Close them.")
    ),
    **dict.fromkeys(BUSY, (Reason.TPM_BUSY, "The TPM stays busy", "Try again later.")),
    TPM2_RC.COMMAND_CODE: (Reason.TPM_UNSUPPORTED, "The TPM does not know this command", "Update the TPM's firmware."),
}


def code(error: TSS2_Exception) -> int:
    """The TPM's response code without the number of the handle, session or parameter that it is about."""
    raw = int(error.rc) & 0xFFFF
    return raw & 0xBF if raw & TPM2_RC.FMT1 else raw


def from_tpm(error: TSS2_Exception) -> bool:
    """Whether the TPM itself gave this answer. Otherwise the connection is not to be used any more."""
    return error.rc & _LAYER in _FROM_TPM


def from_transport(error: TSS2_Exception) -> bool:
    """Whether nothing can be sent any more."""
    return bool(error.rc & _LAYER == TSS2_RC.TCTI_RC_LAYER)


def hardware_error(error: TSS2_Exception, command: str) -> HardwareError:
    """The error to raise for a response code that means nothing more special to the caller."""
    what = f"(TPM command {command}, response code 0x{error.rc:x}: {error})"
    if error.rc in _FORGED:
        return HardwareError(
            Reason.TPM_ANSWER_FORGED,
            f"An answer of the TPM was changed on its way or is malformed {what}.",
            "Someone or something tampers with the connection to the TPM; try again, then inspect the device.",
        )
    if from_transport(error):
        return HardwareError(
            Reason.TPM_GONE, f"The connection to the TPM was lost {what}.", "Check that the TPM is still there."
        )
    known = _BY_TPM.get(code(error))
    failed = (Reason.TPM_FAILED, "The TPM failed", "Run `hwlicense device doctor`.")
    if not from_tpm(error):  # it says the same of all that befalls the library itself
        failed = (
            Reason.TPM_FAILED,
            "The library that speaks to the TPM failed",
            "See whether the process has memory left (`ulimit -v`); then run `hwlicense device doctor`.",
        )
    reason, meaning, hint = known or failed
    return HardwareError(reason, f"{meaning} {what}.", hint)


def tampered() -> HardwareError:
    """An index is what it should be, and refuses what it should take."""
    what = "A command to the TPM was changed on its way: the TPM refuses its authentication."
    return HardwareError(Reason.TPM_ANSWER_FORGED, what, "Inspect the device: something tampers with its TPM's bus.")


def defining_error(error: TSS2_Exception) -> HardwareError:
    """Why an NV index could not be made."""
    match code(error):
        case TPM2_RC.NV_SPACE:
            what = "The TPM has no room for a further counter or index"
            hint = "`hwlicense device doctor` shows what is used; the TPM's owner may free some (tpm2_nvundefine)."
            reason = Reason.TPM_NV_FULL
        case TPM2_RC.ATTRIBUTES:
            what = "The TPM knows no index that counts its uses (PIN_PASS, from revision 1.38 of the specification on)"
            hint = "Update the TPM's firmware, or ask the vendor for a license without limits that a TPM counts."
            reason = Reason.TPM_UNSUPPORTED
        case _:
            return hardware_error(error, "nv_define_space")
    return HardwareError(reason, f"{what} (response code 0x{error.rc:x}: {error}).", hint)


def connect_error(error: TSS2_Exception | OSError, tcti: str) -> HardwareError:
    """Why no connection came about: the library does not say, so the file or socket is asked again."""
    number = error.errno if isinstance(error, OSError) else _errno(*tcti.split(":", 1))
    what = f"at {tcti} ({os.strerror(number) if number else error})"
    match number:
        case errno.EACCES | errno.EPERM:
            hint = 'Add the user to the group "tss" and log in again.'
            return HardwareError(Reason.TPM_NO_PERMISSION, f"No permission to use the TPM {what}.", hint)
        case errno.EBUSY:
            hint = "Another program uses it alone; use device:/dev/tpmrm0, which programs share."
            return HardwareError(Reason.TPM_BUSY, f"The TPM is in use {what}.", hint)
    hint = "Enable the TPM in the firmware setup, or name another with --tpm."
    return AbsentError(Reason.TPM_ABSENT, f"There is no TPM {what}.", hint)


def _errno(kind: str, where: str) -> int | None:
    options = dict(option.partition("=")[::2] for option in where.split(","))
    try:
        if kind == "device":
            os.close(os.open(where, os.O_RDWR | os.O_CLOEXEC))
        elif "path" in options:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(options["path"])
    except OSError as error:
        return error.errno
    return None
