"""Tokens and dongles as commands of both sides use them: prepared with a PIN from a person, touches shown to one."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from hwlicense.cli import output
from hwlicense.core.errors import HardwareError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hwlicense.binders.pkcs11 import TokenHardware
    from hwlicense.binders.usb import UsbHardware
    from hwlicense.core.hardware import PinSource
    from hwlicense.core.uri import TokenUri

NewKey = Literal["p256", "rsa2048", "rsa3072"]
NEW_KEYS: Final[tuple[NewKey, ...]] = get_args(NewKey)


@contextmanager
def enrolled_token(uri: TokenUri, pin: PinSource | None, new_key: NewKey | None) -> Iterator[TokenHardware]:
    """The token that `uri` names, logged in, with the key that it will be known by. `new_key` makes one first."""
    from hwlicense.binders.pkcs11 import TokenHardware  # noqa: PLC0415  # the library is an extra

    assert uri.module is not None  # noqa: S101  # selecting.token_uris saw to it
    with TokenHardware([uri.module], uri, touch=output.note) as hardware:
        hardware.enroll(pin, new_key, "hwlicense")
        yield hardware


def found_dongle(selector: str) -> UsbHardware:
    """The dongle that `selector` names."""
    from hwlicense.binders.usb import UsbHardware  # noqa: PLC0415

    return UsbHardware(selector, touch=output.note)


def plugged_tokens(uris: Sequence[TokenUri]) -> list[dict[str, Any]]:
    """What the modules' tokens say of themselves."""
    from hwlicense.binders.pkcs11 import TokenHardware  # noqa: PLC0415

    with TokenHardware([uri.module for uri in uris if uri.module]) as hardware:
        return [facts._asdict() for facts in hardware.tokens()]


def plugged_dongles() -> list[dict[str, Any]]:
    """What dongles say of themselves, with the selector that names each; or why one cannot be asked."""
    from hwlicense.binders.usb import find  # noqa: PLC0415

    found: list[dict[str, Any]] = []
    for dongle in find():
        try:
            with dongle:
                serial, slots = dongle.serial(), [slot for slot in (1, 2) if dongle.configured(slot)]
                facts = {
                    "selector": str(dongle),
                    "serial": serial,
                    "firmware": dongle.firmware,
                    "programmed_slots": slots,
                }
        except HardwareError as error:
            facts = {"selector": dongle.product, "problem": error.what, "reason": error.reason, "hint": error.hint}
        found.append(facts)
    return found
