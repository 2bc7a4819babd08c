"""Policies as lists of steps, and the digests that the TPM makes of them (Part 1, 19.7)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hwlicense.core.tpm.pcrs import Selection, values_digest
from hwlicense.core.tpm.wire import number

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hwlicense.core.documents import Pcr

UNSEAL: Final = 0x15E
"""TPM_CC_Unseal."""


@dataclass(frozen=True, slots=True)
class PolicyPCR:
    """The PCRs hold these values. Of no PCR at all, it still ends sessions kept over a TPM restart."""

    selection: Selection
    values: bytes


@dataclass(frozen=True, slots=True)
class PolicyAuthorize:
    """The key of Name `key` has signed the policy so far, for this reference. Forgets what was before it."""

    key: bytes
    reference: bytes


@dataclass(frozen=True, slots=True)
class PolicyCommandCode:
    """Good for one command only."""

    code: int


@dataclass(frozen=True, slots=True)
class PolicyAuthValue:
    """The object's own authValue (the PIN) is proved, too."""


Step = PolicyPCR | PolicyAuthorize | PolicyCommandCode | PolicyAuthValue


def digest(steps: Iterable[Step]) -> bytes:
    """The policy digest after `steps`, 32 bytes, for SHA-256 sessions."""
    current = bytes(32)
    for step in steps:
        match step:
            case PolicyPCR(selection, values):
                current = _sha256(current, number(0x17F, 4), selection.marshal(), values)
            case PolicyAuthorize(key, policy_reference):
                current = _sha256(_sha256(bytes(32), number(0x16A, 4), key), policy_reference)
            case PolicyCommandCode(code):
                current = _sha256(current, number(0x16C, 4), number(code, 4))
            case PolicyAuthValue():
                current = _sha256(current, number(0x16B, 4))
    return current


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


def sealed_steps(policy_key: bytes | None, platform: bytes | None, *, pin: bool) -> list[Step]:
    """The policy of a sealed object: approved platform (by Name of the policy key, and reference), Unseal only, PIN.

    With a policy key the device runs the approval's PolicyPCR first; PolicyAuthorize makes the rest independent of it.
    """
    no_pcr = PolicyPCR(Selection(), values_digest([]))
    first: Step = PolicyAuthorize(policy_key, platform) if policy_key is not None and platform is not None else no_pcr
    return [first, PolicyCommandCode(UNSEAL), *([PolicyAuthValue()] if pin else [])]
