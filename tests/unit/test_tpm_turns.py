"""One program at a time: at a TPM's device, for which files stand in, and at a simulator's socket."""

import errno
import fcntl
import os
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest

from hwlicense.binders.tpm import answering, turns
from hwlicense.core.errors import AbsentError, HardwareError, Reason
from tests.packages import in_child


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


# ---- turns at a simulator


@pytest.fixture
def tcti(tmp_path):
    return f"swtpm:path={tmp_path / 'socket'}"


def free(folder) -> bool:
    """Whether nobody has a turn at the socket in this folder."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


@contextmanager
def a_thread_in_a_turn(tcti, seconds):
    """Of the parent, as that which proves presence."""
    there = threading.Event()

    def work():
        with turns.turn(tcti):
            there.set()
            time.sleep(seconds)

    thread = threading.Thread(target=work)
    thread.start()
    assert there.wait(10)
    yield
    thread.join()


def test_a_child_that_was_forked_while_a_thread_had_its_turn_takes_turns(tcti, tmp_path):
    def child():
        began = time.monotonic()
        for _ in range(2):
            with turns.turn(tcti):
                assert time.monotonic() - began > 0.3  # after the parent's
                assert not free(tmp_path)
            assert free(tmp_path)

    with a_thread_in_a_turn(tcti, 0.5):
        in_child(child)
    assert free(tmp_path)


def test_a_child_whose_parent_waits_for_it_within_a_turn_goes_on(tcti, tmp_path):
    """As a signal handler may fork, and the child come out of it."""

    def child():
        with turns.turn(tcti):
            pass
        turn.close()

    with ExitStack() as turn:
        turn.enter_context(turns.turn(tcti))
        in_child(child)
        assert not free(tmp_path)  # the child has ended no turn of its parent's
        threading.Timer(0.3, turn.close).start()
        in_child(lambda: takes_a_turn(tcti, tmp_path))


def takes_a_turn(tcti, folder):
    with turns.turn(tcti):
        assert not free(folder)


def test_a_turn_ends_with_its_process_though_a_child_lives(tcti, tmp_path):
    def killed():
        with turns.turn(tcti):
            if not os.fork():
                time.sleep(3)
            os._exit(0)

    in_child(killed)
    end = time.monotonic() + 2
    while not free(tmp_path):
        assert time.monotonic() < end
