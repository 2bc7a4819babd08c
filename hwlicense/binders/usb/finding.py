"""Which USB dongle is meant: selectors, and the dongles that are plugged in."""

from __future__ import annotations

import contextlib
import re
from typing import Final, Literal, NamedTuple

from hwlicense.binders.usb.connection import devices
from hwlicense.binders.usb.dongle import Dongle
from hwlicense.core.dongle import PRODUCTS
from hwlicense.core.errors import AbsentError, HardwareError, Reason, UsageError

Slot = Literal[1, 2]

_SELECTOR: Final = re.compile(
    r"(?:any|([\da-f]{4}:[\da-f]{4})(?::([\da-z]{1,64}))?)(?:,slot=([12]))?", re.IGNORECASE | re.ASCII
)
_DEFAULT_SLOT: Final = 2


class Selector(NamedTuple):
    """Which dongle, and which of its slots. In text: any, VVVV:PPPP or VVVV:PPPP:SERIAL; then ",slot=1" or nothing."""

    product: str | None = None
    serial: str | None = None
    slot: Slot = _DEFAULT_SLOT

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Raises UsageError."""
        match = _SELECTOR.fullmatch(text)
        if match is None:
            what = f'"{text}" does not select a USB dongle.'
            raise UsageError(Reason.USAGE, what, 'Use any, 1050:0407 or 1050:0407:SERIAL, with ",slot=1" for slot 1.')
        product, serial, slot = match.groups()
        if product is not None and product.lower() not in PRODUCTS:
            what = f"{product} is no USB dongle that can be used."
            raise UsageError(Reason.USAGE, what, f"These can: {', '.join(PRODUCTS)}.")
        return cls(product and product.lower(), serial, 1 if slot == "1" else _DEFAULT_SLOT)

    def __str__(self) -> str:
        what = ":".join(part for part in (self.product or "any", self.serial) if part)
        return what if self.slot == _DEFAULT_SLOT else f"{what},slot={self.slot}"


ANY: Final = Selector()


def find(selector: Selector | str = ANY, backend: object | None = None) -> list[Dongle]:
    """The dongles that are plugged in and selected, none opened. `backend` is pyusb's; libusb where it is None.

    Raises UsageError, and HardwareError: DONGLE_FAILED without libusb, and why a dongle could not be asked for its
    serial number where none has the right one.
    """
    chosen = Selector.parse(selector) if isinstance(selector, str) else selector
    pairs = [_pair(product) for product in PRODUCTS if chosen.product in {None, product}]
    found = [Dongle(device, used, backend) for device, used in devices(backend, pairs)]
    if chosen.serial is None:
        return found
    matching, failure = [], None
    for dongle in found:
        try:
            with dongle:
                if dongle.serial() == chosen.serial:
                    matching.append(dongle)
        except AbsentError:  # pulled out meanwhile
            continue
        except HardwareError as error:
            failure = failure or error
    if failure is not None and not matching:
        raise failure
    return matching


def find_one(selector: Selector | str = ANY, backend: object | None = None) -> Dongle:
    """The one dongle that is plugged in and selected, not opened.

    Raises AbsentError where there is none, UsageError where there are several, and as `find` does.
    """
    found = find(selector, backend)
    if len(found) == 1:
        return found[0]
    if found:
        what = f"{len(found)} USB dongles are plugged in that fit: {_names(found)}."
        raise UsageError(Reason.USAGE, what, "Name one of them: --usb VVVV:PPPP:SERIAL, or pull the others out.")
    others = find(ANY, backend)
    what = f'No USB dongle fits "{selector}".' if others else "No USB dongle is plugged in."
    hint = f"Plugged in: {_names(others)}." if others else "Plug it in, or look for it with `lsusb`."
    raise AbsentError(Reason.DONGLE_ABSENT, what, hint)


def _names(dongles: list[Dongle]) -> str:
    for dongle in dongles:
        with contextlib.suppress(HardwareError), dongle:
            dongle.serial()  # which then is part of its name
    return ", ".join(map(str, dongles))


def _pair(product: str) -> tuple[int, int]:
    vendor, _, number = product.partition(":")
    return int(vendor, 16), int(number, 16)
