"""What pyusb sees of a simulated bus: one of its backends, and how it gets where pyusb looks for libusb's."""

from __future__ import annotations

import contextlib
import errno
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import usb.backend
import usb.core

from hwlicense_simulators.usb_bus import BusError
from hwlicense_simulators.usb_remote import RemoteBus

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterator

# libusb.h, and the words of libusb_strerror
_LIBUSB = {
    errno.EIO: (-1, "Input/Output Error"),
    errno.EINVAL: (-2, "Invalid parameter"),
    errno.EACCES: (-3, "Access denied (insufficient permissions)"),
    errno.ENODEV: (-4, "No such device (it may have been disconnected)"),
    errno.ENOENT: (-5, "Entity not found"),
    errno.EBUSY: (-6, "Resource busy"),
    errno.ETIMEDOUT: (-7, "Operation timed out"),
    errno.EPIPE: (-9, "Pipe error"),
}
_TO_HOST = 0x80


@dataclass(frozen=True, slots=True)
class _Identity:
    bus: int
    address: int
    port: int
    vendor: int
    product: int


class Backend(usb.backend.IBackend):  # type: ignore[misc]  # pyusb has no types
    """A pyusb backend over the `call` of a Session or of a RemoteBus. Raises USBError with the errno of libusb."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self._bus_call = call

    def _call(self, operation: str, *arguments: object) -> Any:  # noqa: ANN401  pyusb has no types
        try:
            return self._bus_call(operation, *arguments)
        except BusError as error:
            number = error.errno or errno.EIO
            code, text = _LIBUSB[number]
            kind = usb.core.USBTimeoutError if number == errno.ETIMEDOUT else usb.core.USBError
            raise kind(text, code, number) from error

    # what is there

    def enumerate_devices(self) -> Iterator[_Identity]:
        """The devices that are plugged in now."""
        return iter([_Identity(**device) for device in self._call("devices")])

    def get_parent(self, dev: _Identity) -> None:
        """None: hubs are not simulated."""

    def get_device_descriptor(self, dev: _Identity) -> SimpleNamespace:
        """As a YubiKey 5 has it."""
        return SimpleNamespace(
            bLength=18,
            bDescriptorType=1,
            bcdUSB=0x0200,
            bDeviceClass=0,
            bDeviceSubClass=0,
            bDeviceProtocol=0,
            bMaxPacketSize0=64,
            idVendor=dev.vendor,
            idProduct=dev.product,
            bcdDevice=0x0543,
            iManufacturer=1,
            iProduct=2,
            iSerialNumber=0,
            bNumConfigurations=1,
            bus=dev.bus,
            address=dev.address,
            port_number=dev.port,
            port_numbers=(dev.port,),
            speed=2,
        )

    def get_configuration_descriptor(self, dev: _Identity, config: int) -> SimpleNamespace:  # noqa: ARG002
        """The only one."""
        _only(config)
        return SimpleNamespace(
            bLength=9,
            bDescriptorType=2,
            wTotalLength=34,
            bNumInterfaces=1,
            bConfigurationValue=1,
            iConfiguration=0,
            bmAttributes=0x80,
            bMaxPower=15,
            extra_descriptors=[],
        )

    def get_interface_descriptor(self, dev: _Identity, intf: int, alt: int, config: int) -> SimpleNamespace:  # noqa: ARG002
        """A keyboard of the boot class."""
        _only(intf, alt, config)
        return SimpleNamespace(
            bLength=9,
            bDescriptorType=4,
            bInterfaceNumber=0,
            bAlternateSetting=0,
            bNumEndpoints=1,
            bInterfaceClass=3,
            bInterfaceSubClass=1,
            bInterfaceProtocol=1,
            iInterface=0,
            extra_descriptors=[9, 0x21, 0x10, 0x01, 0, 1, 0x22, 71, 0],
        )

    def get_endpoint_descriptor(self, dev: _Identity, ep: int, intf: int, alt: int, config: int) -> SimpleNamespace:  # noqa: ARG002
        """Where keystrokes would come from."""
        _only(ep, intf, alt, config)
        return SimpleNamespace(
            bLength=7,
            bDescriptorType=5,
            bEndpointAddress=0x81,
            bmAttributes=3,
            wMaxPacketSize=8,
            bInterval=10,
            bRefresh=0,
            bSynchAddress=0,
            extra_descriptors=[],
        )

    # what is done with it

    def open_device(self, dev: _Identity) -> int:
        """A handle."""
        handle: int = self._call("open", dev.address)
        return handle

    def close_device(self, dev_handle: int) -> None:
        """Close it; as in libusb this cannot fail, and pyusb's finalizers rely on that."""
        with contextlib.suppress(usb.core.USBError):
            self._call("close", dev_handle)

    def set_configuration(self, dev_handle: int, config_value: int) -> None:
        """EBUSY while a driver or a claim is on an interface."""
        self._call("configure", dev_handle, config_value)

    def get_configuration(self, dev_handle: int) -> int:
        """Always 1."""
        value: int = self._call("configuration", dev_handle)
        return value

    def claim_interface(self, dev_handle: int, intf: int) -> None:
        """EBUSY while another handle or the kernel's driver has it."""
        self._call("claim", dev_handle, intf)

    def release_interface(self, dev_handle: int, intf: int) -> None:
        """Release it; the kernel's driver does not come back by that."""
        self._call("release", dev_handle, intf)

    def is_kernel_driver_active(self, dev_handle: int, intf: int) -> bool:
        """Whether the kernel uses it as a keyboard."""
        active: bool = self._call("driver", dev_handle, intf)
        return active

    def detach_kernel_driver(self, dev_handle: int, intf: int) -> None:
        """ENOENT where it is detached."""
        self._call("detach", dev_handle, intf)

    def attach_kernel_driver(self, dev_handle: int, intf: int) -> None:
        """EBUSY while the interface is claimed."""
        self._call("attach", dev_handle, intf)

    def reset_device(self, dev_handle: int) -> None:
        """The device starts anew."""
        self._call("reset", dev_handle)

    def ctrl_transfer(
        self,
        dev_handle: int,
        bmRequestType: int,  # noqa: N803  pyusb's names
        bRequest: int,  # noqa: N803
        wValue: int,  # noqa: N803
        wIndex: int,  # noqa: N803
        data: array[int],
        timeout: int,
    ) -> int:
        """Read into `data`, or write it; the number of bytes that went over the bus."""
        setup = (dev_handle, bmRequestType, bRequest, wValue, wIndex)
        if not bmRequestType & _TO_HOST:
            written: int = self._call("control", *setup, data.tobytes().hex(), timeout)
            return written
        read = bytes.fromhex(self._call("control", *setup, len(data), timeout))
        for index, byte in enumerate(read):
            data[index] = byte
        return len(read)


def _only(*indexes: int) -> None:
    if any(indexes):
        raise IndexError("Invalid index")  # as libusb's backend: pyusb takes it for the end of a list


@contextlib.contextmanager
def installed(backend: Backend) -> Iterator[None]:
    """Let pyusb find this backend where it looks for libusb 1.0."""
    from usb.backend import libusb1  # noqa: PLC0415  it looks for the library

    before = libusb1.get_backend
    libusb1.get_backend = lambda find_library=None: backend  # noqa: ARG005
    try:
        yield
    finally:
        libusb1.get_backend = before


def install_remote(libusb1: Any, path: str) -> None:  # noqa: ANN401  pyusb has no types
    """The same in a process that was started with a simulated bus: `libusb1` is pyusb's module, `path` the socket.

    pyusb's own function would swallow an error here; this one raises OSError where the bus is gone.
    """
    backends: list[Backend] = []

    def get_backend(find_library: object = None) -> Backend:  # noqa: ARG001
        if not backends:
            backends.append(Backend(RemoteBus(path).call))
        return backends[0]

    libusb1.get_backend = get_backend
