"""The cap: a PCR that is 0 while a revision is written, and extended once before anything opens in that boot."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from tpm2_pytss import ESYS_TR, TPM2_ALG, TPML_DIGEST_VALUES, TPMT_HA, TPMU_HA

from hwlicense.binders.tpm import keys
from hwlicense.core.errors import Reason, RefusedError
from hwlicense.core.tpm.composing import CAP
from hwlicense.core.tpm.pcrs import Selection

if TYPE_CHECKING:
    from hwlicense.binders.tpm.connection import Work


_EXTENDED: Final = hashlib.sha256(bytes(32) + CAP).digest()


def is_open(work: Work, cap: int) -> bool:
    """Whether a revision can still be written in this boot."""
    return not any(_value(work, cap))


def _value(work: Work, cap: int) -> bytes:
    (pcr,) = keys.read_pcrs(work, Selection((("sha256", (cap,)),)))
    return pcr.value


def extend(work: Work, cap: int) -> None:
    """End this boot's write window. Raises RefusedError PCR_MISMATCH where something else was measured into the PCR.

    Sessions of other programs that have passed a PolicyPCR end with it, and these try again.
    """
    with work.exclusive():  # twice would not be the value that licenses ask for, until the next boot
        value = _value(work, cap)
        if value == _EXTENDED:  # by another program, just now
            return
        if any(value):
            what = f"PCR {cap}, which caps what a boot can open, was extended by something else."
            hint = "Ask the vendor for a license with another cap_pcr, or find out what measures into it."
            raise RefusedError(Reason.PCR_MISMATCH, what, hint)
        digest = TPMT_HA(hashAlg=TPM2_ALG.SHA256, digest=TPMU_HA(sha256=CAP))
        work.call("pcr_extend", ESYS_TR(cap), TPML_DIGEST_VALUES([digest]))


def reboot_needed(cap: int) -> RefusedError:
    """What is said where a license was opened since the boot, and a revision is to be written."""
    what = f"This license is written only before anything opens in a boot, and PCR {cap} says that something did."
    return RefusedError(Reason.REBOOT_NEEDED, what, "Reboot, and install the license before the application starts.")
