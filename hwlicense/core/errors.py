"""The one tree of errors.

Each error says what happened, what it means for the user and what to do, names a stable *reason* for machines
and translations, and carries the exit status of the command line. Nothing else in the project defines an error.
"""

from __future__ import annotations

from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

REPORT: Final = "Please report this, with the command and the version (`hwlicense --version`)."
"""What to do about what should not be."""


class Reason(StrEnum):
    """Stable codes, the same in text, JSON and exceptions. A code is never renamed or reused."""

    # the license says no (exit status 1)
    LICENSE_ABSENT = "LICENSE_ABSENT"
    LICENSE_EXPIRED = "LICENSE_EXPIRED"
    LICENSE_NOT_YET_VALID = "LICENSE_NOT_YET_VALID"
    LICENSE_SUPERSEDED = "LICENSE_SUPERSEDED"
    WRONG_DEVICE = "WRONG_DEVICE"
    WRONG_VENDOR = "WRONG_VENDOR"
    WRONG_PACKAGE = "WRONG_PACKAGE"
    WRONG_PRODUCT = "WRONG_PRODUCT"
    VENDOR_UNTRUSTED = "VENDOR_UNTRUSTED"
    PCR_MISMATCH = "PCR_MISMATCH"
    PCR_UNUSABLE = "PCR_UNUSABLE"
    PLATFORM_UNAPPROVED = "PLATFORM_UNAPPROVED"
    APPROVAL_WITHDRAWN = "APPROVAL_WITHDRAWN"
    PIN_NEEDED = "PIN_NEEDED"
    PIN_WRONG = "PIN_WRONG"
    PIN_LAST_TRY = "PIN_LAST_TRY"
    EK_UNTRUSTED = "EK_UNTRUSTED"
    TOKEN_UNTRUSTED = "TOKEN_UNTRUSTED"  # noqa: S105  # a code, no secret
    DONGLE_UNKNOWN = "DONGLE_UNKNOWN"
    ANSWERS_EXHAUSTED = "ANSWERS_EXHAUSTED"
    CONTINUITY_TOO_SHORT = "CONTINUITY_TOO_SHORT"
    OPENS_EXHAUSTED = "OPENS_EXHAUSTED"
    HOURS_EXHAUSTED = "HOURS_EXHAUSTED"
    INFERENCES_EXHAUSTED = "INFERENCES_EXHAUSTED"
    RATE_EXCEEDED = "RATE_EXCEEDED"
    INSTANCES_EXCEEDED = "INSTANCES_EXCEEDED"
    LEASE_PENDING = "LEASE_PENDING"
    CLOCK_SET_BACK = "CLOCK_SET_BACK"
    NOT_ANCHORED = "NOT_ANCHORED"
    FEATURE_ABSENT = "FEATURE_ABSENT"
    ABNORMAL_USE = "ABNORMAL_USE"
    GUARD = "GUARD"
    APPLICATION_CHANGED = "APPLICATION_CHANGED"
    COUNTER_LOST = "COUNTER_LOST"
    INSTALL_UNFINISHED = "INSTALL_UNFINISHED"
    REBOOT_NEEDED = "REBOOT_NEEDED"
    OUTPUTS_INCOMPLETE = "OUTPUTS_INCOMPLETE"
    PASSPHRASE_NEEDED = "PASSPHRASE_NEEDED"  # noqa: S105  # a code, no secret
    PASSPHRASE_WRONG = "PASSPHRASE_WRONG"  # noqa: S105  # a code, no secret
    # used in the wrong way (2)
    USAGE = "USAGE"
    TERM_UNKNOWN = "TERM_UNKNOWN"
    TERM_INVALID = "TERM_INVALID"
    MEMBER_NAME = "MEMBER_NAME"
    MEMBER_ABSENT = "MEMBER_ABSENT"
    CODE_ABSENT = "CODE_ABSENT"
    CODE_INVALID = "CODE_INVALID"
    ENTRY_ABSENT = "ENTRY_ABSENT"
    MODULE_SHADOWED = "MODULE_SHADOWED"
    PYTHON_UNSUPPORTED = "PYTHON_UNSUPPORTED"
    OUTPUTS_UNJUDGED = "OUTPUTS_UNJUDGED"
    FILE_ABSENT = "FILE_ABSENT"
    FILE_EXISTS = "FILE_EXISTS"
    SLOT_IN_USE = "SLOT_IN_USE"
    COMMAND_ABSENT = "COMMAND_ABSENT"
    COMMAND_UNUSABLE = "COMMAND_UNUSABLE"
    EXTRA_MISSING = "EXTRA_MISSING"
    EXTRA_UNSUPPORTED = "EXTRA_UNSUPPORTED"
    TENSOR_ABSENT = "TENSOR_ABSENT"
    BATCH_UNKNOWN = "BATCH_UNKNOWN"
    PLAINTEXT_CACHE = "PLAINTEXT_CACHE"
    TOKEN_UNCONFIGURED = "TOKEN_UNCONFIGURED"  # noqa: S105  # a code, no secret
    # hardware missing or failing (3)
    TPM_ABSENT = "TPM_ABSENT"
    TPM_NO_PERMISSION = "TPM_NO_PERMISSION"
    TPM_BUSY = "TPM_BUSY"
    TPM_LOCKOUT = "TPM_LOCKOUT"
    TPM_AUTHORIZATION = "TPM_AUTHORIZATION"
    TPM_FAILED = "TPM_FAILED"
    TPM_GONE = "TPM_GONE"
    TPM_HUNG = "TPM_HUNG"
    TPM_ANSWER_FORGED = "TPM_ANSWER_FORGED"
    TPM_UNSUPPORTED = "TPM_UNSUPPORTED"
    TPM_NV_FULL = "TPM_NV_FULL"
    TOKEN_ABSENT = "TOKEN_ABSENT"  # noqa: S105  # codes, no secrets, here and below
    TOKEN_BUSY = "TOKEN_BUSY"  # noqa: S105
    TOKEN_CRASHED = "TOKEN_CRASHED"  # noqa: S105
    TOKEN_HUNG = "TOKEN_HUNG"  # noqa: S105
    TOKEN_LOCKED = "TOKEN_LOCKED"  # noqa: S105
    TOKEN_FAILED = "TOKEN_FAILED"  # noqa: S105
    TOKEN_FORGED = "TOKEN_FORGED"  # noqa: S105
    TOKEN_UNSUPPORTED = "TOKEN_UNSUPPORTED"  # noqa: S105
    DONGLE_ABSENT = "DONGLE_ABSENT"
    DONGLE_NO_PERMISSION = "DONGLE_NO_PERMISSION"
    DONGLE_BUSY = "DONGLE_BUSY"
    DONGLE_UNTOUCHED = "DONGLE_UNTOUCHED"
    DONGLE_UNPROGRAMMED = "DONGLE_UNPROGRAMMED"
    DONGLE_PROTECTED = "DONGLE_PROTECTED"
    DONGLE_FAILED = "DONGLE_FAILED"
    PRESENCE_UNPROVEN = "PRESENCE_UNPROVEN"
    CERTIFYING_UNSUPPORTED = "CERTIFYING_UNSUPPORTED"
    # damaged or forged input (4)
    DOCUMENT_MALFORMED = "DOCUMENT_MALFORMED"
    DOCUMENT_TOO_LARGE = "DOCUMENT_TOO_LARGE"
    SCHEMA_UNSUPPORTED = "SCHEMA_UNSUPPORTED"
    SIGNATURE_MISSING = "SIGNATURE_MISSING"
    SIGNATURE_INVALID = "SIGNATURE_INVALID"
    QUOTE_INVALID = "QUOTE_INVALID"
    EVIDENCE_INVALID = "EVIDENCE_INVALID"
    PACKAGE_DAMAGED = "PACKAGE_DAMAGED"
    MEMBER_MALFORMED = "MEMBER_MALFORMED"
    LICENSE_DAMAGED = "LICENSE_DAMAGED"
    HOME_DAMAGED = "HOME_DAMAGED"
    OUTPUTS_DAMAGED = "OUTPUTS_DAMAGED"
    # anything else (5)
    STORAGE = "STORAGE"
    NAMESPACES_REFUSED = "NAMESPACES_REFUSED"
    OUTPUTS_FULL = "OUTPUTS_FULL"
    MODEL_CLOSED = "MODEL_CLOSED"
    INTERNAL = "INTERNAL"


class HwlicenseError(Exception):
    """Root of the tree. `str()` is the sentence for a person; `hint` says what to do next, and may be empty.

    A sentence that names a few of many things has all of them in `__notes__`, which Python shows below a traceback.
    """

    exit_status: ClassVar[int] = 5

    def __init__(self, reason: Reason, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.reason = reason
        self.what = what
        self.hint = hint

    def again(self) -> Self:
        """The same error once more: one that was raised holds a traceback, and with it all that was in reach."""
        made = type(self)(*self._arguments())
        vars(made).update(self._noted())
        return made

    def _arguments(self) -> tuple[Any, ...]:
        return self.reason, self.what, self.hint

    def _noted(self) -> dict[str, list[str]]:
        notes = getattr(self, "__notes__", None)
        return {"__notes__": list(notes)} if notes else {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments(), self._noted()  # an error crosses process pools with its hint


class RefusedError(HwlicenseError):
    """The license, or the vendor's own policy, says no."""

    exit_status = 1


class ExceededError(RefusedError):
    """A limit is reached for now, or for good: `wait` is how many seconds to wait, None where waiting does not help."""

    def __init__(self, reason: Reason, what: str, hint: str = "", wait: float | None = None) -> None:
        super().__init__(reason, what, hint)
        self.wait = wait

    def _arguments(self) -> tuple[Any, ...]:
        return *super()._arguments(), self.wait


class UsageError(HwlicenseError):
    """The call, the command line or the terms are wrong."""

    exit_status = 2


class HardwareError(HwlicenseError):
    """The hardware is missing, busy or failing."""

    exit_status = 3


class AbsentError(HardwareError):
    """This binding's hardware is not here; another binding may be."""


class DamagedError(HwlicenseError):
    """The input is truncated, changed, forged or of an unknown version."""

    exit_status = 4


class StorageError(HwlicenseError):
    """A file could not be read or written: disk full, read-only, no permission."""


class ClosedError(HwlicenseError):
    """The model was closed; its keys and plaintext are gone."""


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Let an error say which file it is about, where it does not. One of storage names its own."""
    try:
        yield
    except HwlicenseError as error:
        if not isinstance(error, StorageError) and str(path) not in error.what:
            error.what = f"{path}: {error.what}"
            error.args = (error.what,)
        raise


@contextmanager
def memory_needed() -> Iterator[None]:
    """Turn Python's MemoryError into StorageError."""
    try:
        yield
    except MemoryError as error:
        raise out_of_memory() from error


def out_of_memory() -> StorageError:
    """STORAGE: there was too little memory for what was asked for."""
    hint = "Free some memory, raise the limits of the process (`ulimit -a`), or read members in parts (`model.open`)."
    return StorageError(Reason.STORAGE, "The process can have no more memory.", hint)


def unforeseen(error: BaseException) -> HwlicenseError:
    """INTERNAL, with the place where `error` was raised and nothing that it says, which may be what must not show.

    STORAGE where memory was short.
    """
    if isinstance(error, MemoryError):
        return out_of_memory()
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    place = type(error).__name__
    if trace:
        code = trace.tb_frame.f_code
        place += f" at {code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}, {code.co_name}"
    what = f"hwlicense failed in a way that it did not foresee ({place})."
    return HwlicenseError(Reason.INTERNAL, what, REPORT)
