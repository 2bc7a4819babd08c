"""What is done by one program alone at a TPM's device; files stand in for devices."""

import errno
import fcntl
import os

import pytest

from hwlicense.binders.tpm import answering, turns
from hwlicense.core.errors import AbsentError, HardwareError, Reason


@pytest.fixture
def node(tmp_path):
    path = tmp_path / "tpmrm0"
    path.touch()
    return path


def test_a_program_that_keeps_a_device_for_ever_is_not_waited_for_for_ever(node, monkeypatch):
    monkeypatch.setattr(answering, "LIMIT", 0.2)
    with node.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(HardwareError, match=r"locked for 0\.2 s") as caught, turns.alone(f"device:{node}"):
            pytest.fail("not reached")
    assert caught.value.reason == Reason.TPM_BUSY
    assert "lsof" in caught.value.hint
    with turns.alone(f"device:{node}"):  # it was let go, and nothing of the refusal holds it
        pass


def test_a_device_that_is_gone_or_closed_to_the_user(node, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with pytest.raises(AbsentError) as absent, turns.alone(f"device:{node}-gone"):
        pytest.fail("not reached")
    assert (absent.value.reason, bool(absent.value.hint)) == (Reason.TPM_ABSENT, True)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HardwareError) as closed, turns.alone(f"device:{node}"):
        pytest.fail("not reached")
    assert (closed.value.reason, bool(closed.value.hint)) == (Reason.TPM_NO_PERMISSION, True)


def test_a_device_that_the_kernel_gives_to_one_program_is_alone_already(node, monkeypatch):
    """/dev/tpm0 is busy for a second opening, also of the program that has it."""

    def refuse(*_):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "open", refuse)
    with turns.alone(f"device:{node}"):
        pass


def test_an_error_of_the_block_passes(node):
    with pytest.raises(PermissionError, match="own"), turns.alone(f"device:{node}"):
        raise OSError(errno.EACCES, "the block's own")
