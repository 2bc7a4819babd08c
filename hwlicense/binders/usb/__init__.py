"""The binder for USB dongles that answer by HMAC-SHA1, the only part that needs pyusb. Whoever imports it needs it now.

Importing raises UsageError EXTRA_MISSING where pyusb is not installed.
"""

import os

from hwlicense.core.errors import Reason, UsageError

# Before pyusb loads, whatever the environment says: its trace shows all that is written, also secrets to a dongle
os.environ.pop("PYUSB_DEBUG", None)

try:
    from hwlicense.binders.usb.dongle import Dongle
    from hwlicense.binders.usb.finding import Selector, find, find_one
    from hwlicense.binders.usb.hardware import UsbHardware
except ImportError as error:
    if (error.name or "").partition(".")[0] != "usb":
        raise
    raise UsageError(
        Reason.EXTRA_MISSING, f"The USB library cannot be loaded: {error}.", 'pip install "hwlicense[usb]"'
    ) from error

__all__ = ["Dongle", "Selector", "UsbHardware", "find", "find_one"]
