"""What a guard's finding does with an open model, and what it does not."""

from __future__ import annotations

import datetime
import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest

from hwlicense import loaded
from hwlicense.core.documents import Grant, PackageReference
from hwlicense.core.errors import HwlicenseError, Reason, RefusedError, StorageError
from hwlicense.core.process import Application, File, Guard
from hwlicense.device import guarding
from hwlicense.device.guarding import Watch, admit
from hwlicense.device.memory import Memory, protection
from tests.packages import in_child, opened, pack
from tests.refusals import until

MEMBERS = {"weights": b"w" * 5000}
FOUND = RefusedError(Reason.GUARD, "Found.", "Start it without.")


@pytest.fixture(scope="module")
def made(vendor, tmp_path_factory):
    return pack(vendor, tmp_path_factory.mktemp("guarded"), MEMBERS)


@pytest.fixture
def model(vendor, made):
    with opened(vendor, made[0], made[1]) as model:
        yield model
    gc.collect()


def grant(guard: Guard | None = None, application: Application | None = None) -> Grant:
    package = PackageReference("a", "1", "33" * 16)
    day = datetime.date(2030, 1, 1)
    return Grant(
        "11" * 16, 1, "22" * 32, "A", "P", 1, [package], day, None, None, [], guard=guard, application=application
    )  # fmt: skip


GUARD = Guard(["tracing"], 1)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hwlicense guard"]


def watched(model, guard=GUARD):
    model._watch = Watch(grant(guard), guard)  # which lives as long
    model._watch.guard(model)


def test_an_ended_model_gets_no_keys_from_its_hardware(model):
    """Presence opens anew when hardware comes back: not what the guard has ended."""
    held = model.read("weights")
    model.end(FOUND)
    keys = Memory(32)
    keys.view[:] = b"k" * 32
    model.regain_keys(keys)
    assert not any(bytes(keys.view))
    assert not any(model._keys.memory.view)
    with pytest.raises(RefusedError, match="Found"):
        model.reopen(None, ask=False)
    model.lose_keys(StorageError(Reason.STORAGE, "Later."))  # does not hide what was found
    with pytest.raises(RefusedError, match="Found") as refused:
        model.read("weights")
    assert (refused.value.reason, refused.value.hint) == (Reason.GUARD, "Start it without.")
    assert model.standing().reason == Reason.GUARD
    assert bytes(held) == MEMBERS["weights"]


def test_the_watch_ends_with_its_model(vendor, made):
    before = len(threads())
    with opened(vendor, made[0], made[1]) as one:
        watched(one)
        assert len(threads()) == before + 1
        alive = weakref.ref(one)
    until(lambda: len(threads()) == before, 5)
    del one
    gc.collect()
    assert alive() is None
    with opened(vendor, made[0], made[1]) as one:
        watched(one, Guard(["tracing"], 3600))
    del one
    gc.collect()
    until(lambda: len(threads()) == before, 5)
    assert protection().held == 0


def test_who_cannot_look_refuses(model, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(guarding, "findings", broken)
    watched(model)
    until(lambda: model.locked, 5)
    with pytest.raises(RefusedError, match=r"could not look at the process \(ZeroDivisionError\)"):
        model.read("weights")


def test_no_thread_no_opening(model, monkeypatch):
    def none(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    with pytest.raises(StorageError, match="no further thread"):
        watched(model)


def test_a_child_that_gets_no_thread_loses_its_keys(model, monkeypatch):
    watched(model)

    def none(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)

    def child() -> None:
        with pytest.raises(StorageError, match="no further thread"):
            model.read("weights")

    in_child(child)
    assert bytes(model.read("weights")) == MEMBERS["weights"]


def test_no_process_file_system_no_opening(monkeypatch):
    def hidden(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(loaded, "everything", hidden)
    with pytest.raises(HwlicenseError, match="cannot be looked at") as refused:
        admit(grant(application=Application([File("a", bytes(32))])))
    assert refused.value.reason == Reason.APPLICATION_CHANGED
    admit(grant())


def test_what_is_mapped_from_the_package_itself_is_its_own(tmp_path):
    """A native library out of a package lies in sealed memory; one from other memory is another's."""
    (tmp_path / "a.c").write_text("int a;")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "a.so", tmp_path / "a.c"], check=True)
    code = """
import ctypes, os, sys
from hwlicense import loaded
from hwlicense.device.memory import SealedFile, sealed_inodes
raw = open(sys.argv[1], "rb").read()
own = SealedFile(len(raw), lambda view: view.__setitem__(slice(None), raw))
ctypes.CDLL(own.path)
print([one.name for one in loaded.everything(sealed_inodes()) if "memfd" in one.name])
other = os.memfd_create("other"); os.write(other, raw)
ctypes.CDLL(f"/proc/self/fd/{other}")
print([one.name for one in loaded.everything(sealed_inodes()) if "memfd" in one.name])
"""
    said = subprocess.check_output([sys.executable, "-c", code, tmp_path / "a.so"], text=True)
    assert said == "[]\n['/memfd:other']\n"


def test_looking_is_quick(model):
    guarding._refusal(grant(Guard(["debugger", "tracing", "preloaded", "replaced"], 1)), (model,), anew=False)
    began = time.perf_counter()
    guarding._refusal(grant(Guard(["debugger", "tracing", "preloaded", "replaced"], 1)), (model,), anew=False)
    assert time.perf_counter() - began < 1


def test_nothing_of_this_package_counts_as_replaced_where_nothing_was():
    """Whatever of it is imported, optional hardware and the vendor's side too."""
    code = """
import importlib, pkgutil, hwlicense
for part in ("core", "binders", "device", "vendor"):
    package = importlib.import_module(f"hwlicense.{part}")
    for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}."): importlib.import_module(each.name)
from hwlicense.device.own_code import replaced
print(list(replaced()))
"""
    for options in ([], ["-OO"]):
        said = subprocess.check_output([sys.executable, *options, "-c", code], text=True)
        assert said == "[]\n"
