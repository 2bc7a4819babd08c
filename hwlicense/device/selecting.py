"""Which home and which hardware: by argument, by environment, by enrolment, by default.

None of these choices is a check. Another TPM, token, dongle or home can only fail to hold the secret.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hwlicense.core.errors import HwlicenseError, Reason, RefusedError, UsageError
from hwlicense.core.hardware import last_try_refused
from hwlicense.core.secret import Secret
from hwlicense.core.uri import TokenUri
from hwlicense.device.counters import Counters
from hwlicense.device.home import Home, read_vendor
from hwlicense.storage import reporting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hwlicense.core.documents import VendorPublic
    from hwlicense.core.hardware import AnyHardware, PinSource, TouchRequest
    from hwlicense.device.bound import Connect

HOME_VARIABLE: Final = "HWLICENSE_HOME"
TPM_VARIABLE: Final = "HWLICENSE_TPM"
TOKEN_VARIABLE: Final = "HWLICENSE_TOKEN"  # noqa: S105  # a variable's name
_MEND: Final = "Mend it; the error that it raised is this one's cause."


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
    given = Path(path) if path else default_home()
    # A program may change its folder while a model is open
    place = Home(given.absolute(), Path(state).absolute() if state else None)
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


def token_uris(given: Sequence[str], place: Home) -> list[TokenUri]:
    """Where tokens are looked for: URIs that name a module. Raises UsageError for one that does not."""
    chosen = list(given)
    if not chosen and (variable := os.environ.get(TOKEN_VARIABLE)):
        chosen = [variable]
    if not chosen and (enrolled := place.enrolled()):
        chosen = enrolled.tokens
    uris = [TokenUri.parse(text) for text in chosen]
    for uri in uris:
        if uri.module is None:
            what = f"{uri} does not say which module the token needs."
            hint = "Add the module of the token's maker: ?module-path=/usr/lib/MODULE.so"
            raise UsageError(Reason.USAGE, what, hint)
    return uris


def hardware(
    place: Home, tpm: str | None = None, tokens: Sequence[str] = (), touch: TouchRequest | None = None
) -> Connect:
    """Opens hardware of a kind when called. Raises UsageError EXTRA_MISSING there, where its library is not installed.

    Any dongle that is plugged in may be a license's: none is chosen here.
    """
    asking = _asking(touch) if touch else None

    def connect(kind: str) -> AnyHardware:
        match kind:  # each library is an extra, and slow to import
            case "tpm":
                from hwlicense.binders.tpm import TpmHardware  # noqa: PLC0415

                return TpmHardware(tpm_address(tpm, place), Counters(place))
            case "pkcs11":
                from hwlicense.binders.pkcs11 import TokenHardware  # noqa: PLC0415

                modules = dict.fromkeys(uri.module for uri in token_uris(tokens, place) if uri.module)
                if not modules:
                    what = "It is not known which module (shared library) speaks to the token of this license."
                    hint = "Give --token, token= in Python or HWLICENSE_TOKEN: pkcs11:?module-path=/usr/lib/MODULE.so"
                    raise UsageError(Reason.TOKEN_UNCONFIGURED, what, hint)
                return TokenHardware(list(modules), touch=asking)
            case _:
                from hwlicense.binders.usb import UsbHardware  # noqa: PLC0415

                return UsbHardware(touch=asking)

    return connect


def _asking(touch: TouchRequest) -> TouchRequest:
    """`touch`, whose failures are errors of the tree."""

    def ask(prompt: str, /) -> None:
        try:
            touch(prompt)
        except HwlicenseError:
            raise
        except Exception as error:
            what = f"The function given as touch= failed ({type(error).__name__})."
            raise UsageError(Reason.USAGE, what, _MEND) from error

    return ask


def pin(
    source: Callable[[str], str | bytes | bytearray | Secret] | None, *, last_try: bool = False
) -> PinSource | None:
    """A source that gives secrets, and refuses whatever else an application's function may return.

    `last_try` is the second yes that the last try before hardware locks takes.
    """
    if source is None:
        return None
    agreed = last_try

    def ask(prompt: str, /, *, last_try: bool = False) -> Secret:
        if last_try and not agreed:
            raise last_try_refused(prompt)
        try:
            found = source(prompt)
        except HwlicenseError:
            raise
        except Exception as error:
            what = f"The function given as pin= failed ({type(error).__name__})."
            raise RefusedError(Reason.PIN_NEEDED, what, _MEND) from error
        match found:
            case Secret() as secret if len(secret):
                return secret
            case str(text) if text:
                return Secret(bytearray(text, "utf-8"))
            case bytearray() as given if given:
                return Secret(given)  # which wipes the caller's
            case bytes() as given if given:
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
