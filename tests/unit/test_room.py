"""More memory than there can be is refused before it is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from hwlicense.core.errors import Reason, StorageError
from hwlicense.device import room
from hwlicense.device.memory import Memory, SealedFile, protection

GIB = 1 << 30
MACHINE = {"proc/meminfo": "MemTotal:       8388608 kB\nMemFree:  1 kB\nSwapTotal:      1048576 kB\n"}
V2 = {"proc/self/cgroup": "0::/app/worker\n"}
V1 = {"proc/self/cgroup": "8:cpu:/x\n4:memory:/app/worker\n0::/\n"}


@pytest.fixture
def system(tmp_path, monkeypatch):
    def say(*files: dict[str, str]) -> None:
        for each in files:
            for name, text in each.items():
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_text(text)

    monkeypatch.setattr(room, "_ROOT", tmp_path)
    return say


@pytest.mark.parametrize(
    ("files", "limit", "what"),
    [
        ([MACHINE], 9 * GIB, "the machine"),
        ([MACHINE, V2, {"sys/fs/cgroup/app/worker/memory.max": "max\n"}], 9 * GIB, "the machine"),
        ([MACHINE, V2, {"sys/fs/cgroup/app/worker/memory.max": f"{GIB}\n"}], GIB, "control group"),
        ([MACHINE, V2, {"sys/fs/cgroup/app/memory.max": f"{GIB}\n"}], GIB, "control group"),
        ([MACHINE, V2, {"sys/fs/cgroup/memory.max": f"{GIB}\n"}], GIB, "control group"),  # seen from in a container
        ([MACHINE, V1, {"sys/fs/cgroup/memory/app/worker/memory.limit_in_bytes": f"{GIB}\n"}], GIB, "control group"),
        ([V1, {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n"}], GIB, "control group"),
    ],
)
def test_the_least_limit_counts(system, files, limit, what):
    system(*files)
    room.check_memory(limit - limit // 100)
    with pytest.raises(StorageError, match=what) as refused:
        room.check_memory(limit + 1)
    assert refused.value.reason == Reason.STORAGE
    assert "model.open" in refused.value.hint


IN_V2 = V2 | {"sys/fs/cgroup/app/memory.max": f"{GIB}\n"}
IN_V1 = V1 | {"sys/fs/cgroup/memory/app/memory.limit_in_bytes": f"{GIB}\n"}
STAT_V2 = "anon 100000000\nfile 900000000\nshmem 100000000\nslab_reclaimable 900000000\nslab_unreclaimable 1000000\n"
STAT_V1 = "rss 1\ncache 1\ntotal_cache 900000000\ntotal_rss 100000000\ntotal_rss_huge 90000000\ntotal_shmem 101000000\n"
NO_SWAP = {"proc/meminfo": "MemTotal:       8388608 kB\nSwapTotal:      0 kB\n"}


@pytest.mark.parametrize(
    "files",
    [IN_V2 | {"sys/fs/cgroup/app/memory.stat": STAT_V2}, IN_V1 | {"sys/fs/cgroup/memory/app/memory.stat": STAT_V1}],
)
def test_what_the_group_uses_and_cannot_give_back_counts(system, files):
    system(NO_SWAP, files)
    used = 201_000_000
    room.check_memory((GIB - used) * 99 // 100)
    with pytest.raises(StorageError, match=f"has {GIB:,} and uses {used:,}"):
        room.check_memory(GIB - used - (1 << 20))
    system(MACHINE)  # it could be swapped out
    room.check_memory(GIB * 99 // 100)


@pytest.mark.usefixtures("system")
def test_where_nothing_is_said_nothing_is_refused():
    room.check_memory(1 << 60)


def test_models_ask_and_keys_do_not(system):
    system(MACHINE, V2, {"sys/fs/cgroup/memory.max": "1048576\n"})
    for make in (Memory, lambda size: SealedFile(size, bytes)):
        with pytest.raises(StorageError, match="control group"):
            make(room.LARGE)
    Memory(2 << 20).wipe()
    assert protection().held == 0


def test_this_machine_has_room():
    assert Path("/proc/meminfo").exists()
    room.check_memory(room.LARGE)
