"""What firmware, boot loader and kernel would have measured into the PCRs (TCG PC Client Platform Firmware Profile)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from hwlicense_simulators.errors import SimulatorError

Measurements: TypeAlias = Mapping[int, bytes | Sequence[bytes]]

DEFAULT_BOOT: Measurements = {
    0: b"firmware 1",
    1: b"firmware configuration 1",
    2: b"option ROM 1",
    4: b"boot loader 1",
    7: b"secure boot policy 1",
    8: b"kernel command line 1",
    9: b"kernel 1",
}
"""A machine as it left the factory. The PCRs are used as UEFI firmware and GRUB use them."""

# EV_SEPARATOR ends the firmware's part of the boot in PCR 0-7, so that none of them is left all zero.
_SEPARATOR, _FIRMWARE_PCRS = bytes(4), range(8)


def events(boot: Measurements) -> Iterator[tuple[int, bytes]]:
    """PCR index and measured data, in the order in which a machine extends them."""
    for index in boot:
        if index not in range(16):
            raise SimulatorError(f"PCR {index} is not measured at boot", "use PCR 0 to 15")
    for wanted in (_FIRMWARE_PCRS, range(8, 16)):
        for index in wanted:
            measured = boot.get(index, ())
            for data in (measured,) if isinstance(measured, bytes) else measured:
                yield index, data
        if wanted is _FIRMWARE_PCRS:
            yield from ((index, _SEPARATOR) for index in _FIRMWARE_PCRS)


def predict_pcrs(boot: Measurements = DEFAULT_BOOT, bank: str = "sha256") -> dict[int, bytes]:
    """The values of PCR 0 to 15 after such a boot, computed without a TPM: golden values for an approval."""
    values = dict.fromkeys(range(16), bytes(hashlib.new(bank).digest_size))
    for index, data in events(boot):
        values[index] = hashlib.new(bank, values[index] + hashlib.new(bank, data).digest()).digest()
    return values
