"""A new revision of a license that is in the field: the same license and device, other terms, all secrets drawn anew.

What the license was made from is in its basis. New requests take the place of that, for the same device; new packages
take the place of those before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from hwlicense.core.documents import TokenBinding, TpmBinding, UsbBinding
from hwlicense.core.errors import DamagedError, Reason, RefusedError, UsageError
from hwlicense.vendor import basis as bases
from hwlicense.vendor.evidence import TpmPart, identity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwlicense.core.documents import Binding, License
    from hwlicense.core.terms import Terms
    from hwlicense.vendor.basis import Basis, PackageBasis
    from hwlicense.vendor.evidence import Part


class Sources(NamedTuple):
    """What a license is made from. `since`: the revision that the parts first came into, from a request."""

    parts: list[Part]
    packages: list[PackageBasis]
    since: int


def sources(old: License, basis: Basis | None, parts: Sequence[Part], packages: Sequence[PackageBasis]) -> Sources:
    """What the next revision of `old` is made from: new parts and packages where they are given, else the basis's.

    Raises UsageError where an earlier release kept no basis; RefusedError WRONG_DEVICE; DamagedError.
    """
    following = old.grant.revision + 1
    if parts:
        _check_same_device(old, parts)
    if basis is None:
        if not parts or not packages:
            what = "An earlier release issued this license, and kept nothing of what it was made from."
            hint = "Give a new --request of the device, and every --package that the license is to open."
            raise UsageError(Reason.USAGE, what, hint)
        return Sources(list(parts), list(packages), following)
    before = bases.parts_of(basis, old)
    kept = list(packages) or basis.packages
    return Sources(list(parts), kept, _since(old, basis, parts)) if parts else Sources(before, kept, basis.since)


def _since(old: License, basis: Basis, parts: Sequence[Part]) -> int:
    """A request that counts by the counter of `old` counts on where that is, as a counter only goes up."""
    before = next((part.counter for part in old.bindings if isinstance(part, TpmBinding)), None)
    given = next((part.evidence.counter for part in parts if isinstance(part, TpmPart)), None)
    if before is None or given is None or given.handle != before.handle or given.value > before.value:
        return old.grant.revision + 1
    first = next((part.evidence.counter for part in basis.parts if isinstance(part, bases.TpmBasis)), None)
    if first != given:
        what = "The request is older than the one that the license was made from."
        raise DamagedError(Reason.EVIDENCE_INVALID, what, "Enroll the device again, or leave --request out.")
    return basis.since


def kept_revocable(old: License, terms: Terms) -> Terms:
    """The terms for the revision after `old`: where a counter ends `old`, the next revision has one, too."""
    before = _tpm(old)
    if before is None or before.counter is None:
        return terms
    return msgspec.structs.replace(terms, require=msgspec.structs.replace(terms.require, revocable=True))


def had_pin(old: License) -> bool:
    """Whether the TPM asks for a PIN: a revision is sealed anew, and does not inherit it."""
    before = _tpm(old)
    return before is not None and before.pin


def end_of(old: License, new: License) -> str:
    """What becomes of the old revision, in a sentence for people."""
    number = old.grant.revision
    before, after = _tpm(old), _tpm(new)
    if before is None or before.counter is None:
        return f"Nothing in hardware ends revision {number}: who keeps a copy of the home can go on with it."
    if after is None or after.counter is None or after.storage_root_key != before.storage_root_key:
        return f"Revision {number} is dead only if its TPM was cleared since: the new request is of another SRK."
    if after.counter.handle != before.counter.handle:
        return f"Revision {number} is dead only where its counter is gone: the new request brings another counter."
    return f"Revision {number} is dead in hardware as soon as revision {new.grant.revision} is installed."


def _check_same_device(old: License, parts: Sequence[Part]) -> None:
    """A TPM is the same by its EK, which survives TPM2_Clear; where there is none, one piece must be."""
    known = {_identity(binding) for binding in old.bindings}
    given = {part.endorsement_key.name if isinstance(part, TpmPart) else identity(part.evidence) for part in parts}
    before = _tpm(old)
    if (before and before.endorsement_key not in given) or not known & given:
        what = f"The request is not of the device that the license {old.grant.license} was issued for."
        hint = "Give a request of that device (with the same --ek-root); for another, `hwlicense vendor issue`."
        raise RefusedError(Reason.WRONG_DEVICE, what, hint)


def _identity(binding: Binding) -> bytes:
    match binding:
        case TpmBinding():
            return binding.endorsement_key
        case TokenBinding():
            return binding.key
        case UsbBinding():
            return binding.dongle.encode()


def _tpm(licensed: License) -> TpmBinding | None:
    return next((binding for binding in licensed.bindings if isinstance(binding, TpmBinding)), None)
