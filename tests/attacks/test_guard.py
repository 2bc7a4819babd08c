"""Attacks on the process around an open model: what the kernel stops, what the guard finds, and what goes unseen.

Every finding is reported by a license that says nothing of a guard, and refused by one that does. See docs/guard.md.
"""

from __future__ import annotations

import copy
import ctypes
import hmac
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from hwlicense.core.errors import ExceededError, Reason, RefusedError
from hwlicense.core.process import CHECKS
from hwlicense.device import checks, memory
from hwlicense_simulators import Tpm
from tests.forging import another_user
from tests.installed import LATER, OPENING, Installation, Sold, shared_library
from tests.world import MEMBERS

ALL = '[guard]\nrefuse = "all"\ninterval = "1s"\n'
AUDIT = "unsigned la_version(unsigned version) { return version; }"
EMPTY = "int nothing_here;"
FAKE_CIPHER = """
import hwlicense.core.package as package
class AESGCM(package.AESGCM if False else object):
    def __init__(self, key): self.real, self.key = real(key), bytes(key)
    def __getattr__(self, name): return getattr(self.real, name)
real, package.AESGCM = package.AESGCM, AESGCM
"""
SPYING_METHOD = """
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
real = AESGCM.decrypt_into
def decrypt_into(self, *arguments): return real(self, *arguments)
AESGCM.decrypt_into = decrypt_into
"""
REPLACED_OUTPUT = """
from hwlicense.device.model import Model
read = Model.read
def spy(self, name): return read(self, name)
Model.read = spy
"""
BORROWED_CODE = """
from hwlicense.core import keys
def other(*arguments): return real(*arguments)
real = type(other)(keys.unwrap_content_key.__code__, vars(keys))
keys.unwrap_content_key.__code__ = other.__code__
keys.real = real
"""


FAKE_CLASS = """
import hwlicense.device.{at} as place
place.SealedFile = type("SealedFile", (place.SealedFile,), {{}})
"""
FAKE_FACTORY = """
import hwlicense.device.memory as memory
real = memory.SealedFile
memory.SealedFile = lambda *arguments: real(*arguments)
"""
FAKE_MODULE = """
import types, {module} as place
place.{name} = types.SimpleNamespace(**vars(place.{name}))
"""
FAKE_LOADER = """
import hwlicense.core.keys as keys
code = keys.__spec__.loader.get_code(keys.__name__)
keys.__spec__.loader = type("Loader", (), {"get_code": lambda self, name: code})()
"""
FAKE_IN_PLACE = """
import sys, types, hwlicense.core.keys as keys
sys.modules[keys.__name__] = types.SimpleNamespace(**{k: v for k, v in vars(keys).items() if k != "__spec__"})
"""
TRACED_ELSEWHERE = """
import threading
def work():
    sys.settrace(trace := lambda *_: trace)
    (lambda: time.sleep(10))()
threading.Thread(target=work, daemon=True).start()
"""
BESIDE = "import threading; threading.Thread(target=time.sleep, args=(30,), daemon=True).start()"
WALL = 0x40000000  # __WALL, waitpid(2): threads of others as well
DUMPABLE_AGAIN = """
import copy
import ctypes
held = model.read("weights.bin")  # while it is held, reading it makes no new memory, which would forbid dumps again
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
"""


@pytest.fixture(scope="module")
def installation(tmp_path_factory):
    return Installation(tmp_path_factory.mktemp("device"))


@pytest.fixture(scope="module")
def sold(tmp_path_factory, vendor):
    with Tpm() as tpm:
        yield Sold(tmp_path_factory.mktemp("sold"), vendor, tpm)


@pytest.fixture(scope="module")
def reporting(sold):
    return sold.license()


@pytest.fixture(scope="module")
def refusing(sold):
    return sold.license(ALL)


# ---- at opening --------------------------------------------------------------------------------------------


def both(installation, reporting, refusing, code, **how):
    """What is said under a license that reports, and under one that refuses."""
    said = installation.run(code + OPENING, *reporting, **how)
    assert said.stdout.startswith("open\n"), said.stdout + said.stderr
    refused = installation.run(code + OPENING, *refusing, **how)
    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert refused.stdout.startswith("GUARD ")
    return said.stdout, refused.stdout


def test_an_application_as_it_is_installed_has_no_findings(installation, reporting, refusing):
    for given in (reporting, refusing):
        said = installation.run(OPENING, *given)
        assert (said.stdout, said.stderr) == ("open\n", "")


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import sys; sys.settrace(lambda *_: None)", "tracing: sys.settrace has"),
        ("import sys; sys.setprofile(lambda *_: None)", "tracing: sys.setprofile has"),
        ("import threading; threading.settrace(lambda *_: None)", "tracing: threading.settrace has"),
        ("import threading; threading.setprofile(lambda *_: None)", "tracing: threading.setprofile has"),
        (FAKE_CIPHER, "replaced: hwlicense.core.package.AESGCM"),
        (SPYING_METHOD, "replaced: cryptography.hazmat.bindings._rust.openssl.aead.AESGCM"),
        (REPLACED_OUTPUT, "replaced: hwlicense.device.model.Model.read"),
        (BORROWED_CODE, "replaced: hwlicense.core.keys.unwrap_content_key"),
        (FAKE_CLASS.format(at="model"), "replaced: hwlicense.device.model.SealedFile"),
        (FAKE_CLASS.format(at="memory"), "replaced: hwlicense.device.memory.SealedFile.__init__"),
        (FAKE_FACTORY, "replaced: hwlicense.device.memory.SealedFile.__init__"),
        ("import hmac; hmac.compare_digest = lambda *_: True", "replaced: hmac.compare_digest"),
        ("import hmac, operator; hmac.compare_digest = operator.is_not", "replaced: hmac.compare_digest"),
        ("import hmac; real = hmac.digest; hmac.digest = lambda *given: real(*given)", "replaced: hmac.digest"),
        (FAKE_MODULE.format(module="hwlicense.core.package", name="hmac"), "replaced: hwlicense.core.package.hmac"),
        (FAKE_MODULE.format(module="hwlicense.device.reading", name="package"), "hwlicense.device.reading.package"),
        (FAKE_IN_PLACE, "replaced: hwlicense.core.keys, whose code cannot be found"),
        (FAKE_LOADER, "replaced: hwlicense.core.keys, whose code cannot be found"),
    ],
)
def test_what_python_can_do_is_found(installation, reporting, refusing, code, found):
    for said in both(installation, reporting, refusing, code):
        assert found in said


@pytest.mark.parametrize(
    ("name", "library", "found"),
    [("LD_PRELOAD", EMPTY, "preloaded: LD_PRELOAD names {}"), ("LD_AUDIT", AUDIT, "preloaded: LD_AUDIT names {}")],
)
def test_preloaded_libraries(installation, reporting, refusing, tmp_path, name, library, found):
    path = shared_library(tmp_path, "spy", library)
    for said in both(installation, reporting, refusing, "", **{name: str(path)}):
        assert found.format(path) in said
        assert "not loaded" not in said


def test_a_preloaded_library_that_takes_its_variable_back(installation, reporting, refusing, tmp_path):
    code = '#include <stdlib.h>\n__attribute__((constructor)) void go(void) { unsetenv("LD_PRELOAD"); }'
    path = shared_library(tmp_path, "spy", code)
    for said in both(installation, reporting, refusing, "", LD_PRELOAD=str(path)):
        assert f"preloaded: LD_PRELOAD names {path}" in said


def test_the_system_wide_preload_file(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "PRELOADED", tmp_path / "ld.so.preload")
    assert checks.findings(["preloaded"]) == []
    (tmp_path / "ld.so.preload").write_text("# nothing\n/lib/one.so:/lib/two.so # three\n")
    assert [one.what for one in checks.findings(["preloaded"])] == [
        f"{tmp_path}/ld.so.preload names /lib/{name}.so, which is not loaded" for name in ("one", "two")
    ]


def test_variables_of_python(installation, reporting, refusing, tmp_path):
    for said in both(installation, reporting, refusing, "", PYTHONPATH=str(tmp_path)):
        assert "environment: PYTHONPATH is set" in said
    # Isolated, as `python -I` is, it has no effect and is no finding; nor are variables that change no code
    isolated = installation.run(OPENING, *refusing, options=("-I",), PYTHONPATH=str(tmp_path))
    assert isolated.stdout == "open\n"
    assert installation.run(OPENING, *refusing, PYTHONUNBUFFERED="1", PYTHONUTF8="1").stdout == "open\n"


@pytest.mark.parametrize("name", ["sitecustomize", "usercustomize"])
def test_site_hooks(installation, reporting, refusing, tmp_path, name):
    if name == "usercustomize":  # which environments of their own do not heed; any import of that name does as well
        (tmp_path / "usercustomize.py").touch()
        code = f"import sys; sys.path.append({str(tmp_path)!r}); import usercustomize"
        for said in both(installation, reporting, refusing, code):
            assert "site: usercustomize was loaded from" in said
    else:
        with installation.laid("sitecustomize.py", "") as path:
            for said in both(installation, reporting, refusing, ""):
                assert f"site: sitecustomize was loaded from {path}" in said


def test_an_optimizing_python(installation, reporting, refusing):
    """As by the variable, which is told once."""
    for how in ({"options": ("-O",)}, {"options": ("-I", "-OO")}):
        for said in both(installation, reporting, refusing, "", **how):
            assert "environment: Python was started with -O" in said
    for said in both(installation, reporting, refusing, "", PYTHONOPTIMIZE="1"):
        assert "environment: PYTHONOPTIMIZE is set" in said
        assert "started with -O" not in said


def test_a_path_file_that_runs_code(installation, reporting, refusing):
    with installation.laid("spy.pth", "import sys; sys.spied = True\n") as path:
        for said in both(installation, reporting, refusing, ""):
            assert f"site: {path} runs code" in said
    with installation.laid("plain.pth", "/nowhere\n"):
        assert installation.run(OPENING, *refusing).stdout == "open\n"


def test_shadowing_modules(installation, reporting, refusing):
    """Beside the program, where Python looks first: a package of this path, and one of the standard library."""
    taken = installation.folder / "msgspec"
    shutil.copytree(installation.packages / "msgspec", taken)
    try:
        for said in both(installation, reporting, refusing, ""):
            assert f"shadowed: msgspec was loaded from {taken}" in said
    finally:
        shutil.rmtree(taken)
    path = installation.write("hmac.py", Path(hmac.__file__).read_text())
    try:
        for said in both(installation, reporting, refusing, ""):
            assert f"shadowed: hmac was loaded from {path}" in said
    finally:
        path.unlink()


def test_another_hwlicense_on_the_path(installation, reporting, refusing, tmp_path):
    """In a folder beside the program, and in an archive on the path; an isolated start takes neither."""
    beside = installation.folder / "hwlicense"
    shutil.copytree(installation.packages / "hwlicense", beside)
    try:
        for said in both(installation, reporting, refusing, ""):
            assert f"shadowed: hwlicense was loaded from {beside}" in said
        assert installation.run(OPENING, *refusing, options=("-I",)).stdout == "open\n"
        archive = shutil.make_archive(str(tmp_path / "other"), "zip", installation.folder, "hwlicense")
    finally:
        shutil.rmtree(beside)
    for said in both(installation, reporting, refusing, f"import sys; sys.path.insert(0, {archive!r})"):
        assert f"shadowed: hwlicense was loaded from {archive}/hwlicense" in said
    assert installation.run(OPENING, *refusing, options=("-I",), PYTHONPATH=archive).stdout == "open\n"


def test_a_path_file_runs_in_an_isolated_start_too(installation, reporting, refusing):
    with installation.laid("spy.pth", "import sys; sys.spied = True\n") as path:
        for said in both(installation, reporting, refusing, "", options=("-I",)):
            assert f"site: {path} runs code" in said


def test_a_debugger_that_starts_the_application(installation, reporting, refusing, tmp_path):
    """The kernel ends a debugger's rights where the process becomes undumpable, for all but root's debuggers."""
    script = installation.write("app.py", OPENING)
    for given in (reporting, refusing):
        commands = ["-ex", "set debuginfod enabled off", "-ex", "run"]
        traced = subprocess.run(
            ["gdb", "-batch", "-nx", *commands, "--args", installation.python, script, *given],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=tmp_path,
        )
        assert "(gdb) traces this one" in traced.stdout, traced.stdout + traced.stderr
        assert ("GUARD " in traced.stdout) == (given is refusing)


def test_python_that_ends_in_a_prompt(installation, reporting, refusing):
    said = [installation.run(OPENING, *given, options=("-i",)).stdout for given in (reporting, refusing)]
    assert all("environment: Python was started with -i" in each for each in said)
    assert [each[:5] for each in said] == ["open\n", "GUARD"]


# ---- while the model is open -------------------------------------------------------------------------------


def begun(child):
    line = child.stdout.readline()
    assert line == "open\n", line


def ended(child):
    """What the refusal said, and how long it took."""
    began = time.monotonic()
    line = child.stdout.readline()
    assert line.startswith("GUARD "), line
    assert child.wait(30) == 0
    return line, time.monotonic() - began


def attach(process):
    """As any debugger: PTRACE_SEIZE."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    return 0 if libc.ptrace(0x4206, process, None, None) == 0 else ctypes.get_errno()


@pytest.mark.parametrize("whole", [True, False])
def test_a_debugger_that_comes_later_ends_the_use(installation, refusing, whole):
    """Root's: no other comes so far, see below. One that looks at a single thread has the memory of all."""
    code = OPENING + LATER.format(during="" if whole else BESIDE)
    with installation.started(code, *refusing) as child:
        begun(child)
        time.sleep(0.5)
        threads = {int(task.name) for task in Path(f"/proc/{child.pid}/task").iterdir()} - {child.pid}
        thread = child.pid if whole else threads.pop()
        assert attach(thread) == 0
        if not whole:  # who traces it must see to its end, or the process does not end
            threading.Thread(target=os.waitpid, args=(thread, WALL)).start()
        said, took = ended(child)
    assert f"debugger: process {os.getpid()} (" in said
    assert took < 3, "the terms say one second"


@pytest.mark.parametrize(
    ("during", "found"),
    [
        ("import sys; sys.settrace(lambda *_: None)", "tracing: sys.settrace has a function set"),
        ("import sys; sys.setprofile(lambda *_: None)", "tracing: sys.setprofile has a function set"),
        (TRACED_ELSEWHERE, "tracing: a thread is traced"),
        (REPLACED_OUTPUT, "replaced: hwlicense.device.model.Model.read"),
        ("model.size = lambda name: 0", "replaced: Model.size of an open one"),
        (DUMPABLE_AGAIN, "debugger: the process can be traced and dumped"),
    ],
)
def test_what_changes_later_ends_the_use(installation, refusing, during, found):
    done = installation.run(OPENING + LATER.format(during=during), *refusing)
    assert done.returncode == 0, done.stderr
    assert "GUARD " in done.stdout
    assert found in done.stdout


def test_buffers_stay_and_sessions_end_whole(installation, refusing):
    code = """
held = model.read("weights.bin")
with model.session():
    sys.settrace(trace := lambda *_: trace)
    import time
    (lambda: time.sleep(3))()
    print(len(held), bytes(held[:8]), model.locked, model.standing().reason)
    try: model.read("labels/names.txt")
    except hwlicense.RefusedError as error: print(error.reason)
try:
    with model.session(): pass
except hwlicense.RefusedError as error: print(error.reason)
"""
    done = installation.run(OPENING + code, *refusing)
    size = len(MEMBERS["weights.bin"])
    assert done.stdout.splitlines()[1:] == [f"{size} b'a marker' True GUARD", "GUARD", "GUARD"], done.stderr


def test_a_forked_child_is_looked_at_too(installation, refusing):
    code = """
import os
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or bytes(model.read("empty")) != b"")
"""
    done = installation.run(OPENING + code + LATER.format(during=REPLACED_OUTPUT), *refusing)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "replaced: hwlicense.device.model.Model.read" in done.stdout


def test_the_thread_is_there_for_those_terms_alone(installation, reporting, refusing):
    code = "import threading; print([t.name for t in threading.enumerate()][1:]); model.close()\n"
    code += "import time; time.sleep(1.5); print(threading.active_count())"
    for given, named in ((reporting, "[]"), (refusing, "['hwlicense guard']")):
        assert installation.run(OPENING + code, *given).stdout.split("\n")[1:3] == [named, "1"]


# ---- what cannot be staged here ------------------------------------------------------------------------------


def test_unlocked_memory_while_the_system_swaps(monkeypatch):
    held = memory.Protection(held=4096, locked=96, dumpable=False, secret=0, swap=True, huge_pages="")
    monkeypatch.setattr(checks, "protection", lambda: held)
    assert checks.findings(["swap"]) == [("swap", "4,000 bytes are not locked, and the system swaps")]
    monkeypatch.setattr(checks, "protection", lambda: held._replace(locked=4096))
    assert checks.findings(["swap"]) == []
    monkeypatch.setattr(checks, "protection", lambda: held._replace(swap=False))
    assert checks.findings(["swap"]) == []


def test_tools_of_sys_monitoring(monkeypatch):
    """Python 3.12 has it; this stands in for it before, where it is looked for in the same place."""
    tools = SimpleNamespace(get_tool={1: "coverage"}.get)
    monkeypatch.setattr(sys, "monitoring", tools, raising=False)
    assert checks.findings(["tracing"]) == [("tracing", "sys.monitoring has the tool 'coverage'")]


def test_a_process_that_cannot_look_at_itself_is_refused(monkeypatch):
    def hidden(_process: int) -> list[object]:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(checks, "mappings", hidden)
    assert "cannot be looked at" in checks.findings(["preloaded"])[0].what


def test_the_names_of_checks():
    assert set(checks._CHECKS) | {"replaced"} == set(CHECKS)


def test_a_refusal_crosses_processes_and_names_a_few(installation, refusing):
    code = (
        "import sys, threading\nfor set in (sys.settrace, sys.setprofile, threading.settrace, threading.setprofile):\n"
    )
    done = installation.run(code + "    set(lambda *_: None)\n" + OPENING, *refusing)
    assert "; and 1 more" in done.stdout
    error = RefusedError(Reason.GUARD, "x", "y")
    error.add_note("one")
    for found in (copy.copy(error), error.again()):
        assert (vars(found), found.exit_status) == (vars(error), 1)
    waiting = ExceededError(Reason.RATE_EXCEEDED, "x", "y", 3.0)
    for found in (copy.copy(waiting), waiting.again()):
        assert (type(found), vars(found)) == (ExceededError, vars(waiting))


# ---- what the kernel stops -----------------------------------------------------------------------------------

VICTIM = """
import ctypes, os, resource, sys, time
from hwlicense.device.memory import Memory, SealedFile
libc = ctypes.CDLL(None)
if len(sys.argv) > 1:
    os.setgroups([]), os.setgid(int(sys.argv[1])), os.setuid(int(sys.argv[1]))
    libc.prctl(4, 1, 0, 0, 0)  # as a process that has been this user's from its start: the change made it undumpable
    libc.prctl(0x59616D61, ctypes.c_long(-1), 0, 0, 0)  # Yama (PR_SET_PTRACER_ANY) is not what keeps others out here
resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
"""
HOLDING = """
keys, plaintext = Memory(4096, secret=True), Memory(4096)
keys.view[:] = plaintext.view[:] = b"a secret of 16 B" * 256
file = SealedFile(4096, lambda view: view.__setitem__(slice(None), plaintext.view[:]))
assert keys.secret
where = keys._address, plaintext._address, file.fd
"""
CARELESS = """
keys, plaintext = (ctypes.create_string_buffer(b"a secret of 16 B" * 256) for _ in range(2))
file = os.memfd_create("careless")
os.write(file, keys.raw)
where = ctypes.addressof(keys), ctypes.addressof(plaintext), file
"""
STAYING = """
print(os.getpid(), *where, flush=True)
time.sleep(60)
"""
ATTACKER = """
import ctypes, os, sys
if len(sys.argv) > 5: os.setgroups([]), os.setgid(int(sys.argv[5])), os.setuid(int(sys.argv[5]))
process, keys, plaintext, fd = map(int, sys.argv[1:5])
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
class Part(ctypes.Structure): _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
def vm(address):
    into = ctypes.create_string_buffer(16)
    own, other = Part(ctypes.addressof(into), 16), Part(address, 16)
    done = libc.process_vm_readv(process, ctypes.byref(own), 1, ctypes.byref(other), 1, 0)
    if done != 16: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return into.raw
def mem(address):
    with open(f"/proc/{process}/mem", "rb", buffering=0) as file:
        file.seek(address)
        return file.read(16)
def attach(_):
    if libc.ptrace(0x4206, process, None, None): raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    libc.ptrace(17, process, None, None)
    return b"a secret of 16 B"
def opened(_):
    with open(f"/proc/{process}/fd/{fd}", "rb") as file: return file.read(16)
for way, address in ((vm, keys), (vm, plaintext), (mem, keys), (mem, plaintext), (attach, 0), (opened, 0)):
    try: print(way(address) == b"a secret of 16 B")
    except OSError as error: print(type(error).__name__)
"""
DENIED = "PermissionError"


@contextmanager
def victim(*user, how=HOLDING, **options):
    """A process that holds something, in this project's memory or in the careless way of the controls."""
    command = [sys.executable, "-c", VICTIM + how + STAYING, *user]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process, process.stdout.readline().split()
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("user", "how", "attacker", "said"),
    [
        (["65534"], HOLDING, ["65533"], [DENIED] * 6),  # another user, whom the kernel keeps out in any case
        (["65534"], HOLDING, ["65534"], [DENIED] * 6),  # the same user, who is not root
        (["65534"], CARELESS, ["65534"], ["True"] * 6),
        # Root reads plaintext and attaches, and does not read keys: the kernel has no way to them
        ([], HOLDING, [], ["OSError", "True", "OSError", "True", "True", "True"]),
        ([], CARELESS, [], ["True"] * 6),
    ],
)
def test_reading_memory_and_descriptors_from_another_process(user, how, attacker, said):
    with victim(*user, how=how) as (_, where):
        command = [sys.executable, "-c", ATTACKER, *where, *attacker]
        assert subprocess.check_output(command, text=True).split() == said


@pytest.mark.parametrize(
    ("user", "how", "let_in"), [("65533", HOLDING, False), ("65534", HOLDING, False), ("65534", CARELESS, True)]
)
def test_a_debugger_of_an_ordinary_user_is_not_let_in(user, how, let_in):
    """gdb attaches as py-spy does: by ptrace and /proc/PID/mem."""
    with victim(user, how=how) as (_, where):
        attach = ["gdb", "-batch", "-nx", "-p", where[0], "-ex", "info threads"]
        done = subprocess.run([*another_user(), *attach], capture_output=True, text=True, check=False)
    assert ("ptrace: Operation not permitted" in done.stderr + done.stdout) != let_in
    assert ("* 1 " in done.stdout) == let_in


DUMPABLE = "libc.prctl(4, 1, 0, 0, 0)\n"
LARGE_CORES = "resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)\n"


@pytest.mark.parametrize(
    ("how", "leaves"),
    [
        (HOLDING, False),
        (HOLDING + LARGE_CORES, False),
        (HOLDING + DUMPABLE, Path("/proc/sys/kernel/core_pattern").read_text().startswith("|")),  # of 0 bytes: core(5)
        (HOLDING + DUMPABLE + LARGE_CORES, True),
        (CARELESS, True),
    ],
)
def test_a_crash_writes_no_core(tmp_path, how, leaves):
    """By either of two defences; without both it does, wherever the system puts it."""
    assert resource.getrlimit(resource.RLIMIT_CORE)[1], "the tests need core dumps to be allowed (ulimit -Hc)"
    with victim(how=how, cwd=tmp_path) as (process, _):
        process.send_signal(signal.SIGABRT)
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert ended.si_status == signal.SIGABRT
        assert (ended.si_code == os.CLD_DUMPED) == leaves
    assert leaves or list(tmp_path.iterdir()) == []
