"""The device's side of HMAC-SHA1 challenge-response over HID feature reports: bytes in, bytes out, no I/O.

A report has eight bytes, seven of them data and the last one flags. What a YubiKey does was read in what speaks to it,
yubikit and ykpers; what they leave open is marked below as a choice.
"""

from __future__ import annotations

import hmac
import math
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

REPORT, FRAME, CHALLENGE, SECRET, ACCESS_CODE, CONFIGURATION = 8, 70, 64, 20, 6, 52
"""Sizes in bytes."""

CRC_RESIDUAL = 0xF0B8
WRITTEN, DATA, AWAITING_TOUCH = 0x80, 0x40, 0x20
"""Flags. The first is set by the host and cleared by the device."""

CONFIGURE = {0x01: 1, 0x03: 2}
ANSWER = {0x30: 1, 0x38: 2}
SERIAL = 0x10
"""The commands in a frame's slot byte, with the slots they are for. Others are refused: update, swap, NDEF."""

_CHUNK, _LAST, _SEQUENCE = 7, 9, 0x1F
_CHALLENGE_RESPONSE, _HMAC, _LESS_THAN_64, _BUTTON, _SERIAL_VISIBLE = 0x40, 0x22, 0x04, 0x08, 0x04
_LAYOUT = struct.Struct("<16s6s16s6sBBBB2xH")
_OTHER_SECRET = bytes.fromhex("ff") * SECRET


def crc(data: bytes) -> int:
    """The CRC of a frame's payload; an answer and a configuration carry it complemented."""
    value = 0xFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x8408 if value & 1 else 0)
    return value


def with_crc(data: bytes) -> bytes:
    """`data` and its complemented CRC: the CRC of all is CRC_RESIDUAL."""
    return data + struct.pack("<H", crc(data) ^ 0xFFFF)


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a slot is programmed with: 52 bytes on the wire."""

    fixed: bytes = b""
    uid: bytes = bytes(6)
    key: bytes = bytes(16)
    access_code: bytes = bytes(ACCESS_CODE)
    extended: int = 0
    ticket: int = 0
    options: int = 0

    @classmethod
    def for_hmac(
        cls, secret: bytes, *, less_than_64: bool = True, touch: bool = False, access_code: bytes = bytes(ACCESS_CODE)
    ) -> Self:
        """HMAC-SHA1 challenge-response, with a serial number that software may read."""
        options = _HMAC | (_LESS_THAN_64 if less_than_64 else 0) | (_BUTTON if touch else 0)
        uid, key = secret[16:].ljust(6, b"\0"), secret[:16]
        return cls(b"", uid, key, access_code, _SERIAL_VISIBLE, _CHALLENGE_RESPONSE, options)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises ValueError where length or CRC is wrong."""
        if len(data) != CONFIGURATION or crc(data) != CRC_RESIDUAL:
            raise ValueError("a configuration has 52 bytes, and a CRC that fits")
        fixed, uid, key, access_code, size, extended, ticket, options, _ = _LAYOUT.unpack(data)
        return cls(fixed[:size], uid, key, access_code, extended, ticket, options)

    def encode(self) -> bytes:
        """The 52 bytes; reserved ones are zero."""
        flags = (len(self.fixed), self.extended, self.ticket, self.options)
        return with_crc(_LAYOUT.pack(self.fixed, self.uid, self.key, self.access_code, *flags, 0)[:-2])

    @property
    def secret(self) -> bytes:
        """The 20 bytes that HMAC-SHA1 is keyed with."""
        return self.key + self.uid[: SECRET - len(self.key)]

    @property
    def answers(self) -> bool:
        """Whether it is for HMAC-SHA1 challenge-response."""
        return bool(self.ticket & _CHALLENGE_RESPONSE) and self.options & _HMAC == _HMAC

    @property
    def touch(self) -> bool:
        """Whether it waits for the button; anything but challenge-response does."""
        return not self.answers or bool(self.options & _BUTTON)

    @property
    def serial_visible(self) -> bool:
        """Whether software may read the serial number."""
        return bool(self.extended & _SERIAL_VISIBLE)

    def message(self, payload: bytes) -> bytes:
        """What is hashed of a frame's 64 bytes."""
        return payload.rstrip(payload[-1:]) if self.options & _LESS_THAN_64 else payload


@dataclass(slots=True)
class Faults:
    """What is wrong with a device; nothing, when new."""

    wrong_secret: bool = False
    bad_crc: bool = False
    missing: int | None = None
    repeated: int | None = None
    stuck: bool = False
    stale: bool = False
    silent: bool = False
    touch: bool = False
    touch_timeout: bool = False
    busy_reads: int = 0
    length: int = REPORT
    noise: random.Random | None = None


@dataclass(slots=True)
class _Waiting:
    since: float
    configuration: Configuration
    payload: bytes


class Device:
    """A dongle with two slots. `slots` may be set at any time; `on_change` is called when the host has set one.

    `like_onlykey` gives answers with both upper flags and refuses challenges below 16 bytes.
    """

    version = (5, 4, 3)

    def __init__(
        self,
        serial: int,
        slots: dict[int, Configuration],
        *,
        clock: Callable[[], float],
        on_change: Callable[[], None] = lambda: None,
        touch_seconds: float = 15.0,
        like_onlykey: bool = False,
    ) -> None:
        self.serial, self.slots = serial, slots
        self.program_sequence = 1 if slots else 0
        self.faults = Faults()
        self.press_after: float | None = None
        self._clock, self._on_change, self._touch_seconds = clock, on_change, touch_seconds
        self._data_flags = DATA | WRITTEN if like_onlykey else DATA
        self._shortest = 16 if like_onlykey else 0
        self._last_answer = b""
        self._written = self._busy = self._received = 0
        self._frame: bytearray | None = None
        self._answer: list[bytes] = []
        self._waiting: _Waiting | None = None
        self._silent = False

    def restart(self) -> None:
        """Lose power and get it again: what was going on is forgotten."""
        self._written = self._busy = 0
        self._forget()

    @property
    def awaiting_touch(self) -> bool:
        """Whether it waits for the button."""
        return self._still_waiting() is not None

    def touch(self) -> bool:
        """Press the button; say whether the device was waiting for it."""
        waiting = self._still_waiting()
        if waiting is not None:
            self._answer_challenge(waiting.configuration, waiting.payload)
        return waiting is not None

    # from the host

    def write(self, report: bytes) -> None:
        """Take a report. What makes no sense is ignored, as is all that comes before the last one is dealt with."""
        flags = report[-1] if len(report) == REPORT else 0
        sequence = flags & _SEQUENCE
        if not flags & WRITTEN or self._is_stuck or (self._busy and sequence <= _LAST):
            return
        self._written, self._busy = flags, self.faults.busy_reads
        if sequence > _LAST:  # 8F of ykpers, FF of yubikit
            self._busy = 0
            self._forget()
            return
        if sequence == 0:
            self._forget()
            self._frame = bytearray(FRAME)
        elif self._frame is None or sequence <= self._received:
            self._forget()
            return
        self._received = sequence
        self._frame[sequence * _CHUNK : (sequence + 1) * _CHUNK] = report[:_CHUNK]
        if sequence == _LAST:
            frame = bytes(self._frame)
            self._forget()
            self._execute(frame)

    def read(self) -> bytes:
        """The next report."""
        noise = self.faults.noise
        return (noise.randbytes(REPORT) if noise else self._report())[: self.faults.length]

    # inside

    @property
    def _is_stuck(self) -> bool:
        return self.faults.stuck and bool(self._written)

    def _forget(self) -> None:
        self._frame = self._waiting = None
        self._received = 0
        self._answer = []
        self._silent = False

    def _report(self) -> bytes:
        if self._is_stuck or self._silent:
            return self._status(self._written)
        if self._busy:
            self._busy -= 1
            return self._status(self._written)
        if (waiting := self._still_waiting()) is not None:
            waited = self._clock() - waiting.since
            if self.press_after is None or waited < self.press_after:
                return self._status(AWAITING_TOUCH | min(math.ceil(self._touch_seconds - waited), _SEQUENCE))
            self.touch()
        if self._answer:
            # The report that ends an answer stays until the host resets.
            return self._answer.pop(0) if len(self._answer) > 1 else self._answer[0]
        return self._status(0)

    def _status(self, flags: int) -> bytes:
        touch = 0
        for number, slot in self.slots.items():
            touch |= (1 | (4 if slot.touch or self.faults.touch else 0)) << (number - 1)
        # The other bits of the touch level are the sensor's; real devices show some of them set.
        return bytes((0, *self.version, self.program_sequence, touch, 1, flags))

    def _still_waiting(self) -> _Waiting | None:
        if self._waiting is not None and (
            self.faults.touch_timeout or self._clock() - self._waiting.since >= self._touch_seconds
        ):
            self._waiting = None
        return self._waiting

    def _execute(self, frame: bytes) -> None:
        payload, command, check = struct.unpack("<64sBH3x", frame)
        if self.faults.silent:
            self._silent = True
        elif check != crc(payload):
            return
        elif command in CONFIGURE:
            self._configure(CONFIGURE[command], payload)
        elif command in ANSWER:
            self._challenge(ANSWER[command], payload)
        elif command == SERIAL and self._serial_visible:
            self._answer_with(self.serial.to_bytes(4, "big"))

    @property
    def _serial_visible(self) -> bool:
        # Yubico's word on it: python-yubico issue 26.
        return not self.slots or any(slot.serial_visible for slot in self.slots.values())

    def _configure(self, number: int, payload: bytes) -> None:
        data, current = payload[:CONFIGURATION], payload[CONFIGURATION:][:ACCESS_CODE]
        slot = self.slots.get(number, Configuration())
        if any(slot.access_code) and slot.access_code != current:
            return
        if not any(data):
            self.slots.pop(number, None)
        else:
            try:
                self.slots[number] = Configuration.decode(data)
            except ValueError:
                return
        # Zero says that no slot is programmed, so a sequence that is full starts at one (a choice).
        self.program_sequence = self.program_sequence % 0xFF + 1 if self.slots else 0
        self._on_change()

    def _challenge(self, number: int, payload: bytes) -> None:
        slot = self.slots.get(number)
        if slot is None or not slot.answers or len(slot.message(payload)) < self._shortest:
            return
        if slot.touch or self.faults.touch or self.faults.touch_timeout:
            self._waiting = _Waiting(self._clock(), slot, payload)
        else:
            self._answer_challenge(slot, payload)

    def _answer_challenge(self, slot: Configuration, payload: bytes) -> None:
        if self.faults.wrong_secret:
            slot = replace(slot, key=_OTHER_SECRET[:16], uid=_OTHER_SECRET[:6])
        answer = hmac.digest(slot.secret, slot.message(payload), "sha1")
        if self.faults.stale and self._last_answer:
            answer = self._last_answer
        self._last_answer = answer
        self._answer_with(answer)

    def _answer_with(self, data: bytes) -> None:
        self._waiting = None
        data = with_crc(data)
        if self.faults.bad_crc:
            data = data[:-1] + bytes((data[-1] ^ 1,))
        chunks = [data[start : start + _CHUNK].ljust(_CHUNK, b"\0") for start in range(0, len(data), _CHUNK)]
        reports = [chunk + bytes((self._data_flags | number,)) for number, chunk in enumerate(chunks)]
        if self.faults.repeated is not None:
            reports[self.faults.repeated : self.faults.repeated] = reports[self.faults.repeated :][:1]
        if self.faults.missing is not None:
            del reports[self.faults.missing : self.faults.missing + 1]
        self._answer = [*reports, bytes((*bytes(_CHUNK), self._data_flags))]
