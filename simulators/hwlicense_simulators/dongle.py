"""A simulated USB dongle for HMAC-SHA1 challenge-response, a YubiKey or an OnlyKey, and what may go wrong with it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from hwlicense_simulators.dongle_protocol import ACCESS_CODE, SECRET, Configuration, Device, Faults
from hwlicense_simulators.errors import SimulatorError
from hwlicense_simulators.usb_bus import Bus, Gadget, TransferFaults

if TYPE_CHECKING:
    from types import TracebackType

_ONLYKEY = 0x1D50, 0x60FC


class Dongle:
    """One dongle, as a context manager: plugged in at its start, pulled and gone at its end.

    Without `folder` it is new and is thrown away; with one its serial number, slots and access codes are kept there
    and used again. A kept dongle stays what it was made as: what is said of its serial number and its slot matters
    when it is made. Without `secret` it has a random one. `programmed=False` leaves both slots empty.

    `bus` is a bus for several; without one it has its own, which its `environment` shows to other processes and
    `bus.installed()` to pyusb in this one. `touch` makes it wait for a press of its button, `touch_seconds` long;
    `vendor` 0x1D50 with `product` 0x60FC answers as an OnlyKey.

    Methods raise SimulatorError. Faults last until `heal`; those that take a number have one that shows.
    """

    def __init__(  # noqa: PLR0913  what distinguishes dongles
        self,
        folder: Path | str | None = None,
        *,
        secret: bytes | None = None,
        serial: int = 1234567,
        slot: int = 2,
        touch: bool = False,
        mode: Literal["less-than-64", "fixed-64"] = "less-than-64",
        access_code: bytes = bytes(ACCESS_CODE),
        programmed: bool = True,
        plugged: bool = True,
        bus: Bus | None = None,
        vendor: int = 0x1050,
        product: int = 0x0407,
        touch_seconds: float = 15.0,
    ) -> None:
        secret = secrets.token_bytes(SECRET) if secret is None else secret
        if len(secret) != SECRET or len(access_code) != ACCESS_CODE or slot not in {1, 2}:
            raise SimulatorError("a dongle has a secret of 20 bytes, an access code of 6, and slots 1 and 2")
        self.slot = slot
        self.bus = bus or Bus()
        made = Configuration.for_hmac(secret, less_than_64=mode == "less-than-64", touch=touch, access_code=access_code)
        self._device = Device(
            serial,
            {slot: made} if programmed else {},
            clock=time.monotonic,
            on_change=self._keep,
            touch_seconds=touch_seconds,
            like_onlykey=(vendor, product) == _ONLYKEY,
        )
        names = ("CRYPTOTRUST", "ONLYKEY") if (vendor, product) == _ONLYKEY else ("Yubico", "YubiKey OTP+FIDO+CCID")
        self._gadget = Gadget(self._device, vendor, product, *names)
        self._folder = Path(folder).absolute() if folder is not None else None
        self._shared, self._plugged_at_start = bus is not None, plugged
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            if self._folder:
                stack.callback(os.close, self._locked(self._folder))
                self._remember(self._folder / "state.json")
            if not self._shared:
                stack.enter_context(self.bus.serve())
            if self._plugged_at_start:
                self.plug()
            stack.callback(self._pull_if_plugged)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    # what it is

    @property
    def serial(self) -> int:
        """The serial number."""
        return self._device.serial

    @property
    def selector(self) -> str:
        """What HWLICENSE_USB says to mean this dongle: vendor, product and serial number."""
        return f"{self._gadget.vendor:04x}:{self._gadget.product:04x}:{self.serial}"

    @property
    def secret(self) -> bytes:
        """The secret that its slot has now."""
        return self._configuration.secret

    @property
    def access_code(self) -> bytes:
        """The access code that its slot has now; six zeros are none."""
        return self._configuration.access_code

    @property
    def programmed(self) -> bool:
        """Whether its slot has a secret."""
        return self.slot in self._device.slots

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a child process: HWLICENSE_USB, HWLICENSE_SIMULATOR_USB and PYTHONPATH."""
        return {"HWLICENSE_USB": self.selector, **self.bus.environment}

    @property
    def plugged(self) -> bool:
        """Whether it is plugged in."""
        return self.bus.find(self._gadget) is not None

    @property
    def driver_attached(self) -> bool:
        """Whether the kernel has it as a keyboard. A program that detached the driver is to attach it again."""
        plugged = self.bus.find(self._gadget)
        return plugged is not None and plugged.driver

    @property
    def claimed(self) -> bool:
        """Whether a program has its interface."""
        plugged = self.bus.find(self._gadget)
        return plugged is not None and plugged.claim is not None

    @property
    def awaiting_touch(self) -> bool:
        """Whether it waits for its button now."""
        with self.bus.change:
            return self.plugged and self._device.awaiting_touch

    @property
    def transfers(self) -> list[tuple[str, bytes]]:
        """The reports that went over the bus, each with "read" or "write"."""
        return list(self._gadget.transfers)

    def copy(self, *, serial: int | None = None, bus: Bus | None = None) -> Dongle:
        """A clone, not yet plugged in: the same slots under another serial number, by default the next one."""
        clone = Dongle(
            serial=self.serial + 1 if serial is None else serial,
            slot=self.slot,
            bus=bus,
            vendor=self._gadget.vendor,
            product=self._gadget.product,
        )
        clone._device.slots = dict(self._device.slots)
        return clone

    # what a person does

    def plug(self, port: int | None = None) -> None:
        """Plug it in: it has a new address, and the kernel takes it for a keyboard."""
        self.bus.plug(self._gadget, port)

    def pull(self) -> None:
        """Pull it out, whatever goes on."""
        self.bus.pull(self._gadget)

    def touch(self, seconds: float = 10) -> None:
        """Press the button as soon as the dongle waits for it. Raises SimulatorError if not within `seconds`."""
        deadline = time.monotonic() + seconds
        while not self._pressed():
            if time.monotonic() > deadline:
                raise SimulatorError("the simulated dongle awaits no touch", "touch it while it does: awaiting_touch")
            time.sleep(0.005)

    def touch_after(self, seconds: float) -> None:
        """From now on press the button whenever the dongle has waited that long."""
        self._device.press_after = seconds

    # what may go wrong

    def heal(self) -> None:
        """End all that was made to go wrong. A dongle that was pulled stays pulled."""
        with self.bus.change:
            self._device.faults = Faults()
            # Transfers that hang look at the old ones.
            self._gadget.faults.hanging = False
            self._gadget.faults = TransferFaults()
            self.bus.change.notify_all()

    def wrong_secret(self) -> None:
        """Answer with another key."""
        self._device.faults.wrong_secret = True

    def bad_crc(self) -> None:
        """Answer with a wrong CRC."""
        self._device.faults.bad_crc = True

    def miss_sequence(self, number: int = 1) -> None:
        """Leave out one report of an answer."""
        self._device.faults.missing = number

    def repeat_sequence(self, number: int = 1) -> None:
        """Give one report of an answer twice."""
        self._device.faults.repeated = number

    def stick(self) -> None:
        """Never clear the flag of a written report, and take no other one."""
        self._device.faults.stuck = True

    def be_busy(self, reads: int = 3) -> None:
        """Clear the flag of a written report only after so many reads; reports that come before are lost."""
        self._device.faults.busy_reads = reads

    def answer_stale(self) -> None:
        """Answer what it answered before, whatever the challenge; the first one is answered well."""
        self._device.faults.stale = True

    def never_answer(self) -> None:
        """Take a whole frame and be busy with it for ever."""
        self._device.faults.silent = True

    def await_touch(self) -> None:
        """Wait for the button, even where the slot says nothing of it."""
        self._device.faults.touch = True

    def time_out_touch(self) -> None:
        """Wait for the button and give up at once."""
        self._device.faults.touch_timeout = True

    def short_reports(self, length: int = 4) -> None:
        """Give reports of fewer than eight bytes."""
        self._device.faults.length = length

    def random_bytes(self, seed: int = 0) -> None:
        """Give random bytes for reports."""
        self._device.faults.noise = random.Random(seed)  # noqa: S311  repeatable nonsense

    def slow(self, seconds: float = 0.05) -> None:
        """Take that long for each transfer; where the program does not wait so long, errno 110."""
        self._gadget.faults.seconds = seconds

    def hang(self) -> None:
        """Complete no transfer: errno 110 when the program's time is over, 19 when the dongle is pulled."""
        self._gadget.faults.hanging = True

    def pull_after(self, transfers: int) -> None:
        """Pull it out after so many more reports, read or written: errno 19."""
        if transfers < 1:
            raise SimulatorError("pull_after counts from one", "use pull()")
        self._gadget.faults.left = transfers

    def deny(self) -> None:
        """Let nobody open it: errno 13, as without a udev rule."""
        self._gadget.faults.denied = True

    def occupy(self) -> None:
        """Let nobody claim it: errno 16, as while another program uses it."""
        self._gadget.faults.busy = True

    # inside

    def _pressed(self) -> bool:
        with self.bus.change:
            return self.plugged and self._device.touch()

    @property
    def _configuration(self) -> Configuration:
        if not self.programmed:
            raise SimulatorError(f"slot {self.slot} of the simulated dongle is not programmed")
        return self._device.slots[self.slot]

    def _pull_if_plugged(self) -> None:
        with self.bus.change:
            if self.plugged:
                self.pull()

    def _locked(self, folder: Path) -> int:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise SimulatorError(
                f"another process uses the dongle in {folder}", "wait for it, or use another folder"
            ) from None
        return lock

    def _remember(self, path: Path) -> None:
        if not path.exists():
            self._keep()
            return
        try:
            state = json.loads(path.read_text(encoding="ascii"))
            self._device.serial, self._device.program_sequence = int(state["serial"]), int(state["program_sequence"])
            slots = {int(slot): bytes.fromhex(data) for slot, data in state["slots"].items()}
            self._device.slots = {slot: Configuration.decode(data) for slot, data in slots.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SimulatorError(f"{path} is not the state of a simulated dongle: {error}") from error

    def _keep(self) -> None:
        if self._folder is None:
            return
        state = {
            "serial": self.serial,
            "program_sequence": self._device.program_sequence,
            "slots": {str(slot): configuration.encode().hex() for slot, configuration in self._device.slots.items()},
        }
        fresh = self._folder / "state.json.new"
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            json.dump(state, file, indent=1)
        fresh.rename(self._folder / "state.json")
