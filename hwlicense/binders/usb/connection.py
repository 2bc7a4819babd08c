"""Interface 0 of one USB device, for as long as it is needed: claimed, and given back to the keyboard driver."""

from __future__ import annotations

import contextlib
import errno
import os
import time
import weakref
from array import array
from typing import TYPE_CHECKING, Any, Final

import usb.core
import usb.util
from usb.backend import libusb1

from hwlicense.binders.usb.frames import REPORT_SIZE, RESET, garbled
from hwlicense.core.errors import AbsentError, HardwareError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

TRANSFER_TIMEOUT: Final = 1000
"""Milliseconds for one report: thousands of times what it takes."""

_INTERFACE: Final = 0
_READ, _WRITE = (0xA1, 0x01, 0x0300), (0x21, 0x09, 0x0300)  # GET_REPORT and SET_REPORT of feature report 0 (HID 1.11)
_PAUSE: Final = 0.05
_NOTICE: Final = 0.5  # seconds within which the kernel notices that a device was pulled out
_FOREIGN: Final = (OSError, NotImplementedError)  # a USBError is an OSError; the latter stands for ENOSYS


def library(backend: object | None) -> Any:  # noqa: ANN401  pyusb has no types
    """`backend`, or libusb in a context of its own. Raises HardwareError DONGLE_FAILED where there is no libusb.

    An old context would not do: in a forked child it shares its timers and wake-ups with the parent, and its list of
    devices has nobody who keeps it up to date.
    """
    found: Any = backend or libusb1.get_backend()
    if found is None:
        what = "The library libusb 1.0 is not installed, or cannot be used."
        raise HardwareError(Reason.DONGLE_FAILED, what, "On Debian and Ubuntu: apt install libusb-1.0-0.")
    own = getattr(found, "lib", None) if backend is None else None
    try:
        return found if own is None else type(found)(own)
    except _FOREIGN as error:
        raise HardwareError(Reason.DONGLE_FAILED, f"libusb cannot start: {error}.") from error


def devices(backend: object | None, products: Collection[tuple[int, int]]) -> list[tuple[Any, Any]]:
    """The plugged in devices with one of these pairs of vendor and product, each with the library it is reached by.

    Raises HardwareError DONGLE_FAILED.
    """
    used = library(backend)

    def wanted(device: Any) -> bool:  # noqa: ANN401  pyusb has no types
        return (device.idVendor, device.idProduct) in products

    try:
        return [(device, used) for device in usb.core.find(find_all=True, backend=used, custom_match=wanted)]
    except _FOREIGN as error:
        what = f"The USB devices cannot be listed: {error}."
        raise HardwareError(Reason.DONGLE_FAILED, what, "Look at /dev/bus/usb, and at `lsusb`.") from error


class Connection:
    """Reports to and from a device. `close` must follow `open`, also where that failed."""

    def __init__(self, device: Any, used: Any, backend: object | None, name: str) -> None:  # noqa: ANN401
        self._device, self._library = device, used  # in this order they go: a device before its library's context
        self._backend, self._name = backend, name
        # pyusb works on these arrays in place. libusb copies each report into memory of its own, which it frees and
        # does not overwrite, and so does the kernel: out of our reach.
        self._incoming, self._outgoing = array("B", bytes(REPORT_SIZE)), array("B", bytes(REPORT_SIZE))

    def open(self, patience: float) -> None:
        """Take the interface from the keyboard driver, waiting up to `patience` seconds for another process's work.

        Raises HardwareError (DONGLE_BUSY, DONGLE_NO_PERMISSION, DONGLE_FAILED) and AbsentError.
        """
        give_up = time.monotonic() + patience
        while True:
            try:
                self._claim()
            except _FOREIGN as error:
                if _number(error) != errno.EBUSY or time.monotonic() >= give_up:
                    raise self._failure(error) from error
            else:
                _open.add(self)
                return
            time.sleep(_PAUSE)

    def close(self) -> None:
        """Release the interface and give it back to the keyboard driver, whatever has happened to either. Never fails.

        The driver is called also where this process did not detach it: of two processes that follow each other, one
        detaches it, and the other keeps the first from attaching it again.
        """
        _open.discard(self)
        self._incoming[:] = array("B", bytes(REPORT_SIZE))
        with contextlib.ExitStack() as steps:  # each is taken, also if Ctrl-C interrupts another
            steps.callback(_quietly, usb.util.dispose_resources, self._device)
            steps.callback(_quietly, self._device.attach_kernel_driver, _INTERFACE)
            steps.callback(_quietly, usb.util.release_interface, self._device, _INTERFACE)

    def read(self) -> array[int]:
        """The next report, 8 bytes that the next reading overwrites. Raises HardwareError and AbsentError."""
        try:
            size = self._device.ctrl_transfer(*_READ, _INTERFACE, self._incoming, TRANSFER_TIMEOUT)
        except _FOREIGN as error:
            raise self._failure(error) from error
        if size != REPORT_SIZE:
            raise garbled("gives reports that are cut")
        return self._incoming

    def write(self, report: bytes | bytearray) -> None:
        """Send a report of 8 bytes. Raises HardwareError and AbsentError."""
        try:
            self._write(report)
        except _FOREIGN as error:
            raise self._failure(error) from error

    def reset(self) -> None:
        """Have the dongle forget what it was asked and has answered, as far as it is still there. Never fails."""
        self._incoming[:] = array("B", bytes(REPORT_SIZE))
        _quietly(self._write, RESET)

    def forget(self) -> None:
        """In a forked child: leave all to the parent. pyusb would release the parent's claim when the child exits."""
        for owner in (self._device, self._library):
            owner._finalizer.detach()  # noqa: SLF001  pyusb has no other way
        _inherited.append(self)

    def _claim(self) -> None:
        if self._device.is_kernel_driver_active(_INTERFACE):
            try:
                self._device.detach_kernel_driver(_INTERFACE)
            except OSError as error:
                if error.errno != errno.ENOENT:  # where another process was faster, claiming says so
                    raise
        usb.util.claim_interface(self._device, _INTERFACE)

    def _write(self, report: bytes | bytearray) -> None:
        try:
            for place, byte in enumerate(report):
                self._outgoing[place] = byte
            self._device.ctrl_transfer(*_WRITE, _INTERFACE, self._outgoing, TRANSFER_TIMEOUT)
        finally:
            self._outgoing[:] = array("B", bytes(REPORT_SIZE))

    def _failure(self, error: OSError | NotImplementedError) -> HardwareError:
        match _number(error):
            case errno.EACCES | errno.EPERM:
                what = f"No permission to use the dongle {self._name}."
                hint = (
                    "Install udev/69-hwlicense.rules (docs/udev.md) and plug the dongle in again; a service's user "
                    'must be in the group "hwlicense".'
                )
                return HardwareError(Reason.DONGLE_NO_PERMISSION, what, hint)
            case errno.EBUSY:
                what = f"Another program is at work with the dongle {self._name}."
                return HardwareError(Reason.DONGLE_BUSY, what, "Wait until it has finished, or close it.")
            case errno.ENODEV:
                gone = True
            case _:
                gone = self._gone()
        if gone:
            return AbsentError(Reason.DONGLE_ABSENT, f"The dongle {self._name} was pulled out.", "Plug it in again.")
        what = f"The dongle {self._name} does not work: {error}."
        return HardwareError(Reason.DONGLE_FAILED, what, "Pull it out and plug it in again, or try another port.")

    def _gone(self) -> bool:
        """Whether the device has left. Of one that was just pulled the kernel first reports failing transfers."""
        give_up = time.monotonic() + _NOTICE
        place = self._device.bus, self._device.address
        pair = self._device.idVendor, self._device.idProduct
        while True:
            try:
                if place not in [(device.bus, device.address) for device, _ in devices(self._backend, [pair])]:
                    return True
            except HardwareError:
                return False  # the first error says more
            if time.monotonic() >= give_up:
                return False
            time.sleep(_PAUSE)


def _quietly(step: Callable[..., object], *arguments: object) -> None:
    with contextlib.suppress(*_FOREIGN):
        step(*arguments)


def _number(error: OSError | NotImplementedError) -> int | None:
    return error.errno if isinstance(error, OSError) else errno.ENOSYS


_open: weakref.WeakSet[Connection] = weakref.WeakSet()
_inherited: list[Connection] = []  # kept until the process ends: they must not be collected


def _forget_all() -> None:
    for connection in tuple(_open):
        connection.forget()


os.register_at_fork(after_in_child=_forget_all)
