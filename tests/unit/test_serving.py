"""The private socket of a program, over a model that answers as it is told to."""

import os
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from hwlicense.core.errors import ExceededError, Reason, RefusedError
from hwlicense.device import serving
from hwlicense.device.serving import Server
from hwlicense.device.starting import Session, Standing, check_count


class FakeModel:
    def __init__(self):
        self.spent, self.sessions, self.refusal, self.continuity = [], 0, None, 8
        self.gate = threading.Event()
        self.gate.set()

    def spend(self, count):
        check_count(count)
        self.gate.wait(10)
        if self.refusal:
            raise self.refusal
        self.spent.append(count)

    def standing(self, horizon, inferences):
        del horizon, inferences
        return Standing(self.refusal, present=True, grace_left=0.0)

    @contextmanager
    def session(self, inferences):
        if self.refusal:
            raise self.refusal
        self.sessions += 1
        try:
            yield Session(self.continuity, inferences)
        finally:
            self.sessions -= 1


class Client:
    def __init__(self, end):
        self.end = end
        self.end.settimeout(5)
        self.lines = end.makefile("r")

    def ask(self, line):
        self.end.sendall(f"{line}\n".encode())
        return self.lines.readline().rstrip("\n")

    def gone(self):
        try:
            return self.end.recv(1000) in {b"", b"no USAGE -\n"} and self.end.recv(1) == b""
        except ConnectionResetError:
            return True


@pytest.fixture
def served():
    model = FakeModel()
    server = Server(model)  # type: ignore[arg-type]
    clients = []

    def client(end=None):
        clients.append(Client(end or server.connect()))
        return clients[-1]

    yield SimpleNamespace(model=model, server=server, client=client)
    model.gate.set()
    server.close()
    for each in clients:
        each.lines.close()
        each.end.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "hwlicense socket"]
    assert not model.sessions


def until(true, seconds=5.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def hand_in(client, *numbers, line=b"connect\n"):
    socket.send_fds(client.end, [line], numbers)


def test_what_the_protocol_says(served):
    client = served.client()
    assert client.ask("spend 1") == "ok"
    assert client.ask("spend 0") == "no USAGE -"
    assert client.ask("standing 3600 5") == "ok"
    assert client.ask("standing 0.25 0") == "ok"
    assert client.ask("end") == "no USAGE -"
    assert client.ask("session 5") == "ok"
    assert served.server.session_under_way()
    assert client.ask("session 5") == "no USAGE -"
    assert client.ask("spend 3") == "ok"
    assert client.ask("end") == "ok"
    assert not served.server.session_under_way()
    served.model.refusal = ExceededError(Reason.RATE_EXCEEDED, "Wait.", "Wait.", 59.12345)
    assert client.ask("spend 2") == "no RATE_EXCEEDED 59.124"
    assert client.ask("standing 1 1") == "no RATE_EXCEEDED 59.124"
    served.model.refusal = RefusedError(Reason.LICENSE_EXPIRED, "Over.", "Ask.")
    assert client.ask("session 0") == "no LICENSE_EXPIRED -"
    served.model.refusal = ValueError("a fault of our own")
    assert client.ask("spend 1") == "no INTERNAL -"
    assert served.model.spent == [1, 3]


def test_lines_in_pieces_and_many_at_once(served):
    client = served.client()
    for byte in b"spend 12\n":
        client.end.sendall(bytes([byte]))
    assert client.lines.readline() == "ok\n"
    client.end.sendall(b"spend 1\n" * 100 + b"spend")
    assert [client.lines.readline() for _ in range(100)] == ["ok\n"] * 100
    client.end.sendall(b" 7\n")
    assert client.lines.readline() == "ok\n"
    assert served.model.spent == [12, *[1] * 100, 7]


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"spend\n",
        b"spend -1\n",
        b"spend 1 \n",
        b"spend  1\n",
        b"spend 1\r\n",
        b"spend 1.5\n",
        b"spend 12345678901\n",
        "spend \N{ARABIC-INDIC DIGIT ONE}\n".encode(),
        b"standing nan 1\n",
        b"standing 1e9 1\n",
        b"standing inf 1\n",
        b"SPEND 1\n",
        b"ok\n",
        b"\0\xff\n",
        b"x" * 128,
        b"spend " + b"1" * 100_000,
    ],
)
def test_what_is_no_line_ends_the_connection_and_no_other(served, line):
    client, other = served.client(), served.client()
    try:
        client.end.sendall(line)
        assert client.lines.readline() in ("no USAGE -\n", "")
    except (ConnectionResetError, BrokenPipeError):
        pass
    assert client.gone()
    assert served.model.spent == []
    assert other.ask("spend 1") == "ok"


def test_a_connection_of_ones_own(served):
    client = served.client()
    mine, theirs = socket.socketpair()
    hand_in(client, theirs.fileno())
    theirs.close()
    own = served.client(mine)
    assert own.ask("session 3") == "ok"
    assert client.ask("session 0") == "ok"
    own.end.shutdown(socket.SHUT_WR)  # half closed
    until(lambda: served.model.sessions == 1)
    assert own.gone()
    assert client.ask("end") == "ok"


def test_a_client_that_is_gone_or_killed_ends_its_session(served):
    client = served.client()
    assert client.ask("session 3") == "ok"
    client.lines.close()
    client.end.close()
    until(lambda: not served.model.sessions)
    assert not served.server.session_under_way()


def test_a_session_is_kept_no_longer_than_the_license_says(served):
    served.model.continuity = 0.2
    client = served.client()
    assert client.ask("session 3") == "ok"
    assert served.server.session_under_way()
    until(lambda: not served.server.session_under_way())
    served.model.continuity = None
    assert client.ask("end") == "ok"
    assert client.ask("session 3") == "ok"
    assert served.server.session_under_way()


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_what_is_handed_in_and_is_no_connection(served, tmp_path):
    client = served.client()
    before = open_descriptors()
    (tmp_path / "file").write_text("spend 1\n")
    with (
        (tmp_path / "file").open() as file,
        socket.socket(socket.AF_INET) as internet,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX) as unconnected,
    ):
        for given in (file, internet, datagrams, unconnected):
            hand_in(client, given.fileno())
        hand_in(client, *[file.fileno()] * 200)  # more than there is room for
        assert client.ask("spend 1") == "ok"
    until(lambda: open_descriptors() == before)
    assert served.model.spent == [1]


def test_both_ends_of_one_connection_do_not_answer_each_other(served):
    client = served.client()
    one, other = socket.socketpair()
    one.sendall(b"spend 1\n")
    hand_in(client, one.fileno())
    hand_in(client, other.fileno())
    one.close()
    other.close()
    hand_in(client, client.end.fileno(), line=b"spend 2\n")  # and its own end
    time.sleep(0.2)
    spent = len(served.model.spent)
    time.sleep(0.2)
    assert len(served.model.spent) == spent <= 2
    assert served.client().ask("spend 1") == "ok"


def test_a_flood_that_reads_no_answer_keeps_nobody_else_waiting(served):
    flooding = served.client()
    flooding.end.settimeout(0.2)
    with pytest.raises(TimeoutError):
        flooding.end.sendall(b"spend 1\n" * 1_000_000)
    client = served.client()
    began = time.monotonic()
    assert [client.ask("spend 2") for _ in range(20)] == ["ok"] * 20
    assert time.monotonic() - began < 2


def test_an_answer_that_takes_long_keeps_nobody_else_waiting(served):
    waiting, client = served.client(), served.client()
    served.model.gate.clear()
    waiting.end.sendall(b"spend 1\n")
    assert [client.ask("standing 1 1") for _ in range(20)] == ["ok"] * 20


def test_too_many_connections(served, monkeypatch):
    monkeypatch.setattr(serving, "CONNECTIONS", 3)
    first, *_ = clients = [served.client() for _ in range(3)]
    assert served.client().gone()
    mine, theirs = socket.socketpair()
    hand_in(first, theirs.fileno())
    theirs.close()
    assert served.client(mine).gone()
    clients[1].end.shutdown(socket.SHUT_RDWR)
    until(lambda: len(served.server._connections) == 2)
    assert served.client().ask("spend 1") == "ok"
    assert first.ask("spend 1") == "ok"


def test_no_thread_left(served, monkeypatch):
    def none(_self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none)
        client = served.client()
    assert client.gone()
    assert served.client().ask("spend 1") == "ok"


def test_no_connection_after_the_end(served):
    client = served.client()
    assert client.ask("session 1") == "ok"
    served.server.close()
    assert client.gone()
    assert served.client().gone()


def test_a_handed_in_descriptor_is_not_passed_on_to_programs(served):
    client = served.client()
    mine, theirs = socket.socketpair()
    hand_in(client, theirs.fileno())
    theirs.close()
    assert served.client(mine).ask("spend 1") == "ok"
    for entry in Path("/proc/self/fd").iterdir():
        try:
            socket_ = str(entry.readlink()).startswith("socket:")
        except FileNotFoundError:
            continue
        assert not (socket_ and os.get_inheritable(int(entry.name)))


def test_a_fault_of_our_own_ends_one_connection_and_is_told(served, monkeypatch):
    other = served.client()
    monkeypatch.setattr(serving._Connection, "_answer_lines", lambda _self: 1 // 0)
    assert served.client().gone()
    monkeypatch.undo()
    assert other.ask("spend 1") == "ok"
    until(lambda: served.server.fault)
    assert served.server.fault.reason == "INTERNAL"
    assert "ZeroDivisionError at " in served.server.fault.what


def test_a_fault_of_our_own_in_an_answer_is_told(served):
    client = served.client()
    served.model.refusal = ValueError("what must not show")
    assert client.ask("spend 1") == "no INTERNAL -"
    client.end.shutdown(socket.SHUT_RDWR)
    until(lambda: served.server.fault)
    assert "ValueError at test_serving.py" in served.server.fault.what
    assert "must not show" not in served.server.fault.what
