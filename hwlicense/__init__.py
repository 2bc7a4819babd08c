"""Hardware-bound licensing for machine-learning models.

`open()` gives a licensed model; everything that can go wrong is a `HwlicenseError` with a `reason` and a `hint`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwlicense.core.errors import (
    AbsentError,
    ClosedError,
    DamagedError,
    HardwareError,
    HwlicenseError,
    Reason,
    RefusedError,
    StorageError,
    UsageError,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from hwlicense.core.secret import Secret
    from hwlicense.device.model import Model

__version__ = "0.1.0"

__all__ = [
    "AbsentError",
    "ClosedError",
    "DamagedError",
    "HardwareError",
    "HwlicenseError",
    "Model",
    "Reason",
    "RefusedError",
    "Secret",
    "StorageError",
    "UsageError",
    "__version__",
    "open",
]


def open(  # noqa: A001  # it opens a package as the builtin opens a file
    package: str | os.PathLike[str],
    *,
    vendor: str,
    home: str | os.PathLike[str] | None = None,
    state: str | os.PathLike[str] | None = None,
    tpm: str | None = None,
    pin: Callable[[str], str | bytes | bytearray | Secret] | None = None,
) -> Model:
    """Open a package on the hardware that its license is bound to. Use the result as a context manager.

    `vendor` is the text of the vendor's `vendor.pub.json`: a constant of the application, its only root of trust.
    `home` is the device's home, by default `$HWLICENSE_HOME`, else the platform's state folder; `state` is where later
    changes are kept if the home is read-only. `tpm` is a TCTI string, by default `$HWLICENSE_TPM`, else the one that
    the device was enrolled with, else the kernel's resource manager. `pin` is called with a prompt when a license asks
    for a PIN, and returns it; only a `Secret` or a bytearray is wiped after use.

    Raises RefusedError (the license says no), HardwareError, DamagedError, UsageError, StorageError.
    """
    from hwlicense.device import selecting  # noqa: PLC0415  # importing the package stays cheap
    from hwlicense.device.opening import open_package  # noqa: PLC0415

    place = selecting.home(home, state)
    trusted = selecting.vendor(vendor)
    return open_package(Path(package), trusted, place, selecting.tpm(tpm, place), selecting.pin(pin))


def __getattr__(name: str) -> Any:  # noqa: ANN401  # a module's attributes are of any type
    """`Model` and `Secret`, for annotations and PINs, imported when they are asked for."""
    if name == "Model":
        from hwlicense.device.model import Model  # noqa: PLC0415

        return Model
    if name == "Secret":
        from hwlicense.core.secret import Secret  # noqa: PLC0415

        return Secret
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
