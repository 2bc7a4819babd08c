"""A USB bus with simulated devices: addresses, handles, claims and the kernel's driver, as Linux and libusb have them.

Nothing here needs pyusb: `usb_backend` is what pyusb sees of it, `usb_remote` what other processes see.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwlicense_simulators.errors import SimulatorError
from hwlicense_simulators.process import ShortFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hwlicense_simulators.dongle_protocol import Device

VARIABLE = "HWLICENSE_SIMULATOR_USB"
"""The environment variable that leads `startup/sitecustomize.py` to a bus."""

_STARTUP = Path(__file__).with_name("startup")
_GET_REPORT, _SET_REPORT, _FEATURE = (0xA1, 0x01), (0x21, 0x09), 0x0300
_GET_DESCRIPTOR, _STRING, _ENGLISH = (0x80, 0x06), 3, b"\x04\x03\x09\x04"
_INTERFACE = 1  # the recipient in a request type


class BusError(OSError):
    """What libusb would say, as its errno."""

    def __init__(self, number: int) -> None:
        super().__init__(number, os.strerror(number))


@dataclass(slots=True)
class TransferFaults:
    """What is wrong between host and device; nothing, when new."""

    seconds: float = 0.0
    hanging: bool = False
    denied: bool = False
    busy: bool = False
    left: int | None = None


@dataclass(eq=False)
class Gadget:
    """A device as USB knows it: a keyboard of the boot class whose interface 0 takes feature reports."""

    device: Device
    vendor: int
    product: int
    manufacturer: str
    name: str
    faults: TransferFaults = field(default_factory=TransferFaults)
    transfers: list[tuple[str, bytes]] = field(default_factory=list)

    def string(self, index: int) -> bytes:
        """A string descriptor; index 0 has the languages. Raises BusError."""
        if index == 0:
            return _ENGLISH
        if index > 2:  # noqa: PLR2004  manufacturer and name; YubiKeys show no serial number here, unless told to
            raise BusError(errno.EPIPE)
        text = (self.manufacturer, self.name)[index - 1].encode("utf-16-le")
        return bytes((len(text) + 2, _STRING)) + text


@dataclass(eq=False, slots=True)
class _Plugged:
    gadget: Gadget
    address: int
    port: int
    driver: bool = True
    claim: tuple[Session, int] | None = None


class Bus:
    """One bus. Devices come and go; each has a new address whenever it is plugged in, as on Linux."""

    number = 1

    def __init__(self) -> None:
        self.change = threading.Condition(threading.RLock())
        self._plugged: list[_Plugged] = []
        self._addresses = itertools.count(2)
        self._socket: Path | None = None

    # what a person does

    def plug(self, gadget: Gadget, port: int | None = None) -> None:
        """Plug in, at the given port or the first free one. Raises SimulatorError."""
        with self.change:
            if self.find(gadget):
                raise SimulatorError("the simulated device is plugged in already")
            taken = {plugged.port for plugged in self._plugged}
            if port in taken:
                raise SimulatorError(f"there is something in port {port} already")
            port = port or next(number for number in itertools.count(1) if number not in taken)
            gadget.device.restart()
            self._plugged.append(_Plugged(gadget, next(self._addresses), port))

    def pull(self, gadget: Gadget) -> None:
        """Pull out, whatever goes on. Raises SimulatorError."""
        with self.change:
            plugged = self.find(gadget)
            if plugged is None:
                raise SimulatorError("the simulated device is not plugged in")
            self._plugged.remove(plugged)
            self.change.notify_all()

    # who looks at it

    def find(self, gadget: Gadget) -> _Plugged | None:
        """How a device is plugged in; None where it is not."""
        return next((plugged for plugged in self._plugged if plugged.gadget is gadget), None)

    def all(self) -> list[_Plugged]:
        """Everything that is plugged in."""
        return list(self._plugged)

    def backend(self) -> Any:  # noqa: ANN401  pyusb has no types
        """A pyusb backend with this bus, for `usb.core.find(backend=...)`. Raises SimulatorError without pyusb."""
        return _usb_backend().Backend(Session(self).call)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Make this bus what pyusb finds in this process, instead of libusb's. Raises SimulatorError without pyusb."""
        with _usb_backend().installed(self.backend()):
            yield

    @contextlib.contextmanager
    def serve(self) -> Iterator[None]:
        """Let processes with this bus's `environment` see it as well."""
        from hwlicense_simulators.usb_remote import Server  # noqa: PLC0415  it needs this module

        folder = ShortFolder()
        try:
            with Server(self, folder.path / "usb"):
                self._socket = folder.path / "usb"
                yield
        finally:
            self._socket = None
            folder.close()

    @property
    def environment(self) -> dict[str, str]:
        """HWLICENSE_SIMULATOR_USB, and the PYTHONPATH by which a Python heeds it. Raises SimulatorError."""
        if self._socket is None:
            raise SimulatorError("the simulated bus is for this process alone", "with bus.serve(): ...")
        others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        folders = [str(_STARTUP), *(folder for folder in others if folder not in {"", str(_STARTUP)})]
        return {VARIABLE: str(self._socket), "PYTHONPATH": os.pathsep.join(folders)}


class Session:
    """A process that uses a bus: `call` is all that the backend needs. What it holds is released when it ends.

    As with the kernel, its end leaves a detached driver detached.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._handles: dict[int, _Plugged] = {}
        self._numbers = itertools.count(1)
        self._ended = False
        self._operations: dict[str, Callable[..., Any]] = {
            "devices": self._devices,
            "open": self._open,
            "close": self._close,
            "configure": self._configure,
            "configuration": self._configuration,
            "claim": self._claim,
            "release": self._release,
            "driver": self._driver,
            "detach": self._detach,
            "attach": self._attach,
            "reset": self._reset,
            "control": self._control,
        }

    def call(self, operation: str, *arguments: Any) -> Any:  # noqa: ANN401  whatever JSON has
        """Do one of the operations. Raises BusError."""
        with self._bus.change:
            if operation not in self._operations:
                raise BusError(errno.EINVAL)
            return self._operations[operation](*arguments)

    def end(self) -> None:
        """Release everything, and let go of transfers that hang."""
        with self._bus.change:
            self._ended = True
            for handle in list(self._handles):
                self._close(handle)
            self._bus.change.notify_all()

    def _devices(self) -> list[dict[str, int]]:
        return [
            {
                "bus": self._bus.number,
                "address": plugged.address,
                "port": plugged.port,
                "vendor": plugged.gadget.vendor,
                "product": plugged.gadget.product,
            }
            for plugged in self._bus.all()
        ]

    def _open(self, address: int) -> int:
        plugged = next((plugged for plugged in self._bus.all() if plugged.address == address), None)
        if plugged is None:
            raise BusError(errno.ENODEV)
        if plugged.gadget.faults.denied:
            raise BusError(errno.EACCES)
        handle = next(self._numbers)
        self._handles[handle] = plugged
        return handle

    def _close(self, handle: int) -> None:
        plugged = self._handles.pop(handle, None)
        if plugged is not None and plugged.claim == (self, handle):
            plugged.claim = None

    def _device(self, handle: int, interface: int = 0) -> _Plugged:
        plugged = self._handles.get(handle)
        if plugged is None or plugged not in self._bus.all():
            raise BusError(errno.ENODEV)
        if interface != 0:
            raise BusError(errno.ENOENT)
        return plugged

    def _configuration(self, handle: int) -> int:
        self._device(handle)
        return 1

    def _configure(self, handle: int, value: int) -> None:
        plugged = self._device(handle)
        if plugged.driver or plugged.claim:
            raise BusError(errno.EBUSY)  # Linux refuses while anything uses an interface
        if value not in {0, 1}:
            raise BusError(errno.ENOENT)

    def _claim(self, handle: int, interface: int) -> None:
        plugged = self._device(handle, interface)
        if plugged.claim == (self, handle):
            return
        if plugged.driver or plugged.claim or plugged.gadget.faults.busy:
            raise BusError(errno.EBUSY)
        plugged.claim = self, handle

    def _release(self, handle: int, interface: int) -> None:
        plugged = self._device(handle, interface)
        if plugged.claim != (self, handle):
            raise BusError(errno.ENOENT)
        plugged.claim = None

    def _driver(self, handle: int, interface: int) -> bool:
        return self._device(handle, interface).driver

    def _detach(self, handle: int, interface: int) -> None:
        plugged = self._device(handle, interface)
        if not plugged.driver:
            raise BusError(errno.ENOENT)
        plugged.driver = False

    def _attach(self, handle: int, interface: int) -> None:
        plugged = self._device(handle, interface)
        if plugged.driver or plugged.claim:
            raise BusError(errno.EBUSY)  # usbfs is the driver of what is claimed
        plugged.driver = True

    def _reset(self, handle: int) -> None:
        self._device(handle).gadget.device.restart()

    def _control(
        self, handle: int, kind: int, request: int, value: int, index: int, data: str | int, timeout: int
    ) -> str | int:
        """One control transfer: `data` is what to write, in hex, or how much to read; the answer is the other one."""
        plugged = self._device(handle, index & 0xFF if kind & 0x1F == _INTERFACE else 0)
        gadget = plugged.gadget
        if kind & 0x1F == _INTERFACE and plugged.claim != (self, handle):
            raise BusError(errno.EBUSY)
        self._let_pass(plugged, timeout / 1000 if timeout else None)
        if (kind, request) == _GET_DESCRIPTOR and value >> 8 == _STRING and isinstance(data, int):
            return gadget.string(value & 0xFF)[:data].hex()
        if (kind, request, value) == (*_GET_REPORT, _FEATURE) and isinstance(data, int):
            report = gadget.device.read()[:data]
            self._transferred(plugged, "read", report)
            return report.hex()
        if (kind, request, value) == (*_SET_REPORT, _FEATURE) and isinstance(data, str):
            report = bytes.fromhex(data)
            gadget.device.write(report)
            self._transferred(plugged, "write", report)
            return len(report)
        raise BusError(errno.EPIPE)

    def _let_pass(self, plugged: _Plugged, limit: float | None) -> None:
        """Be as slow as the device; the bus is free meanwhile."""
        faults = plugged.gadget.faults

        def is_over() -> bool:
            return self._ended or plugged not in self._bus.all()

        if faults.hanging:
            if not self._bus.change.wait_for(lambda: is_over() or not faults.hanging, limit):
                raise BusError(errno.ETIMEDOUT)
        elif faults.seconds:
            too_slow = limit is not None and faults.seconds > limit
            if not self._bus.change.wait_for(is_over, limit if too_slow else faults.seconds) and too_slow:
                raise BusError(errno.ETIMEDOUT)
        if is_over():
            raise BusError(errno.ENODEV)

    def _transferred(self, plugged: _Plugged, kind: str, report: bytes) -> None:
        gadget = plugged.gadget
        gadget.transfers.append((kind, report))
        if gadget.faults.left is not None:
            gadget.faults.left -= 1
            if gadget.faults.left == 0:
                gadget.faults.left = None
                self._bus.pull(gadget)


def _usb_backend() -> Any:  # noqa: ANN401  pyusb has no types
    try:
        from hwlicense_simulators import usb_backend  # noqa: PLC0415  pyusb is an extra
    except ModuleNotFoundError as error:
        raise SimulatorError("pyusb is not installed", "pip install 'hwlicense-simulators[usb]'") from error
    return usb_backend
