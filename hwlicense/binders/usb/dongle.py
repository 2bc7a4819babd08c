"""One USB dongle: asked, and programmed."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from hwlicense.binders.usb import frames
from hwlicense.binders.usb.connection import Connection
from hwlicense.core.dongle import ANSWER_SIZE, ONLYKEY
from hwlicense.core.errors import AbsentError, HardwareError, Reason, UsageError

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from hwlicense.core.dongle import Mode
    from hwlicense.core.hardware import TouchRequest
    from hwlicense.core.secret import Secret

"""Its vendor and product id. It differs from YubiKeys in some ways."""

PATIENCE: Final = 5.0
"""Seconds to wait for another process's work with the dongle."""

DEADLINE: Final = 2.0
"""Seconds that a dongle may take for anything but a touch."""

TOUCH_LIMIT: Final = 30.0
"""Seconds to wait for a finger, however long the dongle says that it waits."""

_PAUSE: Final = 0.005
_TOUCH_PAUSE: Final = 0.05
_SERIAL_SIZE: Final = 4
_NOBODYS: Final = (0, 0x10BF91)
"""Serial numbers that name no dongle. All OnlyKeys have the latter (usb_dev.c of OnlyKey-Firmware)."""

_NEO: Final = 3


class Dongle:
    """A dongle, usable in a `with` block: it is claimed within, and given back to the keyboard driver at its end.

    All methods and properties but `product` need the block. They raise AbsentError DONGLE_ABSENT when it is pulled
    out, and HardwareError DONGLE_FAILED when it does not keep to the protocol or to its deadlines.
    """

    def __init__(self, device: Any, used: Any, backend: object | None = None) -> None:  # noqa: ANN401
        self.product = f"{device.idVendor:04x}:{device.idProduct:04x}"
        self.place = f"{device.bus}:{device.address}"
        self.patience = PATIENCE
        self._connection = Connection(device, used, backend, self.product)
        self._state: frames.Status | None = None
        self._serial: str | None = None
        self._serial_asked = False
        self._touched: set[int] = set()
        # OnlyKey leaves 0x80 standing in whatever it sends but its status (okcrypto.cpp)
        self._response = frames.RESPONSE | (frames.WRITTEN if self.product == ONLYKEY else 0)

    def __enter__(self) -> Self:
        try:
            self._connection.open(self.patience)
            self._settle()
        except BaseException:
            self._connection.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._state = None
        self._connection.close()

    def __str__(self) -> str:
        return f"{self.product}:{self._serial}" if self._serial else self.product

    @property
    def firmware(self) -> str:
        """Its version, as in "5.4.3"."""
        return ".".join(map(str, self._status.version))

    def serial(self) -> str | None:
        """Its serial number in decimal digits. None where it does not tell, or has none of its own."""
        if not self._serial_asked:
            try:
                with self._ask(frames.SERIAL, b"", _SERIAL_SIZE) as answer:
                    number = int.from_bytes(answer.buffer, "big")
                self._serial = str(number) if number not in _NOBODYS else None
            except HardwareError as error:
                if error.reason != Reason.DONGLE_UNPROGRAMMED:
                    raise
            self._serial_asked = True
        return self._serial

    def configured(self, slot: int) -> bool:
        """Whether anything is programmed into the slot. An OnlyKey says so of both."""
        return self._status.valid(slot)

    def touch_wanted(self, slot: int) -> bool:
        """Whether the slot answers only when touched, by its own word, or because it has waited for that before."""
        return self._status.touch(slot) or slot in self._touched

    def ask(self, slot: int, challenge: bytes, touch: TouchRequest | None = None, *, wait: bool = True) -> Secret:
        """HMAC-SHA1 of a challenge of up to 64 bytes, which zeros fill up: 20 bytes. Raises HardwareError, UsageError.

        `touch` is called once when the dongle waits for a finger. Then it raises DONGLE_UNTOUCHED when the dongle gives
        up; without `wait`, at once. DONGLE_UNPROGRAMMED where the slot takes no challenges.
        """
        return self._ask(frames.HMAC[_slot(slot)], challenge, ANSWER_SIZE, _Touch(slot, touch, wait))

    def program(
        self, slot: int, secret: Secret, *, touch: bool, mode: Mode, access_code: Secret | None, current: Secret | None
    ) -> None:
        """Write an HMAC secret of 20 bytes into a slot, under a new access code of 6 bytes or none.

        `current` is the access code that the slot has. Raises HardwareError DONGLE_PROTECTED where it is another,
        DONGLE_FAILED for a dongle that cannot be programmed, and UsageError.
        """
        command = frames.CONFIGURE[_slot(slot)]
        if self.product == ONLYKEY:
            what = "An OnlyKey takes secrets from its own application only."
            raise HardwareError(Reason.DONGLE_FAILED, what, "Program it there, then enroll it.")
        if self._status.version[0] == _NEO:  # whose program sequence may be an old one; yubikit does the same
            self._write_only(frames.SCAN_MAP, b"c" * 51)
        before = self._settle()
        payload = frames.configuration(secret, touch=touch, mode=mode, access_code=access_code, current=current)
        with payload:
            after = self._write_only(command, payload.buffer)
        if after.program_sequence in {(before.program_sequence + 1) & 0xFF, before.program_sequence % 0xFF + 1}:
            return  # what follows 255 is 0 or 1
        if not before.valid(slot):
            if after.valid(slot):
                return
            raise frames.garbled(f"refuses to have slot {slot} programmed")
        what = f"Slot {slot} of the dongle {self} is protected by another access code."
        raise HardwareError(Reason.DONGLE_PROTECTED, what, "Whoever programmed it has the code; or use the other slot.")

    # ---- one command ----

    def _ask(self, command: int, payload: bytes, size: int, touch: _Touch | None = None) -> Secret:
        """The answer to a command; asked again once if it comes garbled."""
        again = True
        with frames.frame(command, payload) as frame:
            while True:
                with self._left_clean():
                    self._send(frame)
                    first = self._awaited(touch)
                    try:
                        return self._collected(first, size)
                    except HardwareError as error:
                        if isinstance(error, AbsentError) or not again:
                            raise
                again = False

    def _write_only(self, command: int, payload: bytes | bytearray) -> frames.Status:
        """Send a command that has no answer. What it has changed shows in the status that follows."""
        with frames.frame(command, payload) as frame, self._left_clean():
            self._send(frame)
            self._state = frames.Status.parse(self._idle("takes too long to be programmed"))
            return self._state

    @contextlib.contextmanager
    def _left_clean(self) -> Iterator[None]:
        """Leave neither a question nor an answer in the dongle, for no other program to find, and for no later one."""
        try:
            yield
        finally:
            self._connection.reset()

    def _settle(self) -> frames.Status:
        """Have it forget what was asked before, perhaps by a process that was killed, and read its status."""
        self._connection.write(frames.RESET)
        self._state = frames.Status.parse(self._idle("stays busy with something else"))
        return self._state

    def _send(self, frame: Secret) -> None:
        self._settle()
        chunks = frames.chunks(frame)
        with contextlib.closing(chunks):
            for chunk in chunks:
                report = self._poll(lambda flags: not flags & frames.WRITTEN, "does not take what it is sent")
                if report[frames.FLAGS]:  # an answer before the question is an old one
                    raise frames.garbled("answers before it is asked")
                self._connection.write(chunk)

    def _awaited(self, touch: _Touch | None) -> array[int]:
        """The first report of the answer."""
        give_up = time.monotonic() + DEADLINE
        started: float | None = None
        while True:
            report = self._connection.read()
            flags, now = report[frames.FLAGS], time.monotonic()
            if flags & frames.RESPONSE:
                return report
            if flags & frames.TOUCH:
                if started is None:
                    started = now
                    self._touch_awaited(touch)
                give_up = min(now + (flags & frames.NUMBER) + 1, started + TOUCH_LIMIT)
            if started is not None and (not flags or now >= give_up):
                raise self._untouched()
            if not flags:
                what = f"The dongle {self} has no secret for challenges in the slot that is asked."
                hint = "Name the other slot (slot=1 or slot=2), or have the dongle programmed; unlock an OnlyKey."
                raise HardwareError(Reason.DONGLE_UNPROGRAMMED, what, hint)
            if now >= give_up:
                raise frames.garbled("does not answer")
            time.sleep(_PAUSE if started is None else _TOUCH_PAUSE)

    def _touch_awaited(self, touch: _Touch | None) -> None:
        if touch is None:
            raise frames.garbled("waits for a touch without a reason")
        self._touched.add(touch.slot)
        if not touch.wait:
            raise self._untouched()
        if touch.request is not None:
            touch.request(f"Touch the USB dongle {self}.")

    def _untouched(self) -> HardwareError:
        what = f"The dongle {self} waits for a touch, and was not touched."
        return HardwareError(Reason.DONGLE_UNTOUCHED, what, "Try again, and touch it when its light blinks.")

    def _collected(self, first: array[int], size: int) -> Secret:
        response = frames.Response(size, self._response)
        try:
            report = first
            while not response.take(report):
                report = self._connection.read()
            return response.content()
        finally:
            response.wipe()

    # ---- reports ----

    @property
    def _status(self) -> frames.Status:
        if self._state is None:
            raise UsageError(Reason.USAGE, f"The dongle {self} is not open.", "with dongle: ...")
        return self._state

    def _idle(self, otherwise: str) -> array[int]:
        return self._poll(lambda flags: not flags, otherwise)

    def _poll(self, ready: Callable[[int], bool], otherwise: str) -> array[int]:
        """Read until the flags are as wanted. Raises HardwareError DONGLE_FAILED when the deadline has passed."""
        give_up = time.monotonic() + DEADLINE
        while True:
            report = self._connection.read()
            if ready(report[frames.FLAGS]):
                return report
            if time.monotonic() >= give_up:
                raise frames.garbled(otherwise)
            time.sleep(_PAUSE)


class _Touch(NamedTuple):
    slot: int
    request: TouchRequest | None
    wait: bool


def _slot(slot: int) -> int:
    if slot not in frames.HMAC:
        raise UsageError(Reason.USAGE, f"A dongle has slots 1 and 2, not {slot}.")
    return slot
