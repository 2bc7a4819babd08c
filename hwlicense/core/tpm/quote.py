"""Quotes: what the TPM says of its PCRs and clock, signed by its attestation key (Part 2, 10.12.12); and its time."""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING, Final

import msgspec

from hwlicense.core.errors import Reason
from hwlicense.core.tpm.pcrs import Selection, values_digest
from hwlicense.core.tpm.signatures import verify
from hwlicense.core.tpm.structures import Public, check_attestation_key
from hwlicense.core.tpm.wire import Reader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwlicense.core.documents import Pcr

_GENERATED: Final = 0xFF544347  # only a TPM signs, with a restricted key, what starts with this
_ATTEST_QUOTE, _ATTEST_TIME = 0x8018, 0x8019


class Quoted(msgspec.Struct, frozen=True):
    """`clock` in milliseconds of powered-on time; `safe` says that no earlier reading was higher."""

    clock: int
    reset_count: int
    restart_count: int
    safe: bool
    firmware: int


def quote_data(statement: bytes) -> bytes:
    """The extra data of a quote over `statement`: its SHA-256."""
    return hashlib.sha256(statement).digest()


def check_quote(attestation_key: Public, quote: bytes, statement: bytes, pcrs: Sequence[Pcr]) -> Quoted:
    """`quote` is TPM2B_ATTEST followed by TPMT_SIGNATURE. Raises DamagedError QUOTE_INVALID naming what is wrong.

    The caller has made sure that `attestation_key` lives in the right TPM (by a credential, or a record).
    """
    check_attestation_key(attestation_key)
    outer = Reader(quote, "quote", Reason.QUOTE_INVALID)
    attest, signature = outer.sized(1024), outer.rest()
    algorithm = verify(attestation_key, attest, signature, Reason.QUOTE_INVALID, "quote")
    reader = Reader(attest, "quote", Reason.QUOTE_INVALID)
    if reader.number(4) != _GENERATED or reader.number(2) != _ATTEST_QUOTE:
        raise reader.damaged("it is not a quote made by a TPM")
    reader.sized(68)  # qualified name of the signer; its key is known
    if not hmac.compare_digest(reader.sized(64), quote_data(statement)):
        raise reader.damaged("it was made for another document")
    clock, resets, restarts, safe = reader.number(8), reader.number(4), reader.number(4), reader.number(1)
    if safe > 1:
        raise reader.damaged("its clock information is malformed")
    quoted = Quoted(clock, resets, restarts, bool(safe), reader.number(8))
    selection = Selection.of(pcrs).marshal()
    if reader.take(len(selection)) != selection:
        raise reader.damaged("it selects other PCRs")
    if not hmac.compare_digest(reader.sized(64), values_digest(pcrs, algorithm)):
        raise reader.damaged("the PCR values are not those that the TPM quoted")
    reader.end()
    return quoted


class Time(msgspec.Struct, frozen=True):
    """Milliseconds of powered-on time: since power-up (`uptime`), and ever; `safe` as in a quote."""

    uptime: int
    clock: int
    safe: bool


def read_time(attest: bytes) -> Time:
    """What TPM2_GetTime attests (TPMS_ATTEST with TPMS_TIME_ATTEST_INFO). Raises DamagedError QUOTE_INVALID.

    Nothing is signed: the caller had it over a session that authenticates the answer.
    """
    reader = Reader(attest, "TPM's time", Reason.QUOTE_INVALID)
    if reader.number(4) != _GENERATED or reader.number(2) != _ATTEST_TIME:
        raise reader.damaged("it is no time of a TPM")
    reader.sized(68)
    reader.sized(64)
    reader.take(17 + 8)  # clock information and firmware, as in every attestation; the former comes once more
    uptime, clock, _, _, safe = (reader.number(size) for size in (8, 8, 4, 4, 1))
    reader.take(8)
    reader.end()
    return Time(uptime, clock, bool(safe))
