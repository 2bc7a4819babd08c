"""The TPM 2.0 binder, the only part that needs the TPM library. Whoever imports it needs a TPM now: it is an extra.

Importing raises UsageError EXTRA_MISSING where that library is not installed.
"""

import os

from hwlicense.core.errors import Reason, UsageError

# Before the C library loads, whatever the environment says: its trace shows unsealed secrets and PINs
os.environ["TSS2_LOG"] = "all+none"

try:
    from hwlicense.binders.tpm.hardware import TpmHardware
except ImportError as error:
    if (error.name or "").partition(".")[0] != "tpm2_pytss":
        raise
    raise UsageError(
        Reason.EXTRA_MISSING, f"The TPM library cannot be loaded: {error}.", 'pip install "hwlicense[tpm]"'
    ) from error

__all__ = ["TpmHardware"]
