"""Many workers over one opening: one decrypted copy, one account, and a death that hurts nobody."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from typing import Any

import numpy
import onnx
import pytest

import hwlicense
from tests.world import TERMS, licensed

SIZE = 48 << 20
WORKERS = 8
LIMIT = 5000
OPENED = """
import json, mmap, os, signal, socket, subprocess, sys, time, zlib
import hwlicense
WORKERS = int(sys.argv[4])
def shared_out():
    "This process's part of the memory that it has mapped, in bytes: a page that N processes share counts 1/N."
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
"""
FORKED = (
    OPENED
    + """
mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
before = shared_out()
with hwlicense.open(sys.argv[1], vendor=sys.argv[2], home=sys.argv[3]) as model:
    weights = model.read("weights")
    pids, go, end, first = [], os.pipe(), os.pipe(), os.pipe()
    for number in range(WORKERS):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        os.close(go[1])
        said = {"pid": os.getpid(), "digest": zlib.crc32(weights), "spent": 0}
        theirs.send(json.dumps(said).encode())  # each has touched all of it
        os.read(go[0], 1)
        said["pss"] = shared_out()
        theirs.send(json.dumps(said).encode())
        os.read(end[0], 1)
        if number:  # however quick they are, the first one spends some
            os.read(first[0], 1)
        while True:
            try:
                model.spend()
                said["spent"] += 1
                if number == 0 and said["spent"] == 10:
                    os.write(first[1], b"1" * WORKERS)
                    if sys.argv[5]:
                        said["killed"] = True
                        theirs.send(json.dumps(said).encode())
                        os.kill(os.getpid(), signal.SIGKILL)
            except hwlicense.HwlicenseError as error:
                said["reason"] = error.reason
                if error.reason != "LEASE_PENDING":  # on a busy machine
                    break
                time.sleep(0.01)
        said["digest"] = zlib.crc32(weights)  # what is lent is whole, whoever died
        theirs.send(json.dumps(said).encode())
        os._exit(0)
    hear = lambda: [json.loads(mine.recv(1000)) for _ in pids]
    read = hear()
    os.write(go[1], b"1" * WORKERS)
    held = hear()
    total = sum(one["pss"] for one in held) + shared_out()
    os.write(end[1], b"1" * WORKERS)
    ended = hear()
    for pid in pids:
        os.waitpid(pid, 0)
    print(json.dumps({"read": read, "total": total, "before": before, "ended": ended, "own": zlib.crc32(weights)}))
"""
)
SESSIONS = (
    OPENED
    + """
import numpy, onnxruntime
from hwlicense.integrations import metered
from hwlicense.integrations.onnxruntime import session
def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))
mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
with hwlicense.open(sys.argv[1], vendor=sys.argv[2], home=sys.argv[3]) as model:
    network = session(model, sys.argv[5], sess_options=options)
    run = metered(network.run, model, wait=5.0)
    given = {"x": numpy.ones((1, 1 << 10), "f4")}
    expected = network.run(None, given)[0]
    pids, end = [], os.pipe()
    for _ in range(WORKERS):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        signal.alarm(60)
        os.close(end[1])
        right = all((run(None, given)[0] == expected).all() for _ in range(20))
        theirs.send(json.dumps([right, private()]).encode())
        os.read(end[0], 1)
        sys.exit(0)  # ends as a worker does, with all that is done at the end of an interpreter
    said = [json.loads(mine.recv(1000)) for _ in pids]
    os.close(end[1])
    ended = [os.waitpid(pid, 0)[1] for pid in pids]
    print(json.dumps({"said": said, "ended": ended, "own": private()}))
"""
)
HANDED = (
    OPENED
    + """
WORKER = \"\"\"
import json, mmap, os, sys, zlib
descriptor = int(sys.argv[1])
with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as weights:
    digest = zlib.crc32(weights)
    print(json.dumps(digest), flush=True)
    sys.stdin.readline()
    lines = open("/proc/self/smaps").read().split("VmFlags")
    part = sum(int(line.split()[1]) << 10 for one in lines if "memfd:hwlicense" in one for line in one.splitlines()
               if line.startswith("Pss:"))
    try:
        os.pwrite(descriptor, b"x", 0)
    except PermissionError:
        print(json.dumps([part, zlib.crc32(weights)]), flush=True)
    sys.stdin.readline()
\"\"\"
with hwlicense.open(sys.argv[1], vendor=sys.argv[2], home=sys.argv[3]) as model:
    descriptor = int(model.path("weights").rpartition("/")[2])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "pass_fds": [descriptor]}
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(descriptor)], **pipes) for _ in range(WORKERS)]
    read = [json.loads(one.stdout.readline()) for one in workers]
    workers.pop().kill()
    for one in workers:
        print("", file=one.stdin, flush=True)
    held = [json.loads(one.stdout.readline()) for one in workers]
    own = open(model.path("weights"), "rb").read()
for one in workers:
    one.communicate("\\n")
print(json.dumps({"read": read, "held": held, "own": zlib.crc32(own)}))
"""
)


@pytest.fixture
def start(own_vendor, device, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    (files / "weights").write_bytes(random.Random(0).randbytes(SIZE))
    network = multiplying(numpy.random.default_rng(1).random((1 << 10, 8 << 10), dtype="f4"))
    onnx.save(network, files / "whole.onnx")
    onnx.save(network, files / "apart.onnx", save_as_external_data=True, location="apart.weights")
    own_vendor.package = tmp_path / "large.hwpkg"
    own_vendor.manifest = own_vendor.pack(own_vendor.package, files)
    licensed(own_vendor, device, f"{TERMS}[limits]\ninferences = {LIMIT}\n")

    def start(script: str, *given: str) -> dict[str, Any]:
        words = [sys.executable, "-c", script, own_vendor.package, own_vendor.text, device.home.path, WORKERS, *given]
        environment = os.environ | device.tpm.environment
        done = subprocess.run([*map(str, words)], check=True, env=environment, stdout=subprocess.PIPE, timeout=120)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return start


@pytest.mark.parametrize("killed", ["", "one is killed"])
def test_forked_workers_share_one_copy_and_one_account(start, killed):
    found = start(FORKED, killed)
    right = {found["own"]}
    assert {one["digest"] for one in found["read"]} == {one["digest"] for one in found["ended"]} == right
    # Nine processes: what each interpreter has of its own is there without a model too
    assert found["total"] - found["before"] < 1.1 * SIZE + WORKERS * (6 << 20)
    spent = sum(one["spent"] for one in found["ended"])
    reasons = {one.get("reason") for one in found["ended"] if "killed" not in one}
    assert reasons == {"INFERENCES_EXHAUSTED"}
    if killed:  # what it had reserved dies with it
        assert sum("killed" in one for one in found["ended"]) == 1
        assert LIMIT // 2 < spent <= LIMIT
    else:
        assert spent == LIMIT


def multiplying(weights: numpy.ndarray) -> onnx.ModelProto:
    """32 MiB of weights."""
    ends = [
        onnx.helper.make_tensor_value_info(end, 1, [1, size]) for end, size in zip("xy", weights.shape, strict=True)
    ]
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "net", ends[:1], ends[1:], [onnx.numpy_helper.from_array(weights, "w")])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize("network", ["whole.onnx", "apart.onnx"])
def test_forked_workers_share_a_session_of_onnx_runtime(start, network, monkeypatch):
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")
    found = start(SESSIONS, network)
    assert all(right for right, _ in found["said"])
    assert max(private for _, private in found["said"]) < 8 << 20
    assert found["ended"] == [0] * WORKERS


def test_processes_that_are_handed_a_descriptor_share_one_copy(start):
    found = start(HANDED)
    assert set(found["read"]) == {found["own"]}
    assert len(found["held"]) == WORKERS - 1
    assert {digest for _, digest in found["held"]} == {found["own"]}
    assert sum(part for part, _ in found["held"]) <= 1.1 * SIZE


def test_a_program_that_changes_its_folder_keeps_its_account(own_vendor, device, tmp_path, monkeypatch):
    """The home was given from where it was then."""
    licensed(own_vendor, device, TERMS + f"[limits]\ninferences = {LIMIT}\n[require]\nanchor = true\n", counted=True)
    monkeypatch.chdir(device.home.path.parent)
    given = {"vendor": own_vendor.text, "home": device.home.path.name, "tpm": device.tpm.tcti}
    left = []
    for _ in range(2):
        with hwlicense.open(own_vendor.package, **given) as model:
            (tmp_path / "elsewhere").mkdir(exist_ok=True)
            os.chdir(tmp_path / "elsewhere")
            model.spend(10)
        os.chdir(device.home.path.parent)
        left.append(next(n for n in range(LIMIT, 0, -10) if _left(own_vendor.package, n, given)))
    assert left == [LIMIT - 10, LIMIT - 20]


def _left(package, count, given):
    with hwlicense.open(package, **given) as model:
        return model.standing(inferences=count).may_start
