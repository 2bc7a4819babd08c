"""The few TPM commands that a simulated machine sends by itself, as bytes (TPM 2.0 Library, revision 1.59)."""

from __future__ import annotations

import hashlib
import socket
import struct
from typing import TYPE_CHECKING

from hwlicense_simulators.errors import SimulatorError

if TYPE_CHECKING:
    from pathlib import Path

LARGEST = 4096
"""Bytes of the longest command or answer of swtpm."""

_HEADER = 10  # bytes: tag, size, code

_NO_SESSIONS, _SESSIONS = 0x8001, 0x8002  # part 2, 6.9 TPM_ST
_SHUTDOWN, _PCR_EXTEND, _PCR_READ, _CLEAR, _READ_CLOCK = 0x145, 0x182, 0x17E, 0x126, 0x181  # part 2, 6.5.2 TPM_CC
_LOCKOUT = 0x4000000A  # part 2, 7.4 TPM_RH_LOCKOUT
_BANKS = {"sha1": 0x0004, "sha256": 0x000B, "sha384": 0x000C, "sha512": 0x000D}  # part 2, 6.3 TPM_ALG_ID
# One password authorization with the empty password (part 2, 10.13.2): TPM_RS_PW, no nonce, continueSession, no hmac.
_EMPTY_PASSWORD = struct.pack(">IIHBH", 9, 0x40000009, 0, 1, 0)


def _command(tag: int, code: int, body: bytes = b"") -> bytes:
    return struct.pack(">HII", tag, _HEADER + len(body), code) + body


def shutdown(*, keep_state: bool = False) -> bytes:
    """TPM2_Shutdown (part 3, 9.4), TPM_SU_CLEAR, or TPM_SU_STATE before a suspend."""
    return _command(_NO_SESSIONS, _SHUTDOWN, struct.pack(">H", 1 if keep_state else 0))


def pcr_extend(index: int, data: bytes) -> bytes:
    """TPM2_PCR_Extend (part 3, 22.2) with the digests of `data` for every bank; the TPM ignores banks not allocated."""
    digests = b"".join(struct.pack(">H", number) + hashlib.new(bank, data).digest() for bank, number in _BANKS.items())
    body = struct.pack(">I", index) + _EMPTY_PASSWORD + struct.pack(">I", len(_BANKS)) + digests
    return _command(_SESSIONS, _PCR_EXTEND, body)


def pcr_read(index: int, bank: str) -> bytes:
    """TPM2_PCR_Read (part 3, 22.4) of one PCR."""
    selection = (1 << index).to_bytes(3, "little")
    return _command(_NO_SESSIONS, _PCR_READ, struct.pack(">IHB", 1, _BANKS[bank], 3) + selection)


def clear() -> bytes:
    """TPM2_Clear (part 3, 24.6) by the lockout hierarchy with its empty password."""
    return _command(_SESSIONS, _CLEAR, struct.pack(">I", _LOCKOUT) + _EMPTY_PASSWORD)


def read_clock() -> bytes:
    """TPM2_ReadClock (part 3, 29.1), which needs no authorization and changes nothing."""
    return _command(_NO_SESSIONS, _READ_CLOCK)


def pcr_value(answer: bytes) -> bytes | None:
    """The digest in the answer to TPM2_PCR_Read; None where the bank is not allocated."""
    (count,) = struct.unpack_from(">I", answer, 24)  # after header, pcrUpdateCounter and the one selection of 10 bytes
    return answer[30:] if count else None


def response_code(answer: bytes) -> int:
    """The TPM_RC of an answer; 0 is success."""
    (code,) = struct.unpack_from(">I", answer, 6)
    return int(code)


def command_code(command: bytes) -> int:
    """The TPM_CC of a command."""
    return response_code(command)


def refusal(code: int) -> bytes:
    """An answer that consists of a response code."""
    return _command(_NO_SESSIONS, code)


def receive(connection: socket.socket) -> bytes:
    """One command or answer; empty when the other side has closed. Raises OSError, and EOFError on half a message."""
    message = b""
    while len(message) < (wanted := _length(message)):
        chunk = connection.recv(wanted - len(message))
        if not chunk:
            if message:
                raise EOFError(f"the connection ended after {len(message)} of {wanted} bytes")
            return b""
        message += chunk
    return message


def _length(message: bytes) -> int:
    if len(message) < _HEADER:
        return _HEADER
    (size,) = struct.unpack_from(">I", message, 2)
    if not _HEADER <= size <= LARGEST:
        raise EOFError(f"a message claims {size} bytes")
    return int(size)


def exchange(path: Path, command: bytes, seconds: float) -> bytes:
    """Send one command to swtpm on a connection of its own, because swtpm serves one connection at a time.

    Raises OSError (TimeoutError, too, when another client keeps swtpm to itself) and EOFError.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(seconds)
        connection.connect(str(path))
        connection.sendall(command)
        if answer := receive(connection):
            return answer
    raise EOFError("swtpm closed the connection without an answer")


def checked(answer: bytes, what: str) -> bytes:
    """The same answer. Raises SimulatorError when it is not TPM_RC_SUCCESS."""
    if code := response_code(answer):
        raise SimulatorError(f"{what} failed with TPM response code 0x{code:03x}")
    return answer
