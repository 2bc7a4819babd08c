"""What processes share is in memory: no file puts it back, and only who knows the key is given it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hwlicense.core.errors import DamagedError, HwlicenseError, StorageError
from hwlicense.core.limits import Limits, Use
from hwlicense.core.secret import Secret
from hwlicense.device import locking, recovering, sharing
from hwlicense.device.ledger import Ledger
from hwlicense.device.records import Records
from tests.attacks.test_metering import Shop, spend_patiently

TOTAL = 20_000


@pytest.fixture
def shop(tmp_path):
    return Shop(tmp_path, Use(limits=Limits(inferences=TOTAL)))


def account(shop):
    return recovering.account_folder(shop.state, shop.granted)


def spend_told(shop, count):
    """In a process of its own: join, and tell of each that was spent."""
    metering = shop.open()
    for _ in range(count):
        spend_patiently(metering, 1)
        shop.tell()
    metering.close()


def test_nothing_that_is_written_to_files_puts_it_back(shop, tmp_path):
    """One process is stopped, all files are put back, and others join and spend."""
    first, spent = shop.open(), 0
    spent += spend_patiently(first, 10)
    shutil.copytree(shop.state, tmp_path / "saved", ignore=shutil.ignore_patterns("join"))

    folder = account(shop)
    for _ in range(5):
        os.waitpid(shop.child(lambda: spend_told(shop, 3000)), 0)
        spent += len(shop.told())
        for name in ("ledger", "alive", "renewal"):  # in place: as whoever has them open sees it
            (folder / name).write_bytes((tmp_path / "saved" / folder.relative_to(shop.state) / name).read_bytes())
    spent += spend_patiently(first, TOTAL)
    first.close()
    assert spent <= TOTAL


def test_a_stopped_process_keeps_others_out_and_says_so(shop, monkeypatch):
    ready = os.pipe()

    def work() -> None:
        shop.open()
        os.write(ready[1], b"1")
        time.sleep(60)

    monkeypatch.setattr(sharing, "PATIENCE", 1.0)
    child = shop.child(work)
    os.read(ready[0], 1)
    os.kill(child, signal.SIGSTOP)
    os.waitpid(child, os.WUNTRACED)  # until then it may answer yet
    with pytest.raises(StorageError) as error:
        shop.open()
    assert f"does not answer (process {child})" in error.value.what
    with pytest.raises(StorageError, match="does not answer"):  # and so before hardware is asked, which may count
        recovering.foreseeable(account(shop), shop.granted, None)
    os.kill(child, signal.SIGCONT)
    recovering.foreseeable(account(shop), shop.granted, None)
    shop.open().close()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    shop.open().close()


def test_who_does_not_know_the_key_is_given_nothing(shop):
    metering = shop.open()
    with sharing._asking(account(shop)) as asking:
        nonce = asking.recv(32)
        asking.send(os.urandom(64))
        message, fds, _, _ = socket.recv_fds(asking, 32, 2)
        assert (message, fds) == (b"", [])
    assert len(nonce) == 32
    metering.close()


def test_an_answer_is_good_for_one_question(shop):
    """What one that joins says is of no use to another that heard it."""
    metering = shop.open()
    key = Secret(bytearray(b"k" * 32))
    records = Records(key, 8)
    with sharing._asking(account(shop)) as asking:
        nonce, mine = asking.recv(32), os.urandom(32)
        said = mine + records.code(b"join" + nonce + mine)
        asking.send(said)
        _, given, _, _ = socket.recv_fds(asking, 32, 2)
        assert len(given) == 2
    for fd in given:
        os.close(fd)
    with sharing._asking(account(shop)) as asking:
        asking.recv(32)
        asking.send(said)
        assert socket.recv_fds(asking, 32, 2)[:2] == (b"", [])
    metering.close()


def test_a_socket_of_another_gives_no_account(shop, monkeypatch):
    """It answers, and does not know the key."""
    monkeypatch.setattr(sharing, "PATIENCE", 0.5)
    metering = shop.open()
    (account(shop) / "join").unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, sharing._name(account(shop)) as name:
        listener.bind(name)
        listener.listen()
        over = threading.Event()

        def answer() -> None:
            listener.settimeout(0.1)
            while not over.is_set():
                with suppress(OSError):
                    asking, _ = listener.accept()
                    with asking:
                        asking.send(bytes(32))
                        asking.recv(64)
                        socket.send_fds(asking, [bytes(32)], [0, 0])

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(StorageError):
            shop.open()
        over.set()
        thread.join()
    metering.close()


def test_who_says_nothing_holds_up_the_others_for_a_moment(shop):
    metering = shop.open()
    with sharing._asking(account(shop)), sharing._asking(account(shop)):
        shop.open().close()
    metering.close()


def test_the_memory_does_not_shrink_under_anyone(shop):
    metering = shop.open()
    with metering._tended._ledger.sharing() as shared, pytest.raises(OSError, match="not permitted"):
        os.ftruncate(shared.file.fd, 0)
    metering.close()


def test_memory_that_something_else_wrote_to_gives_nothing(shop):
    metering = shop.open()
    spend_patiently(metering, 5)
    with metering._tended._ledger.sharing() as shared:
        shared.file.write(bytes(1000), 4096)
        shared.file.write(bytes(1000), 8192)
    with pytest.raises(DamagedError):
        metering.spend(50)
    metering.close()


def test_a_file_system_without_sockets_serves_one_process(shop, monkeypatch):
    def bind(_self, _address):
        raise PermissionError(errno.EPERM, "no sockets")

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "bind", bind)
        metering = shop.open()
    assert spend_patiently(metering, 100) == 100
    monkeypatch.setattr(sharing, "PATIENCE", 0.2)
    with pytest.raises(StorageError):
        shop.open()
    metering.close()


def test_no_socket_is_left_when_the_last_one_closes(shop):
    one = shop.open()
    other = shop.open()
    one.close()
    assert (account(shop) / "join").exists()
    other.close()
    assert not (account(shop) / "join").exists()


def test_a_child_answers_for_a_parent_that_is_gone(shop):
    ready = os.pipe()

    def parent() -> None:
        metering = shop.open()
        if not os.fork():
            spend_patiently(metering, 1)
            os.write(ready[1], b"1")
            time.sleep(30)

    os.waitpid(shop.child(parent), 0)
    os.read(ready[0], 1)
    metering = shop.open()
    assert spend_patiently(metering, 10) == 10
    metering.close()


def test_openings_at_once_by_twenty_processes(shop):
    children = [shop.child(lambda: spend_told(shop, 50)) for _ in range(20)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 20
    assert len(shop.told()) == 1000
    assert shop.used() == 1000


def test_a_long_path_of_the_state_folder(tmp_path):
    folder = tmp_path / ("x" * 120) / ("y" * 120)
    folder.mkdir(parents=True)
    shop = Shop(folder, Use(limits=Limits(inferences=TOTAL)))
    one, other = shop.open(), shop.open()
    assert spend_patiently(one, 10) + spend_patiently(other, 10) == 20
    one.close()
    other.close()


def test_an_account_that_is_not_open_is_shared_by_nobody(tmp_path):
    ledger = Ledger(tmp_path / "a", Secret(bytearray(32)), 8)
    with pytest.raises(HwlicenseError), ledger.sharing():
        pass
    ledger.close()


@pytest.mark.parametrize("where", ["memory", "socket", "pair", "thread"])
def test_an_opening_that_lacks_something_of_the_system_takes_no_lease(shop, monkeypatch, where):
    shop.open().close()
    steps = shop.anchor.read().steps

    def lacking(*_arguments, **_keywords):
        if where == "thread":
            raise RuntimeError("can't start new thread")
        raise OSError(errno.EMFILE, "Too many open files")

    target = {
        "memory": (sharing, "memory_file"),
        "socket": (sharing, "_socket"),
        "pair": (socket, "socketpair"),
        "thread": (threading.Thread, "start"),
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(*target, lacking)
        with pytest.raises(StorageError):
            shop.open()
    assert shop.anchor.read().steps == steps
    assert shop.used() == 0


def test_who_joins_one_that_is_killed_opens_alone(shop):
    """A stopped process is asked in vain; that it was killed meanwhile is no reason to refuse."""
    ready = os.pipe()

    def work() -> None:
        shop.open()
        os.write(ready[1], b"!")
        time.sleep(60)

    first = shop.child(work)
    os.read(ready[0], 1)
    os.kill(first, signal.SIGSTOP)
    os.waitpid(first, os.WUNTRACED)
    killing = threading.Timer(0.5, os.kill, (first, signal.SIGKILL))
    killing.start()
    shop.open().close()
    os.waitpid(first, 0)


def test_a_lock_that_nobody_lets_go_ends_an_opening_with_a_reason(shop, monkeypatch):
    monkeypatch.setattr(locking.LockedFile.share, "__defaults__", (0.5,))
    account(shop).mkdir(parents=True)
    shop.open().close()
    with (account(shop) / "alive").open("rb+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="has been locked for"):
            shop.open()
    shop.open().close()


def test_looking_whether_others_are_there_leaves_no_lock_to_a_child(shop):
    shop.open().close()
    probe = locking.LockedFile.opened(account(shop) / "alive", 0)
    copy = os.dup(probe.fd)  # as a child has it that was forked just then
    try:
        assert probe.free()
        probe.close()
        shop.open().close()
    finally:
        os.close(copy)


def test_a_file_that_is_closed_while_a_thread_has_it_locked_is_closed_by_that_thread(tmp_path):
    """Another file may have its number by then, and would be unlocked."""
    file = locking.LockedFile.opened(tmp_path / "one", 0)
    number = file.fd
    with file.locked():
        closing = threading.Thread(target=file.close)
        closing.start()
        closing.join()
        assert os.fstat(number)  # and so no other file gets the number
        with (tmp_path / "one").open("rb+") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(number)
    file.close()


def test_a_signal_handler_that_raises_as_a_lock_is_had_leaves_it_to_others():
    turn: Any = locking.Turn()
    lock = turn._lock

    class Interrupted:
        release = lock.release

        def acquire(self, timeout):
            assert lock.acquire(timeout=timeout)
            raise KeyboardInterrupt

    turn._lock = Interrupted()
    with pytest.raises(KeyboardInterrupt), turn:
        pass
    turn._lock = lock
    others = []

    def other() -> None:
        with turn:
            others.append(True)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert others == [True]


def test_a_join_that_fails_leaves_no_descriptor(shop, monkeypatch):
    first = shop.open()

    def no_pair(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "socketpair", no_pair)
    own = Path("/proc/self/fd")
    before = len(list(own.iterdir()))
    for _ in range(3):
        with pytest.raises(StorageError):
            shop.open()
    assert len(list(own.iterdir())) == before
    first.close()
