"""The bytes of challenge-response over HID feature reports, as YubiKeys and OnlyKeys speak it. No I/O.

Sources: ykdef.h and ykcore.c of yubikey-personalization; yubikit/core/otp.py and yubikit/yubiotp.py of
yubikey-manager; okcrypto.cpp of OnlyKey.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from hwlicense.core.dongle import SECRET_SIZE
from hwlicense.core.errors import HardwareError, Reason, UsageError
from hwlicense.core.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from hwlicense.core.dongle import Mode

REPORT_SIZE: Final = 8
DATA_SIZE: Final = 7
PAYLOAD_SIZE: Final = 64
FRAME_SIZE: Final = 70
ACCESS_CODE_SIZE: Final = 6

FLAGS: Final = 7
"""Place of the byte that says what a report is. All zero: a status report, and nothing else goes on."""
WRITTEN: Final = 0x80
"""Flag: not taken in yet. In reports to the dongle, with their sequence number."""
RESPONSE: Final = 0x40
"""Flag: part of an answer, with its sequence number."""
TOUCH: Final = 0x20
"""Flag: waits for a finger, with the seconds left."""
NUMBER: Final = 0x1F
"""The low bits of the flags: a sequence number, or seconds."""
RESET: Final = bytes(DATA_SIZE) + b"\x8f"
"""The report that makes the dongle forget what it was asked and what it has answered."""

SERIAL: Final = 0x10
SCAN_MAP: Final = 0x12
HMAC: Final = {1: 0x30, 2: 0x38}
CONFIGURE: Final = {1: 0x01, 2: 0x03}
"""Commands, by slot where they are about one."""

_CRC_RESIDUAL: Final = 0xF0B8
_CRC_SIZE: Final = 2
_CONFIGURATION_SIZE: Final = 52
_KEY_SIZE: Final = 16
_UID, _KEY, _ACCESS_CODE, _EXTENDED, _TICKET, _CONFIG, _CRC = 16, 22, 38, 45, 46, 47, 50  # places in config_st
_SERIAL_API_VISIBLE: Final = 0x04
_CHALLENGE_RESPONSE: Final = 0x40
_HMAC: Final = 0x22
_LESS_THAN_64: Final = 0x04
_BUTTON: Final = 0x08


def crc16(data: Sequence[int]) -> int:
    """CRC-16 as in ISO/IEC 13239, without its last complement: over data and their complemented CRC it is 0xF0B8."""
    crc = 0xFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x8408 if crc & 1 else 0)
    return crc


def frame(command: int, payload: bytes | bytearray) -> Secret:
    """The 70 bytes of a command: up to 64 bytes of payload, filled up with zeros. Raises UsageError."""
    if len(payload) > PAYLOAD_SIZE:
        raise UsageError(Reason.USAGE, f"A dongle takes {PAYLOAD_SIZE} bytes; these are {len(payload)}.")
    whole = bytearray(FRAME_SIZE)
    _put(whole, 0, payload)
    with memoryview(whole) as view:
        crc = crc16(view[:PAYLOAD_SIZE])
    whole[PAYLOAD_SIZE] = command
    whole[PAYLOAD_SIZE + 1], whole[PAYLOAD_SIZE + 2] = crc & 0xFF, crc >> 8
    return Secret(whole)


def chunks(whole: Secret) -> Generator[bytearray, None, None]:
    """The reports to write for a frame. Each is the same 8 bytes, written anew, so that no copies of secrets pile up.

    Those that are all zero are left out, except the first and the last: the dongle takes zeros for granted.
    """
    report = bytearray(REPORT_SIZE)
    try:
        for number in range(FRAME_SIZE // DATA_SIZE):
            with memoryview(whole.buffer) as view:
                _put(report, 0, view[number * DATA_SIZE : (number + 1) * DATA_SIZE])
            report[FLAGS] = 0
            if number in (0, FRAME_SIZE // DATA_SIZE - 1) or any(report):
                report[FLAGS] = WRITTEN | number
                yield report
    finally:
        report[:] = bytes(REPORT_SIZE)


class Status(NamedTuple):
    """What an idle dongle says of itself. `slots` has two bits for each slot: valid, and waiting for touch."""

    version: tuple[int, int, int]
    program_sequence: int
    slots: int

    @classmethod
    def parse(cls, report: Sequence[int]) -> Status:
        """Raises HardwareError DONGLE_FAILED for a report that is none, or not a status."""
        if len(report) != REPORT_SIZE or report[FLAGS]:
            raise garbled("does not say what state it is in")
        return cls((report[1], report[2], report[3]), report[4], report[5])

    def valid(self, slot: int) -> bool:
        """Whether anything is programmed into slot 1 or 2."""
        return bool(self.slots & 1 << slot - 1)

    def touch(self, slot: int) -> bool:
        """Whether the slot acts when touched; before firmware 3.0 no dongle says so."""
        return bool(self.slots & 4 << slot - 1)


class Response:
    """Puts an answer of `size` bytes together from its reports.

    Strict: sequence numbers 0, 1, 2 and so on, as many reports as the size takes, and number 0 again, which ends it. So
    nothing of an older answer gets in, which the CRC would not notice where whole answers are swapped.
    """

    def __init__(self, size: int, flag: int = RESPONSE) -> None:
        self._size, self._flag, self._count = size, flag, 0
        self._reports = -(-(size + _CRC_SIZE) // DATA_SIZE)
        self._buffer = bytearray(self._reports * DATA_SIZE)

    def take(self, report: Sequence[int]) -> bool:
        """Whether this report ends the answer. Raises HardwareError DONGLE_FAILED."""
        end = self._count == self._reports
        if len(report) != REPORT_SIZE or report[FLAGS] != self._flag | (0 if end else self._count):
            self.wipe()
            raise garbled("answers with missing, repeated or foreign reports")
        if not end:
            for place in range(DATA_SIZE):
                self._buffer[self._count * DATA_SIZE + place] = report[place]
            self._count += 1
        return end

    def content(self) -> Secret:
        """The answer, when it has ended. Raises HardwareError DONGLE_FAILED where its CRC is wrong."""
        with memoryview(self._buffer) as view:
            right = crc16(view[: self._size + _CRC_SIZE]) == _CRC_RESIDUAL
        if not right:
            self.wipe()
            raise garbled("answers with a wrong checksum")
        out = Secret(bytearray(self._size))
        _put(out.buffer, 0, self._buffer, self._size)
        self.wipe()
        return out

    def wipe(self) -> None:
        """Overwrite what has been taken."""
        self._buffer[:] = bytes(len(self._buffer))


def configuration(
    secret: Secret, *, touch: bool, mode: Mode, access_code: Secret | None, current: Secret | None
) -> Secret:
    """The payload that programs a slot with an HMAC secret of 20 bytes, 58 bytes: a config_st, and the current code.

    No access code, new or current, is six zeros. The serial number stays readable. Raises UsageError for other sizes.
    """
    codes = [code for code in (access_code, current) if code is not None]
    if len(secret) != SECRET_SIZE or any(len(code) != ACCESS_CODE_SIZE for code in codes):
        raise UsageError(Reason.USAGE, f"A slot takes {SECRET_SIZE} bytes, and {ACCESS_CODE_SIZE} of access code.")
    out = bytearray(_CONFIGURATION_SIZE + ACCESS_CODE_SIZE)
    with memoryview(secret.buffer) as view:
        _put(out, _KEY, view[:_KEY_SIZE])
        _put(out, _UID, view[_KEY_SIZE:])  # 20 bytes do not fit into the field of AES keys
    if access_code is not None:
        _put(out, _ACCESS_CODE, access_code.buffer)
    out[_EXTENDED], out[_TICKET] = _SERIAL_API_VISIBLE, _CHALLENGE_RESPONSE
    out[_CONFIG] = _HMAC | (_LESS_THAN_64 if mode == "less-than-64" else 0) | (_BUTTON if touch else 0)
    with memoryview(out) as view:
        crc = ~crc16(view[:_CRC]) & 0xFFFF
    out[_CRC], out[_CRC + 1] = crc & 0xFF, crc >> 8
    if current is not None:
        _put(out, _CONFIGURATION_SIZE, current.buffer)
    return Secret(out)


def garbled(what: str) -> HardwareError:
    """A dongle that breaks the protocol."""
    hint = "Pull it out and plug it in again; if that does not help, try another port, then another dongle."
    return HardwareError(Reason.DONGLE_FAILED, f"The dongle {what}.", hint)


def _put(target: bytearray, at: int, source: bytes | bytearray | memoryview, size: int | None = None) -> None:
    """Copy through views: slices of bytearrays would be copies that nobody overwrites."""
    with memoryview(target) as to, memoryview(source) as content:
        size = len(content) if size is None else size
        to[at : at + size] = content[:size]
