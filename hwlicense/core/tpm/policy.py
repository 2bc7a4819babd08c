"""Policies as lists of steps, and the digests that the TPM makes of them (Part 1, 19.7)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import msgspec

from hwlicense.core.tpm.pcrs import Selection, values_digest
from hwlicense.core.tpm.wire import number

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hwlicense.core.documents import Pcr
    from hwlicense.core.tpm.nv import NvPublic

UNSEAL, NV_READ, NV_CERTIFY = 0x15E, 0x14E, 0x184
"""TPM_CC of commands that a policy may be good for."""

EQUAL, BELOW = 0x0000, 0x0005
"""TPM_EO_EQ and TPM_EO_UNSIGNED_LT."""

CLOCK, SAFE = 8, 24
"""Where TPMS_TIME_INFO has the clock (8 bytes, in milliseconds) and its safe flag (1 byte)."""


class PolicyPCR(msgspec.Struct, frozen=True):
    """The PCRs hold these values. Of no PCR at all, it still ends sessions kept over a TPM restart."""

    selection: Selection
    values: bytes


class PolicyAuthorize(msgspec.Struct, frozen=True):
    """The key of Name `key` has signed the policy so far, for this reference. Forgets what was before it."""

    key: bytes
    reference: bytes


class PolicyCommandCode(msgspec.Struct, frozen=True):
    """Good for one command only."""

    code: int


class PolicyAuthValue(msgspec.Struct, frozen=True):
    """The object's own authValue (the PIN) is proved, too."""


class PolicyNV(msgspec.Struct, frozen=True):
    """The index holds `operand`. Checked when the command runs, not when the session is used."""

    index: NvPublic
    operand: bytes


class PolicyCounterTimer(msgspec.Struct, frozen=True):
    """TPMS_TIME_INFO at `offset` compares with `operand`. Checked when the command runs."""

    offset: int
    operand: bytes
    operation: int


class PolicySecret(msgspec.Struct, frozen=True):
    """The index's authValue is proved: an index of type PIN_PASS counts that, whatever comes after."""

    index: NvPublic


class PolicyCpHash(msgspec.Struct, frozen=True):
    """Good for one command with these very parameters."""

    hash: bytes


class PolicyOR(msgspec.Struct, frozen=True):
    """One of these policies holds. Forgets which."""

    branches: tuple[bytes, ...]


Step = (
    PolicyPCR
    | PolicyAuthorize
    | PolicyCommandCode
    | PolicyAuthValue
    | PolicyNV
    | PolicyCounterTimer
    | PolicySecret
    | PolicyCpHash
    | PolicyOR
)


def digest(steps: Iterable[Step]) -> bytes:
    """The policy digest after `steps`, 32 bytes, for SHA-256 sessions."""
    current = bytes(32)
    for step in steps:
        before = bytes(32) if isinstance(step, PolicyAuthorize | PolicyOR) else current  # these forget it
        current = _sha256(before, _extension(step))
        if isinstance(step, PolicyAuthorize):
            current = _sha256(current, step.reference)
        elif isinstance(step, PolicySecret):
            current = _sha256(current)  # with the empty reference
    return current


def _extension(step: Step) -> bytes:  # noqa: PLR0911  # one for each kind of step
    """Command code and arguments, as the TPM extends its digest by them (Part 3, 23)."""
    match step:
        case PolicyPCR(selection, values):
            return number(0x17F, 4) + selection.marshal() + values
        case PolicyAuthorize(key):
            return number(0x16A, 4) + key
        case PolicyCommandCode(code):
            return number(0x16C, 4) + number(code, 4)
        case PolicyAuthValue():
            return number(0x16B, 4)
        case PolicyNV(index, operand):
            return number(0x149, 4) + _compared(operand, 0, EQUAL) + index.name
        case PolicyCounterTimer(offset, operand, operation):
            return number(0x16D, 4) + _compared(operand, offset, operation)
        case PolicySecret(index):
            return number(0x151, 4) + index.name
        case PolicyCpHash(parameters):
            return number(0x16E, 4) + parameters
        case PolicyOR(branches):
            return number(0x171, 4) + b"".join(branches)


def _compared(operand: bytes, offset: int, operation: int) -> bytes:
    return _sha256(operand, number(offset, 2), number(operation, 2))


def _sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def reference(*fields: bytes) -> bytes:
    """SHA-256 over length-prefixed fields: no other list of fields gives the same 32 bytes."""
    return _sha256(*(number(len(field), 4) + field for field in fields))


def platform_reference(product: str, generation: int) -> bytes:
    """The policyRef under which platform states of one product line and generation are approved."""
    return reference(b"platform", product.encode(), number(generation, 4))


def pcr_step(pcrs: Iterable[Pcr]) -> PolicyPCR:
    """The step that holds `pcrs` to their values. Raises as `pcrs.values_digest` does."""
    pcrs = list(pcrs)
    return PolicyPCR(Selection.of(pcrs), values_digest(pcrs))


def approved_digest(pcrs: Iterable[Pcr]) -> bytes:
    """The policy digest that an approval of this platform state signs."""
    return digest([pcr_step(pcrs)])
