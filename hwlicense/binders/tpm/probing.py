"""What this TPM is: facts for people. Nothing vouches for them, and nothing depends on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec
from tpm2_pytss import TPM2_CAP, TPM2_RC, TSS2_Exception

from hwlicense.binders.tpm import keys
from hwlicense.binders.tpm.connection import DEFAULT_TCTI, Connection
from hwlicense.binders.tpm.failures import code
from hwlicense.binders.tpm.providing import index_handles
from hwlicense.core.secret import SIZE
from hwlicense.core.tpm.nv import FIRST, LAST
from hwlicense.core.tpm.pcrs import BANKS

if TYPE_CHECKING:
    from hwlicense.binders.tpm.connection import Work
    from hwlicense.core.documents import Pcr
    from hwlicense.core.tpm.pcrs import Selection

# TPM_PT (Part 2, 6.13)
_REVISION, _MANUFACTURER, _FIRMWARE_VERSION = 0x102, 0x105, 0x10B
_PERMANENT, _LOCKOUT_COUNTER, _MAX_AUTH_FAIL, _LOCKOUT_INTERVAL, _LOCKOUT_RECOVERY = 0x200, 0x20E, 0x20F, 0x210, 0x211
_NV_COUNTERS_MOST, _CLOCK_UPDATE = 0x116, 0x119
_NV_COUNTERS, _NV_COUNTERS_LEFT = 0x20A, 0x20B
_IN_LOCKOUT: Final = 1 << 9  # of TPMA_PERMANENT (Part 2, 8.6)


class Facts(msgspec.Struct, frozen=True):
    """`wrong_pins` of `wrong_pins_allowed` are counted; one is forgiven after `forgiven_after` seconds.

    `nv_counters` of `nv_counters_most` (0: no fixed number) are defined, and by the TPM's own estimate room is left for
    `nv_counters_left` more. `nv_indexes` are defined in all; `nv_ours` are the handles of this project's, which take
    `nv_ours_bytes` for public areas, authValues and data, besides what the TPM adds.
    `clock_update` is how many milliseconds the clock can lose at a power cut.
    """

    manufacturer: str
    firmware: str
    revision: str
    banks: list[str]
    ek_certificates: list[str]
    persistent_srk: bool
    in_lockout: bool
    wrong_pins: int
    wrong_pins_allowed: int
    forgiven_after: int
    lockout_recovery: int
    nv_counters: int
    nv_counters_left: int
    nv_counters_most: int
    nv_indexes: int
    nv_ours: list[str]
    nv_ours_bytes: int
    clock_update: int
    pcrs: list[Pcr]


def probe(tcti: str | None, selection: Selection) -> Facts:
    """Ask the TPM. Raises HardwareError, UsageError, and RefusedError PCR_UNUSABLE for a bank that it does not keep."""
    connection = Connection(tcti or DEFAULT_TCTI)
    try:
        with connection.work() as work:
            fixed, variable = _properties(work, 0x100), _properties(work, 0x200)
            _, banks = work.call("get_capability", TPM2_CAP.PCRS, 0, 1)
            indexes = index_handles(work)
            ours = [index for index in indexes if FIRST <= index <= LAST]
            allocated = {
                int(bank.hash) for bank in banks.data.assignedPCR if any(bytes(bank.pcrSelect)[: bank.sizeofSelect])
            }
            return Facts(
                *identity(work),
                revision=f"{fixed.get(_REVISION, 0) / 100:.2f}",
                banks=[name for name, algorithm in BANKS.items() if algorithm in allocated],
                ek_certificates=[keys.CERTIFICATES[index] for index in keys.certificate_indices(work)],
                persistent_srk=keys.persistent_storage_root_key(work) is not None,
                in_lockout=bool(variable.get(_PERMANENT, 0) & _IN_LOCKOUT),
                wrong_pins=variable.get(_LOCKOUT_COUNTER, 0),
                wrong_pins_allowed=variable.get(_MAX_AUTH_FAIL, 0),
                forgiven_after=variable.get(_LOCKOUT_INTERVAL, 0),
                lockout_recovery=variable.get(_LOCKOUT_RECOVERY, 0),
                nv_counters=variable.get(_NV_COUNTERS, 0),
                nv_counters_left=variable.get(_NV_COUNTERS_LEFT, 0),
                nv_counters_most=fixed.get(_NV_COUNTERS_MOST, 0),
                nv_indexes=len(indexes),
                nv_ours=[f"0x{index:08x}" for index in ours],
                nv_ours_bytes=sum(_size(work, index) for index in ours),
                clock_update=fixed.get(_CLOCK_UPDATE, 0),
                pcrs=keys.read_pcrs(work, selection),
            )
    finally:
        connection.close()


def identity(work: Work) -> tuple[str, str]:
    """Manufacturer with model, and firmware version, as the TPM gives them."""
    facts = _properties(work, _MANUFACTURER)
    words = [facts.get(_MANUFACTURER + i, 0).to_bytes(4, "big").decode("latin-1") for i in range(5)]
    name = "".join(filter(str.isprintable, words[0] + " " + "".join(words[1:])))
    version = b"".join(facts.get(_FIRMWARE_VERSION + i, 0).to_bytes(4, "big") for i in range(2))
    return " ".join(name.split()), ".".join(str(int.from_bytes(version[at : at + 2], "big")) for at in range(0, 8, 2))


def _size(work: Work, index: int) -> int:
    try:
        area, _ = work.call("nv_read_public", work.borrow(work.call("tr_from_tpmpublic", index)))
    except TSS2_Exception as error:
        if code(error) == TPM2_RC.HANDLE:  # taken away since it was listed
            return 0
        raise
    public = area.nvPublic
    return len(public.marshal()) + SIZE + int(public.dataSize)


def _properties(work: Work, first: int) -> dict[int, int]:
    _, capability = work.call("get_capability", TPM2_CAP.TPM_PROPERTIES, first, 64)
    return {int(fact.property): int(fact.value) for fact in capability.data.tpmProperties}
