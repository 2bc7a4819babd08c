"""Which home and which hardware: by argument, by environment, by enrolment, by default.

None of these choices is a check. Another TPM, or another home, can only fail to hold the secret.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hwlicense.core.errors import Reason, RefusedError, UsageError
from hwlicense.core.secret import Secret
from hwlicense.device.home import Home, read_vendor
from hwlicense.storage import reporting

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwlicense.core.documents import VendorPublic
    from hwlicense.core.hardware import Hardware, PinSource

HOME_VARIABLE: Final = "HWLICENSE_HOME"
TPM_VARIABLE: Final = "HWLICENSE_TPM"


def default_home() -> Path:
    """For root the system's state folder, for anyone else their own."""
    if given := os.environ.get(HOME_VARIABLE):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/hwlicense")
    try:
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "hwlicense"
    except RuntimeError:  # neither $HOME nor an entry in the list of users, as in some containers
        what = "This user has no home folder to keep the device's state in."
        raise UsageError(Reason.USAGE, what, f"Give --home DIR, or set {HOME_VARIABLE}.") from None


def home(path: str | os.PathLike[str] | None, state: str | os.PathLike[str] | None = None) -> Home:
    """The home at `path`, or the default one; `state` is where later changes go, if elsewhere.

    Either may be absent. Raises UsageError for what is no folder.
    """
    place = Home(Path(path) if path else default_home(), Path(state) if state else None)
    for folder in (place.path, place.state):
        with reporting(folder), suppress(FileNotFoundError):
            if not stat.S_ISDIR(folder.stat().st_mode):
                raise UsageError(Reason.USAGE, f"{folder} is not a folder.", "Give the path of a folder.")
    return place


def tpm_address(tcti: str | None, place: Home) -> str | None:
    """The TCTI to use, None for the default device."""
    if given := tcti or os.environ.get(TPM_VARIABLE):
        return given
    enrolled = place.enrolled()
    return enrolled.tpm if enrolled else None


def tpm(tcti: str | None, place: Home) -> Callable[[], Hardware]:
    """Opens the TPM when called. Raises UsageError EXTRA_MISSING there, where its library is not installed."""
    return partial(_connect, tpm_address(tcti, place))


def pin(source: Callable[[str], str | bytes | bytearray | Secret] | None) -> PinSource | None:
    """A source that gives secrets, and refuses whatever else an application's function may return."""
    if source is None:
        return None

    def ask(prompt: str) -> Secret:
        match source(prompt):
            case Secret() as secret:
                return secret
            case str(text) if text:
                return Secret(bytearray(text, "utf-8"))
            case bytes() | bytearray() as given if given:
                return Secret(bytearray(given))
        what = "The function given as pin= returned no PIN."
        raise RefusedError(Reason.PIN_NEEDED, what, "Return it as hwlicense.Secret, bytearray, bytes or str.")

    return ask


def vendor(text: object) -> VendorPublic:
    """Raises UsageError where `text` is a path, which is no root of trust; DamagedError where it is no vendor file."""
    if not isinstance(text, str) or not text.lstrip().startswith("{"):
        what = "vendor= takes the text of vendor.pub.json itself, not its path."
        raise UsageError(Reason.USAGE, what, "Make the text a constant of the application.")
    return read_vendor(text.encode(errors="surrogatepass"))


def _connect(tcti: str | None) -> Hardware:
    from hwlicense.binders.tpm import TpmHardware  # noqa: PLC0415  # the library is an extra, and slow to import

    return TpmHardware(tcti)
