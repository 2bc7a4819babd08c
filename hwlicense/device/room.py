"""How much memory this process may come to have.

Beyond it the kernel does not refuse memory: it gives addresses, and kills the process when the pages are touched.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from hwlicense.core.errors import Reason, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

LARGE: Final = 64 << 20
"""Bytes from which on it is worth looking."""

_PAGES_OF_TABLES: Final = 512
"""Each page of a page table is for so many."""
_BUFFERS: Final = 4 << 20
"""Bytes for decryption; 3 MiB were needed where a file was filled."""
_KEPT: Final = ("anon", "rss", "shmem", "slab_unreclaimable", "pagetables", "kernel_stack")
"""By the names of version 2, and 1."""
_ROOT: Final = Path("/")


class _Limit(NamedTuple):
    most: int
    used: int
    what: str

    @property
    def left(self) -> int:
        return max(0, self.most - self.used)


def check_memory(size: int) -> None:
    """Raises StorageError where `size` bytes are more than the machine has, or than its control group has left."""
    if size < LARGE:
        return
    needed = size + size // _PAGES_OF_TABLES + _BUFFERS
    least = min((*_machine(), *_groups()), key=lambda limit: limit.left, default=None)
    if least and needed > least.left:
        used = f" and uses {least.used:,}" if least.used else ""
        said = f"The model needs {needed:,} bytes of memory, and {least.what} has {least.most:,}{used}."
        raise StorageError(Reason.STORAGE, said, "Give it more memory, or read the member in parts with `model.open`.")


def _machine() -> Iterator[_Limit]:
    found = dict(re.findall(r"^(MemTotal|SwapTotal): +(\d+) kB$", _said("proc/meminfo"), re.MULTILINE))
    if "MemTotal" in found:
        yield _Limit(sum(int(size) << 10 for size in found.values()), 0, "the machine")


def _groups() -> Iterator[_Limit]:
    """The process's control groups (cgroups(7)) that have limits, of version 2 and 1, and those above them."""
    for line in _said("proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, name, start = "sys/fs/cgroup", "memory.max", ""
        elif "memory" in controllers.split(","):
            base, name, start = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "total_"
        else:
            continue
        # In a container the path may be one of the host's, and what the container sees is its own group as the root
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts) + 1):
            group = "/".join((base, *parts[:depth]))
            if (limit := _said(f"{group}/{name}").strip()).isdigit():
                yield _Limit(int(limit), _kept(f"{group}/memory.stat", start), "its control group (cgroup)")


def _kept(stat: str, start: str) -> int:
    """Bytes that the kernel cannot take back when memory is short, as it can the cache of files, nor swap out."""
    found = dict(re.findall(rf"^{start}(\w+) (\d+)$", _said(stat), re.MULTILINE))
    kept = sum(int(found.get(name, 0)) for name in _KEPT)
    swap = re.search(r"^SwapTotal: +(\d+) kB$", _said("proc/meminfo"), re.MULTILINE)
    return max(0, kept - (int(swap[1]) << 10 if swap else 0))


def _said(path: str) -> str:
    try:
        return (_ROOT / path).read_text()
    except OSError:  # absent, or hidden in a container
        return ""
