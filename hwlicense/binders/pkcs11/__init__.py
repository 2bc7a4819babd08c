"""The PKCS#11 binder: tokens, smart cards and HSMs, by the module that their maker gives. An extra.

Their modules run in processes of their own, and so does the library that loads them: whoever imports this package loads
neither. Asking it for `TokenHardware` raises UsageError EXTRA_MISSING where that library is not installed.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hwlicense.core.errors import Reason, UsageError

if TYPE_CHECKING:
    from hwlicense.binders.pkcs11.hardware import TokenFacts, TokenHardware

__all__ = ["TokenFacts", "TokenHardware"]


def __getattr__(name: str) -> Any:  # noqa: ANN401  # a module's attributes are of any type
    """Imported when asked for: the module's process needs its own half of the package alone, and starts sooner so."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("pkcs11") is None:
        what = "The PKCS#11 library is not installed."
        raise UsageError(Reason.EXTRA_MISSING, what, 'pip install "hwlicense[pkcs11]"')
    from hwlicense.binders.pkcs11 import hardware  # noqa: PLC0415

    return getattr(hardware, name)
