"""Threads that work beside the application's own, and end with the process at the latest."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from hwlicense.core.errors import Reason, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable


def begin(name: str, target: Callable[..., object], *arguments: object) -> threading.Thread:
    """A thread that runs `target` from now on. Raises StorageError where the system gives none."""
    thread = threading.Thread(target=target, args=arguments, name=f"hwlicense {name}", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        what = f"The system gives the process no further thread, and the license's {name} needs one."
        raise StorageError(Reason.STORAGE, what, "Raise the limit of threads (`ulimit -u`).") from error
    return thread
