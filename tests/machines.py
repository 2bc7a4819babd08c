"""A simulated machine with a tapped TPM and a binder, for tests of the TPM binder."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Self

from tpm2_pytss import ESAPI, TPM2_CAP

from hwlicense.binders.tpm import TpmHardware
from hwlicense.core.tpm.pcrs import Selection
from hwlicense_simulators import Tpm
from tests.order_desk import OrderDesk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hwlicense.core.documents import TpmEvidence
    from hwlicense_simulators import Wire

SELECTION = Selection.parse("sha256:4,7")
PRODUCT = "label-reader"


class Machine:
    """Everything goes over the wire, which records it."""

    tpm: Tpm
    wire: Wire
    hardware: TpmHardware
    evidence: TpmEvidence

    def __init__(self, **options: object) -> None:
        self.desk, self._options, self._stack = OrderDesk(), options, ExitStack()

    def __enter__(self) -> Self:
        self.tpm = self._stack.enter_context(Tpm(**self._options))  # type: ignore[arg-type]
        self.wire = self._stack.enter_context(self.tpm.tapped())
        self.hardware = self._stack.enter_context(TpmHardware(self.wire.tcti))
        self.evidence = self.hardware.describe(SELECTION)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @contextmanager
    def esapi(self) -> Iterator[ESAPI]:
        """Root's own access to the same TPM."""
        with ESAPI(self.wire.tcti) as esapi:
            yield esapi

    def loaded(self) -> list[int]:
        """Handles of objects and sessions that are in the TPM now."""
        handles = []
        with self.esapi() as esapi:
            for first in (0x80000000, 0x02000000, 0x03000000):
                _, capability = esapi.get_capability(TPM2_CAP.HANDLES, first, 64)
                handles += list(map(int, capability.data.handles))
        return handles

    def heal(self) -> None:
        """Nothing more goes wrong on the wire."""
        self.wire._faults.clear()
        self.wire.on_command = self.wire.on_answer = None
