"""How many instances run at once: places that the kernel gives back, however a process dies."""

from __future__ import annotations

import os
import random
import re
import signal
import time

import pytest

from hwlicense.core.errors import DamagedError, ExceededError, Reason
from hwlicense.device import instances, locking
from hwlicense.device.instances import Instance, running
from tests.world import TERMS, licensed

LIMIT = 3


def test_one_more_than_allowed_is_refused_until_one_ends(tmp_path):
    instances = [Instance(tmp_path, LIMIT) for _ in range(LIMIT)]
    assert running(tmp_path, LIMIT) == LIMIT
    with pytest.raises(ExceededError) as error:
        Instance(tmp_path, LIMIT)
    assert error.value.reason == Reason.INSTANCES_EXCEEDED
    assert error.value.hint
    instances.pop().close()
    Instance(tmp_path, LIMIT).close()
    for instance in instances:
        instance.close()
    assert running(tmp_path, LIMIT) == 0


def test_who_holds_the_places_is_named(tmp_path, monkeypatch):
    waiting, ready = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        instance = Instance(tmp_path, 2)
        os.write(ready[1], b"!")
        os.read(waiting[0], 1)
        instance.close()
        os._exit(0)
    os.read(ready[0], 1)
    mine = Instance(tmp_path, 2)
    try:
        with pytest.raises(ExceededError, match="They are held by process ") as error:
            Instance(tmp_path, 2)
        for each in (pid, os.getpid()):
            assert re.search(rf"process {each} \(.+?\)[,.]", error.value.what)
        monkeypatch.setattr(locking, "LOCKS", tmp_path / "absent")  # as where /proc is hidden
        with pytest.raises(ExceededError, match=r"so many are running\.$"):
            Instance(tmp_path, 2)
        monkeypatch.setattr(locking, "LOCKS", tmp_path / "odd")
        (tmp_path / "odd").write_bytes(
            b"\n1: FLOCK\n2: FLOCK  ADVISORY  WRITE x 1:2:3 0 EOF\n\xff: -> FLOCK a b 0 zz:1:1 0 0\n"
        )
        with pytest.raises(ExceededError, match=r"so many are running\.$"):
            Instance(tmp_path, 2)
    finally:
        mine.close()
        os.write(waiting[1], b"!")
        os.waitpid(pid, 0)


def test_a_holder_that_ended_and_left_children_is_said_to(tmp_path):
    waiting, ready = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        kept = Instance(tmp_path, 1)
        child = os.fork()
        if not child:
            os.write(ready[1], b"!")
            os.read(waiting[0], 1)
        os._exit(kept is None)
    os.waitpid(pid, 0)
    os.read(ready[0], 1)
    try:
        with pytest.raises(ExceededError, match=rf"held by children of process {pid}, which has ended\."):
            Instance(tmp_path, 1)
    finally:
        os.write(waiting[1], b"!")


def test_a_forked_process_keeps_the_place(tmp_path):
    instance = Instance(tmp_path, 1)
    ends = os.pipe()
    pid = os.fork()
    if not pid:
        os.read(ends[0], 1)
        os._exit(0)
    instance.close()
    try:
        with pytest.raises(ExceededError):
            Instance(tmp_path, 1)
    finally:
        os.write(ends[1], b"!")
        os.waitpid(pid, 0)
    Instance(tmp_path, 1).close()


def test_a_place_that_was_removed_from_under_an_instance_is_noticed(tmp_path):
    instance = Instance(tmp_path, 1)
    instance.check()
    (tmp_path / "instances" / "0").unlink()
    with pytest.raises(DamagedError):
        instance.check()
    other = Instance(tmp_path, 1)  # which makes another file
    with pytest.raises(DamagedError):
        instance.check()
    other.check()


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "instances").mkdir()
    (tmp_path / "elsewhere").touch()
    (tmp_path / "instances" / "0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Exception, match="instances/0"):
        Instance(tmp_path, 1)


ALONE = TERMS + "[limits]\ninstances = 1\n"
"""A license that keeps no account, so that nothing but the model itself holds the place."""


def test_closing_gives_the_place_back_without_an_account(vendor, device):
    licensed(vendor, device, ALONE)
    for _ in range(3):
        with device.open(vendor) as model:
            assert model.standing()
            with pytest.raises(ExceededError):
                device.open(vendor)
    model = device.open(vendor)
    del model  # nobody closed it
    device.open(vendor).close()


def test_a_fork_that_closes_leaves_the_place_to_its_parent(vendor, device):
    licensed(vendor, device, ALONE)
    with device.open(vendor) as model:
        pid = os.fork()
        if not pid:
            model.close()
            os._exit(0)
        os.waitpid(pid, 0)
        with pytest.raises(ExceededError):
            device.open(vendor)
        model.spend()


def test_a_removed_place_is_noticed_without_an_account(vendor, device, monkeypatch):
    licensed(vendor, device, ALONE)
    monkeypatch.setattr(instances, "PERIOD", 0.0)
    with device.open(vendor) as model:
        model.spend()
        (place,) = device.home.state.glob("licenses/*/use-1/instances/0")
        place.unlink()
        with device.open(vendor) as other:  # as it can take what seems free
            other.spend()
            for refused in (model.spend, model.session().__enter__):
                with pytest.raises(DamagedError, match="was removed") as error:
                    refused()
                assert error.value.reason == Reason.HOME_DAMAGED
            assert model.standing().reason == Reason.HOME_DAMAGED
            assert other.standing()


def test_a_place_is_looked_at_seldom(tmp_path, monkeypatch):
    looked = []
    instance = Instance(tmp_path, 1)
    monkeypatch.setattr(instance, "check", lambda: looked.append(1))
    for _ in range(1000):
        assert instance.refusal() is None
    assert len(looked) <= 2
    instance.close()
    assert instance.refusal() is None


def test_processes_that_come_and_die_never_hold_more(tmp_path):
    """Each that holds a place says so in a pipe while it does."""
    chance, ends, children = random.Random(7), os.pipe(), dict[int, bool]()
    os.set_blocking(ends[0], False)
    end, worst, held = time.monotonic() + 5, 0, 0
    while time.monotonic() < end:
        while len(children) < 12:
            pid = os.fork()
            if not pid:
                try:
                    instance = Instance(tmp_path, LIMIT)
                    assert instance is not None
                    os.write(ends[1], os.getpid().to_bytes(8, "little"))
                    time.sleep(5)
                finally:
                    os._exit(0)
            children[pid] = False
        time.sleep(0.005)
        try:
            raw = os.read(ends[0], 1 << 12)
        except BlockingIOError:
            raw = b""
        for at in range(0, len(raw), 8):
            children[int.from_bytes(raw[at : at + 8], "little")] = True
            held += 1
        worst = max(worst, sum(children.values()))
        for pid in list(children):
            if children[pid] and chance.random() < 0.2:
                os.kill(pid, signal.SIGKILL)
                children[pid] = False  # it holds nothing from here on
            if os.waitpid(pid, os.WNOHANG)[0]:
                del children[pid]
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert held > 10
    assert worst <= LIMIT
    assert running(tmp_path, LIMIT) == 0
