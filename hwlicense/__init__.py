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
    ExceededError,
    HardwareError,
    HwlicenseError,
    Reason,
    RefusedError,
    StorageError,
    UsageError,
    memory_needed,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from hwlicense.core.secret import Secret
    from hwlicense.device.model import Model
    from hwlicense.device.starting import Session, Standing

__version__ = "0.1.0"

__all__ = [
    "AbsentError",
    "ClosedError",
    "DamagedError",
    "ExceededError",
    "HardwareError",
    "HwlicenseError",
    "Model",
    "Reason",
    "RefusedError",
    "Secret",
    "Session",
    "Standing",
    "StorageError",
    "UsageError",
    "__version__",
    "current",
    "open",
]


def open(  # noqa: A001, PLR0913  # it opens a package as the builtin opens a file; hardware of three kinds is chosen
    package: str | os.PathLike[str],
    *,
    vendor: str,
    home: str | os.PathLike[str] | None = None,
    state: str | os.PathLike[str] | None = None,
    tpm: str | None = None,
    token: str | None = None,
    pin: Callable[[str], str | bytes | bytearray | Secret] | None = None,
    last_try: bool = False,
    touch: Callable[[str], object] | None = None,
) -> Model:
    """Open a package on the hardware that its license is bound to. Use the result as a context manager.

    `vendor` is the text of the vendor's `vendor.pub.json`: a constant of the application, its only root of trust.
    `home` is the device's home, by default `$HWLICENSE_HOME`, else the platform's state folder; `state` is where later
    changes are kept if the home is read-only. `tpm` is a TCTI string, by default `$HWLICENSE_TPM`, else the one that
    the device was enrolled with, else the kernel's resource manager. `token` is a PKCS#11 URI with a module-path, by
    default `$HWLICENSE_TOKEN`, else those that the device was enrolled with; dongles are found by themselves.

    `pin` is called with a prompt when a license or a token asks for a PIN, and returns it; only a `Secret` or a
    bytearray is wiped after use. Where the license asks for presence, it is called again, on another thread, when a
    token comes back. `last_try` agrees to try a PIN even if a wrong one would lock the token. `touch` is called with a
    sentence, maybe on another thread, when hardware waits for a finger.

    Raises RefusedError (the license says no), HardwareError, DamagedError, UsageError, StorageError.
    """
    from hwlicense.device import selecting  # noqa: PLC0415  # importing the package stays cheap
    from hwlicense.device.opening import open_package  # noqa: PLC0415
    from hwlicense.device.reading import PackageFile  # noqa: PLC0415

    with memory_needed():
        place = selecting.home(home, state)
        trusted = selecting.vendor(vendor)
        connect = selecting.hardware(place, tpm, [token] if token else [], touch)
        asking = selecting.pin(pin, last_try=last_try)
        return open_package(PackageFile(Path(package), trusted), place, connect, asking)


def current() -> Model:
    """The open model of the package that `hwlicense run` started this program from. Forked children have it, too.

    Raises UsageError in any other process.
    """
    from hwlicense.device import running  # noqa: PLC0415  # importing the package stays cheap

    return running.current()


def __getattr__(name: str) -> Any:  # noqa: ANN401  # a module's attributes are of any type
    """Types for annotations and PINs, imported when they are asked for."""
    if name in {"Model", "Session", "Standing"}:
        from hwlicense.device import model  # noqa: PLC0415

        return getattr(model, name)
    if name == "Secret":
        from hwlicense.core.secret import Secret  # noqa: PLC0415

        return Secret
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
