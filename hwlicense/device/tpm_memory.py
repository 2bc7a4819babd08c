"""What the doctor says of a TPM's memory: how much counted licenses take of it, and whether these are in force."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hwlicense.core.errors import HwlicenseError
from hwlicense.core.hardware import Counting
from hwlicense.core.tpm import standing
from hwlicense.core.tpm.composing import PLACES
from hwlicense.core.wording import quantity
from hwlicense.device.plugged import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hwlicense.core.documents import TpmBinding
    from hwlicense.core.errors import RefusedError
    from hwlicense.core.hardware import AnyHardware, Counted

_PIN_PASS: Final = 1.38
"""The revision of the specification that brought indexes that count their uses."""

_HOUR: Final = 3_600_000


def memory(facts: dict[str, Any], spare: Sequence[int]) -> Iterator[Finding]:
    """`facts` are those of `diagnosing.probe`; `spare` are counters that no license of this home uses."""
    used, left, most = (facts[f"nv_counters{which}"] for which in ("", "_left", "_most"))
    text = f"{quantity(used, 'counter')}{f' of {most}' if most else ''}"
    text += f", by its own estimate room for {left} more; "
    text += quantity(facts["nv_indexes"], "NV index", "NV indexes")
    text += f", {len(facts['nv_ours'])} of them by enrolments with --counted"
    text += f" ({quantity(facts['nv_ours_bytes'], 'byte')})" if facts["nv_ours"] else ""
    if float(facts["revision"]) < _PIN_PASS:
        text += f"; revision {facts['revision']} knows no index that counts opens or anchors an account (PIN_PASS)"
        yield Finding("note", "TPM memory", text, "Update the TPM's firmware before enrolling with --counted.")
    else:
        mend = "" if left else "The TPM's owner may remove what nothing uses: tpm2_nvundefine."
        yield Finding("ok" if left else "note", "TPM memory", text, mend)
    defined = {int(handle, 16) for handle in facts["nv_ours"]}
    for handle in spare:
        yield from _unused(handle, defined)


def _unused(handle: int, defined: set[int]) -> Iterator[Finding]:
    block = [each for each in (handle, *(handle + place for place in PLACES.values())) if each in defined]
    remove = " && ".join(f"tpm2_nvundefine -C o 0x{each:08x}" for each in block)
    if block == [handle]:
        text = f"the counter 0x{handle:08x} serves no license that is installed here"
        mend = f"If no license for it is on its way, the next enrolment with --counted uses it, or remove it: {remove}"
        yield Finding("note", "TPM memory", text, mend)
    elif block:
        left = ", ".join(f"0x{each:08x}" for each in block)
        text = f"{left}: counter or indexes of a license that is not installed here any more"
        mend = "The next enrolment with --counted uses them, and that license never opens again; or remove them:"
        yield Finding("note", "TPM memory", text, f"{mend} {remove}")


def counted(subject: str, binding: TpmBinding, held: bytes, hardware: AnyHardware) -> Iterator[Finding]:
    """Whether a license that a TPM counts is in force, by the TPM's word. Spends nothing. Raises HwlicenseError."""
    if binding.counter is None or not isinstance(hardware, Counting):
        return
    handles = [f"counter 0x{binding.counter.handle:08x}"]
    handles += [f"0x{index.handle:08x} ({index.purpose})" for index in binding.indexes]
    place = ", ".join(handles)
    try:
        found = hardware.use(binding, held)
    except HwlicenseError as error:
        yield Finding("missing", subject, f"{place}: {error.what}", error.hint)
        return
    if found.state != "current":
        ended = standing.refusal(found.state)
        yield Finding("missing", subject, f"{place}: {ended.what}", ended.hint)
        return
    spent = list(_spent(found))
    text = f"{place}: in force{''.join(f'; {each}' for each, _ in spent)}"
    if any(over for _, over in spent):
        yield Finding("missing", subject, text, "Ask the vendor for a revision of the license with more.")
    else:
        yield Finding("ok", subject, text)


def refusal(found: Counted) -> RefusedError | None:
    """Why a license would not open, by what its TPM says of it; None where that is no reason."""
    if found.state != "current":
        return standing.refusal(found.state)
    if found.limit is not None and found.opens is not None and found.opens >= found.limit:
        return standing.exhausted(found.limit)
    if found.deadline is not None and found.clock >= found.deadline:
        return standing.overdue()
    return None


def _spent(found: Counted) -> Iterator[tuple[str, bool]]:
    """What is left of each limit, and whether that is nothing."""
    if found.limit is not None and found.opens is not None:
        left = max(0, found.limit - found.opens)
        yield f"{left:,} of {found.limit:,} opens left", not left
    if found.deadline is not None:
        left = max(0, found.deadline - found.clock)
        yield f"{left / _HOUR:,.1f} powered-on hours left", not left
