"""How much memory this process may come to have, at the most.

Beyond it the kernel does not refuse memory: it gives addresses, and kills the process when the pages are touched.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hwlicense.core.errors import Reason, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

LARGE: Final = 64 << 20
"""Bytes from which on it is worth looking."""

_ROOT: Final = Path("/")


def check_memory(size: int) -> None:
    """Raises StorageError where `size` bytes are more than machine or control group can ever give."""
    if size < LARGE:
        return
    limits = [(limit, what) for limit, what in (_machine(), *_groups()) if limit is not None]
    if limits and size > min(limits)[0]:
        limit, what = min(limits)
        said = f"The model needs {size:,} bytes of memory, and {what} has {limit:,}."
        raise StorageError(Reason.STORAGE, said, "Give it more memory, or read the member in parts with `model.open`.")


def _machine() -> tuple[int | None, str]:
    found = dict(re.findall(r"^(MemTotal|SwapTotal): +(\d+) kB$", _said("proc/meminfo"), re.MULTILINE))
    total = sum(int(size) << 10 for size in found.values()) if "MemTotal" in found else None
    return total, "the machine"


def _groups() -> Iterator[tuple[int | None, str]]:
    """The limits of the process's control groups (cgroups(7)), of version 2 and 1, and of those above them."""
    for line in _said("proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, name = "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container the path may be one of the host's, and what the container sees is its own group as the root
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts) + 1):
            said = _said("/".join((base, *parts[:depth], name))).strip()
            yield (int(said) if said.isdigit() else None), "its control group (cgroup)"


def _said(path: str) -> str:
    try:
        return (_ROOT / path).read_text()
    except OSError:  # absent, or hidden in a container
        return ""
