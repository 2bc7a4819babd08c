"""The keeper of a program's processes: what it refuses, and what becomes of its own faults."""

import errno
import os
import socket

import pytest

from hwlicense.core.errors import HwlicenseError
from hwlicense.device import keeping, namespaces
from hwlicense.device.keeping import Mount
from hwlicense.device.tree import Tree

COMMAND = ["sh", "-c", "sleep 60"]
REFUSALS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EINVAL, errno.EUSERS)


def raising(error):
    def fails(*_arguments, **_named):
        raise error

    return fails


@pytest.mark.parametrize(
    ("error", "reason", "words"),
    [
        (ValueError("what must not show"), "INTERNAL", "ValueError at test_keeping.py"),
        (KeyboardInterrupt(), "INTERNAL", "KeyboardInterrupt at"),
        (OSError("without a number"), "INTERNAL", "OSError at"),
        (MemoryError(), "STORAGE", os.strerror(errno.ENOMEM)),
        (OSError(errno.EMFILE, "files"), "STORAGE", os.strerror(errno.EMFILE)),
    ],
)
def test_a_keepers_own_fault_is_not_the_disks(monkeypatch, error, reason, words):
    monkeypatch.setattr(keeping, "forbid_dumps", raising(error))
    with pytest.raises(HwlicenseError, match=words) as caught:
        Tree(COMMAND, None)
    assert (caught.value.reason, caught.value.exit_status) == (reason, 5)
    assert "must not show" not in str(caught.value)
    assert caught.value.hint
    assert "disk" not in caught.value.hint


@pytest.mark.parametrize(
    ("step", "number", "reason"),
    [
        *((step, number, "NAMESPACES_REFUSED") for step in ("leave", "mount_memory") for number in REFUSALS),
        ("leave", errno.ENOSPC, "NAMESPACES_REFUSED"),  # beyond user.max_user_namespaces
        *((step, number, "STORAGE") for step in ("leave", "mount_memory") for number in (errno.ENOMEM, errno.EMFILE)),
        ("mount_memory", errno.ENOSPC, "STORAGE"),
    ],
)
def test_what_is_short_is_not_taken_for_a_refusal(monkeypatch, tmp_path, step, number, reason):
    monkeypatch.setattr(namespaces, step, raising(OSError(number, os.strerror(number))))
    with pytest.raises(HwlicenseError, match=os.strerror(number)) as caught:
        Tree(COMMAND, Mount(tmp_path, 1 << 20, 64, executable=False))
    assert caught.value.reason == reason
    assert ("--fd" in caught.value.hint) == (reason == "NAMESPACES_REFUSED")


@pytest.mark.parametrize("message", [b"dance", b"run", b"signal", b"signal x", b"members now"])
def test_a_message_that_a_keeper_does_not_know_ends_it_and_is_told(message):
    with Tree(COMMAND, None) as tree:
        tree._control.send(message)
        with pytest.raises(HwlicenseError, match="ValueError at") as caught:
            tree.wait()
        assert caught.value.reason == "INTERNAL"


def test_what_came_without_its_descriptors_is_told():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.send(b"run")
        assert keeping.received(theirs) == (["run"], [])
