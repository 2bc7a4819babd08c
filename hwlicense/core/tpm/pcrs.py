"""Platform configuration registers: which ones, in the TPM's order, and the digest of their values."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Final, Self

import msgspec

from hwlicense.core.errors import Reason, RefusedError, UsageError
from hwlicense.core.tpm.wire import DIGEST_SIZES, Algorithm, number
from hwlicense.core.wording import quantity

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hwlicense.core.documents import Pcr

BANKS: Final = {"sha256": Algorithm.SHA256, "sha384": Algorithm.SHA384}
"""Banks by name, in the order in which every selection lists them."""

COUNT: Final = 24
UNUSABLE: Final = frozenset({16, 21, 22, 23})
"""Anyone can reset 16 and 23; extending these does not end sessions whose PolicyPCR has passed (Part 1, 17)."""

_NUMBER = re.compile("[0-9]{1,2}")
_SYNTAX = 'Write banks and numbers like "sha256:7" or "sha256:4,7+sha384:7".'


class Selection(msgspec.Struct, frozen=True):
    """PCRs by bank. Both levels are sorted, so that equal selections marshal to equal bytes."""

    banks: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @classmethod
    def parse(cls, *entries: str) -> Self:
        """`"sha256:4,7"`, several entries, or several joined by `+`; no entry selects no PCR.

        Raises UsageError (syntax, unknown bank, twice the same PCR) and RefusedError PCR_UNUSABLE.
        """
        found: list[tuple[str, int]] = []
        for part in (part for entry in entries for part in entry.split("+")):
            bank, colon, indices = part.strip().partition(":")
            for index in map(str.strip, indices.split(",")):
                if not colon or not _NUMBER.fullmatch(index):
                    raise UsageError(Reason.USAGE, f'"{part.strip()}" does not select PCRs.', _SYNTAX)
                found.append((bank, int(index)))
        return cls._of(found)

    @classmethod
    def of(cls, pcrs: Iterable[Pcr]) -> Self:
        """The selection that these values belong to. Raises as `parse` does."""
        return cls._of([(pcr.bank, pcr.index) for pcr in pcrs])

    @classmethod
    def _of(cls, found: list[tuple[str, int]]) -> Self:
        for bank, index in found:
            if bank not in BANKS:
                raise UsageError(Reason.USAGE, f'There is no PCR bank "{bank}" to use.', "Use sha256 or sha384.")
            if not 0 <= index < COUNT:
                raise UsageError(Reason.USAGE, f"There is no PCR {index}; PCRs are numbered 0 to {COUNT - 1}.", _SYNTAX)
            if index in UNUSABLE:
                raise RefusedError(
                    Reason.PCR_UNUSABLE,
                    f"PCR {index} cannot bind a license: it can be reset, or changes without ending open sessions.",
                    "Choose PCRs that measure firmware and boot, such as sha256:7.",
                )
        if len(set(found)) != len(found):
            raise UsageError(Reason.USAGE, "A PCR is selected twice.", _SYNTAX)
        sorted_banks = ((bank, tuple(sorted(i for b, i in found if b == bank))) for bank in BANKS)
        return cls(tuple((bank, indices) for bank, indices in sorted_banks if indices))

    def marshal(self) -> bytes:
        """TPML_PCR_SELECTION (Part 2, 10.9.7) with bitmaps of three bytes."""
        out = number(len(self.banks), 4)
        for bank, indices in self.banks:
            out += number(BANKS[bank], 2) + b"\3" + sum(1 << i for i in indices).to_bytes(3, "little")
        return out

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return ((bank, index) for bank, indices in self.banks for index in indices)

    def __str__(self) -> str:
        return "+".join(f"{bank}:{','.join(map(str, indices))}" for bank, indices in self.banks)


def values_digest(pcrs: Iterable[Pcr], algorithm: Algorithm = Algorithm.SHA256) -> bytes:
    """The digest of the values in the TPM's order, as PolicyPCR and quotes hold it (Part 1, 17.5).

    `algorithm` is the hash of the policy session or of the quote's signature. Raises as `Selection.of` does, and
    RefusedError PCR_UNUSABLE for a value of the wrong size or that nothing was ever measured into.
    """
    pcrs = list(pcrs)
    selection = Selection.of(pcrs)
    values: dict[tuple[str, int], bytes] = {(pcr.bank, pcr.index): pcr.value for pcr in pcrs}
    for (bank, index), value in values.items():
        if len(value) != DIGEST_SIZES[BANKS[bank]]:
            raise RefusedError(
                Reason.PCR_UNUSABLE, f"The value of PCR {index} ({bank}) has {quantity(len(value), 'byte')}.", _SYNTAX
            )
        if not value.strip(b"\0") or not value.strip(b"\xff"):
            raise RefusedError(
                Reason.PCR_UNUSABLE,
                f"PCR {index} ({bank}) was never extended, so it says nothing about the platform.",
                "Choose PCRs that the firmware measures into, or enable measured boot.",
            )
    return hashlib.new(algorithm.name.lower(), b"".join(values[key] for key in selection)).digest()
