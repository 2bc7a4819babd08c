"""Programs that are not Python: what is left of them, who sees their files, and what ends them."""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from hwlicense.device.keeping import Mount
from hwlicense.device.tree import Tree
from tests.forging import another_user
from tests.programs import children, marked, mounts, runs, shop, until
from tests.world import PROGRAM, run

STAY = "(while :; do sleep 0.1; done) & setsid sleep 60 & while :; do sleep 0.1; done"


@pytest.fixture(scope="module")
def here(vendor, tmp_path_factory):
    with shop(vendor, tmp_path_factory.mktemp("shop")) as found:
        yield found


# ---- nothing stays


@pytest.mark.parametrize("how", ["--at", "--fd"])
@pytest.mark.parametrize("victim", ["hwlicense", "keeper", "command"])
def test_whichever_is_killed_nothing_stays(here, how, victim):
    mark = uuid.uuid4().hex
    with here.running(STAY, how, mark) as process:
        keeper = children(process.pid)[0]
        command = children(keeper)[0]
        until(lambda: len(marked(mark)) >= 6)  # with the subshell, the one in a session of its own, and sleeps
        assert (keeper in mounts(here.at)) == (how == "--at")
        assert not {os.getpid(), process.pid} & mounts(here.at)
        os.kill({"hwlicense": process.pid, "keeper": keeper, "command": command}[victim], signal.SIGKILL)
        began = time.monotonic()
        killed = {"hwlicense": {-signal.SIGKILL}, "command": {128 + signal.SIGKILL}}
        assert process.wait(10) in killed.get(victim, {128 + signal.SIGKILL, 5})  # the latter before it could say more
        until(lambda: not marked(mark) and not any(map(runs, (keeper, command))))
        assert time.monotonic() - began < 5
        assert not mounts(here.at)
        assert not list(here.at.iterdir())


@pytest.mark.parametrize("how", ["--at", "--fd"])
def test_what_a_command_leaves_behind_ends_with_it(here, how):
    mark = uuid.uuid4().hex
    given = ["--at", here.at] if how == "--at" else ["--fd"]
    environment = here.environment | {"MARK": mark}
    daemon = "setsid sh -c 'trap \"\" TERM HUP; sleep 60' </dev/null >/dev/null 2>&1 & exit 5"
    here.exec("sh", "-c", daemon, given=given, status=5, env=environment)
    assert not marked(mark)


@pytest.mark.parametrize("how", ["--at", "--fd"])
def test_a_stopped_tree_ends_as_well(here, how):
    """A terminal has stopped all of it; then hwlicense is killed."""
    mark = uuid.uuid4().hex
    with here.running(STAY, how, mark) as process:
        keeper = children(process.pid)[0]
        command = children(keeper)[0]
        for pid in (keeper, command):
            os.kill(pid, signal.SIGSTOP)
        process.kill()
        until(lambda: not marked(mark) and not any(map(runs, (keeper, command))))
    assert not mounts(here.at)


def test_the_command_ends_with_hwlicense_and_keeper_without_namespaces(here):
    """Both killed while they are stopped, so that neither can do anything about it: the kernel does."""
    mark = uuid.uuid4().hex
    with here.running("while :; do sleep 0.1; done", "--fd", mark) as process:
        keeper = children(process.pid)[0]
        command = children(keeper)[0]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in (process.pid, keeper):
                os.kill(pid, number)
        try:
            until(lambda: not marked(mark) and not any(map(runs, (keeper, command))))
        finally:
            with suppress(ProcessLookupError):
                os.kill(command, signal.SIGKILL)


def test_processes_that_were_there_before_are_left_alone(here):
    """Those that a shell has started and left when it became hwlicense."""
    script = 'sleep 60 >/dev/null 2>&1 & echo $!; exec "$@"'
    words = ["sh", "-c", script, "sh", PROGRAM, "exec", here.vendor.package, "--fd", "--", "true"]
    done = subprocess.run(words, env=here.environment, capture_output=True, text=True, timeout=60, check=True)
    os.kill(int(done.stdout), signal.SIGKILL)


# ---- who sees it


def test_nobody_else_sees_the_files(here):
    with here.running(STAY) as process:
        keeper = children(process.pid)[0]
        assert not list(here.at.iterdir())
        assert Path(f"/proc/{process.pid}/ns/mnt").readlink() != Path(f"/proc/{keeper}/ns/mnt").readlink()
        command = children(keeper)[0]
        for path in (f"/proc/{command}/root{here.at}", f"/proc/{command}/fd", f"/proc/{command}/mem"):
            code = f"import os; os.listdir({path!r}) if 'mem' not in {path!r} else open({path!r}, 'rb')"
            words = [sys.executable, "-c", code]
            done = subprocess.run([*another_user(), *words], capture_output=True, text=True, check=False)
            assert "Permission denied" in done.stderr
            subprocess.run(words, check=True)  # root's


ANOTHER_USERS_WAYS = """
import ctypes, os, subprocess, sys
from pathlib import Path

processes, number = [int(pid) for pid in sys.argv[1].split(",")], int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)

def called(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def taken(pid):
    called(libc.syscall(438, os.pidfd_open(pid), number, 0))  # pidfd_getfd(2)

def joined(pid):
    called(libc.setns(os.pidfd_open(pid), 0x20000))  # CLONE_NEWNS

def joined_as_root_of_ones_own(pid):
    subprocess.run(["unshare", "--user", "--map-root-user", "nsenter", "-t", str(pid), "--mount", "true"], check=True,
        stderr=subprocess.DEVNULL)

def traced(pid):
    called(libc.ptrace(0x4206, pid, 0, 0))  # PTRACE_SEIZE

def read(pid):
    buffer = ctypes.create_string_buffer(8)
    vector = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
    called(libc.process_vm_readv(pid, vector, 1, vector, 1, 0))

ways = [taken, joined, joined_as_root_of_ones_own, traced, read]
folders = ("fd", "map_files", "cwd/.", "root/.")
ways += [lambda pid, entry=entry: os.listdir(f"/proc/{pid}/{entry}") for entry in folders]
ways += [lambda pid, entry=entry: open(f"/proc/{pid}/{entry}", "rb") for entry in ("mem", "environ", "maps")]
ways += [lambda pid: open(f"/proc/{pid}/fd/{number}"), lambda pid: os.kill(pid, 0)]

def let_in(way, pid):
    try:
        way(pid)
    except (PermissionError, subprocess.CalledProcessError):
        return False
    except OSError:  # let in, where there is no such address, or no file to be opened
        return True
    return True

for place, way in enumerate(ways):
    for kind, pid in zip(("hwlicense", "keeper", "command"), processes, strict=True):
        child = os.fork()  # what one way has changed is not the next one's
        if not child:
            os._exit(3 if let_in(way, pid) else 4)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in {3, 4}, status
        if status == 3:
            print("a way in:", place, kind)
print("tried", len(ways))
for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
    if "hwlicense" in line:
        print("a name:", line)
"""


@pytest.mark.parametrize("how", ["--at", "--fd"])
def test_another_user_reaches_neither_socket_nor_files(here, how):
    """One who knows the processes, and the socket's number. By its path the folder is empty, whoever looks."""
    script = "echo $HWLICENSE_SOCKET; " + STAY
    with here.running(script, how) as process:
        number = process.stdout.readline().strip()
        keeper = children(process.pid)[0]
        command = children(keeper)[0]
        pids = ",".join(map(str, (process.pid, keeper, command)))
        words = [sys.executable, "-c", ANOTHER_USERS_WAYS, pids, number]
        done = subprocess.run([*another_user(), *words], capture_output=True, text=True, check=False, cwd="/")
        assert (done.stdout, done.stderr) == ("tried 14\n", "")
        control = subprocess.run(words, capture_output=True, text=True, check=False, cwd="/")
    # Root's: the ways are ways, but for the one that needs a user namespace and has no rights outside
    ways = [f"a way in: {n} {kind}" for n in range(14) if n != 2 for kind in ("hwlicense", "keeper", "command")]
    assert (control.stdout.splitlines(), control.stderr) == ([*ways, "tried 14"], "")


@pytest.mark.parametrize("how", ["--at", "--fd"])
def test_no_core_dump(here, how):
    given = ["--at", here.at] if how == "--at" else ["--fd"]
    done = here.exec("sh", "-c", "ulimit -c; ulimit -Hc; kill -SEGV $$", status=128 + signal.SIGSEGV, given=given)
    assert len(done.stdout.split()) == 2
    assert set(done.stdout.split()) <= {"0", "1"}
    assert not list(here.folder.glob("core*"))
    least = "1" if resource.getrlimit(resource.RLIMIT_CORE)[1] else "0"
    assert [line.split()[4:6] for line in _limits(here, given) if "core" in line] == [[least, least]]


def _limits(here, given):
    return here.exec("cat", "/proc/self/limits", given=given).stdout.splitlines()


def test_the_members_cannot_be_changed(here):
    script = """
        exec 2>&1
        touch at/new; rm -f at/empty; mkdir at/labels/x; chmod 600 at/empty; mv at/empty at/full
        test -s at/labels/names.txt && ! test -e at/new && test -e at/empty && echo as before
    """
    done = here.exec("sh", "-c", textwrap.dedent(script))
    assert done.stdout.count("Read-only file system") == 5
    assert done.stdout.endswith("as before\n")
    code = """
        import os, sys
        try:
            os.pwrite(int(sys.argv[1].rpartition("/")[2]), b"x", 0)
        except PermissionError as error:
            print(error.strerror)
    """
    done = here.exec(sys.executable, "-c", textwrap.dedent(code), "{weights.bin}", given=["--fd"])
    assert done.stdout == "Operation not permitted\n"


@pytest.mark.parametrize("executable", [False, True])
def test_the_mount_lends_no_rights(here, executable):
    """Neither before a file lies there, as the keeper sees it, nor as the program does."""
    with Tree(["true"], Mount(here.at, 1 << 20, 64, executable=executable)) as tree:
        options = {"rw", "nosuid", "nodev", *([] if executable else ["noexec"])}
        assert mounted(Path(f"/proc/{tree.keeper}/mountinfo").read_text(), here.at) == options
    given = ["--at", here.at, *(["--executable"] if executable else [])]
    seen = here.exec("cat", "/proc/self/mountinfo", given=given).stdout
    assert mounted(seen, here.at) == options - {"rw"} | {"ro"}


def mounted(mountinfo, at):
    """The options of what is mounted there (proc_pid_mountinfo(5)), but for those about times."""
    found = [fields[5] for line in mountinfo.splitlines() if (fields := line.split())[4] == str(at)]
    assert len(found) == 1
    return {option for option in found[0].split(",") if "atime" not in option}


def test_nothing_but_what_is_meant_is_passed_on(here):
    """Neither the keeper's socket nor a descriptor of the folder, by which a program could write to the mount."""
    code = """
        import json, os
        links = []
        for number in range(3, 64):
            try:
                links.append(os.readlink(f"/proc/self/fd/{number}"))
            except OSError:
                continue
        print(json.dumps(links))
    """
    code = textwrap.dedent(code)
    links = json.loads(here.exec(sys.executable, "-c", code).stdout)
    assert len(links) == 1
    assert links[0].startswith("socket:")
    links = json.loads(here.exec(sys.executable, "-c", code, given=["--fd"]).stdout)
    assert sorted(link.partition(":")[0] for link in links) == ["/memfd", "/memfd", "/memfd", "socket"]


# ---- limits


def test_instances(vendor, tmp_path):
    terms = 'licensee = "A"\nproduct = "p"\n[limits]\ninstances = 1\n'
    with shop(vendor, tmp_path, terms) as limited, limited.running(STAY) as process:
        refused = limited.exec("true", given=["--fd"], status=1)
        assert "reason: INSTANCES_EXCEEDED" in refused.stderr
        keeper = children(process.pid)[0]
        process.kill()
        until(lambda: not runs(keeper))
        limited.exec("true", given=["--fd"])


def test_opens_are_not_spent_on_what_could_not_run(vendor, tmp_path):
    terms = 'licensee = "A"\nproduct = "p"\n[limits]\nopens = 1\n'
    with shop(vendor, tmp_path, terms, counted=True) as limited:
        limited.exec("no-such-program", status=127)
        limited.exec("/etc/passwd", status=126)
        limited.exec("at/weights.bin", status=126)
        limited.exec("true", given=["--at", tmp_path], status=2)
        limited.exec("sh", "-c", "exit 3", status=3)
        assert "reason: OPENS_EXHAUSTED" in limited.exec("true", status=1).stderr


DEBUGGER = """
import ctypes, sys, time
assert ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), None, None) == 0  # PTRACE_SEIZE
time.sleep(30)
"""


def test_what_a_guard_finds_ends_the_tree(vendor, tmp_path):
    """A debugger of hwlicense's, root's."""
    terms = 'licensee = "A"\nproduct = "p"\n[guard]\nrefuse = ["debugger"]\ninterval = "1s"\n'
    script = "trap 'echo asked to end; exit 0' TERM; while :; do sleep 0.1; done"
    with shop(vendor, tmp_path, terms) as guarded, guarded.running(script) as process:
        with subprocess.Popen([sys.executable, "-c", DEBUGGER, str(process.pid)]) as debugger:
            assert select.select([process.stdout.fileno()], [], [], 20)[0]
            debugger.kill()  # it would have to let hwlicense go on at each signal
        assert process.stdout.read() == "asked to end\n"
        assert "reason: GUARD" in process.stderr.read()
        assert process.wait(10) == 1


@pytest.fixture(scope="module")
def dongle(vendor, tmp_path_factory):
    """A folder with a dongle's license: presence each second, sessions of at most 8 s."""
    folder = tmp_path_factory.mktemp("dongle")
    (folder / "terms.toml").write_text(
        'licensee = "A"\nproduct = "p"\n[presence]\ninterval = "1s"\n[continuity]\nsession = "8s"\n'
    )
    keys = ["--vendor", vendor.folder / "vendor"]
    plugged = ["simulate", "--dongle", "--state", "desk"]
    run(*plugged, "--dongle-blank", "--", PROGRAM, "vendor", "dongle", "program", *keys, "-o", "d.hwreq", cwd=folder)
    given = ["--request", "d.hwreq", "--package", vendor.package, "--terms", "terms.toml", "-o", "d.hwlic"]
    run("vendor", "issue", *keys, *given, cwd=folder)
    run("device", "trust", "--home", "home", vendor.folder / "vendor" / "vendor.pub.json", cwd=folder)
    run(*plugged, "--", PROGRAM, "device", "install", "--home", "home", "d.hwlic", cwd=folder)
    (folder / "at").mkdir()

    def play(script, how=("--at", "at"), status=3):
        words = [*plugged, "--", PROGRAM, "exec", vendor.package, "--home", "home", *how, "--", "bash", "-c", script]
        began = time.monotonic()
        done = run(*words, status=status, cwd=folder)
        return done, time.monotonic() - began

    return play


ASK = 'ask() { echo "$1" >&$HWLICENSE_SOCKET; read -r -u $HWLICENSE_SOCKET answer; echo "$answer"; }\n'
PULL = 'touch "$HWLICENSE_SIMULATOR_CONTROL/pull-dongle"\n'
LINGER = "for ((i = 0; i < 300; i++)); do sleep 0.1; done; echo too late"


@pytest.mark.parametrize("how", [("--at", "at"), ("--fd",)])
def test_a_pulled_dongle_ends_the_tree(dongle, how):
    background = "(trap 'echo below; exit' TERM; while :; do sleep 0.1; done) &\n"
    script = f"trap 'echo asked to end; sleep 0.5; exit 0' TERM\n{background}{PULL}{LINGER}"
    done, took = dongle(script, how)
    assert set(done.stdout.splitlines()) == {"asked to end", "below"}
    assert "reason: DONGLE_ABSENT" in done.stderr
    assert took < 9


def test_who_ignores_it_is_killed(dongle):
    done, took = dongle(f"trap '' TERM\n{PULL}{LINGER}")
    assert done.stdout == ""
    assert "reason: DONGLE_ABSENT" in done.stderr
    assert 10 < took < 20


def test_a_session_is_not_interrupted(dongle):
    script = f"""{ASK}trap 'echo asked to end; exit 0' TERM
        ask 'session 0'
        {PULL} sleep 3
        ask 'session 0'; ask 'spend 1'; ask 'standing 0 0'; ask 'end'
        {LINGER}"""
    done, took = dongle(script)
    # No limit of use: spending is not refused. A session within a session is.
    expected = ["ok", "no USAGE -", "ok", "no DONGLE_ABSENT -", "ok", "asked to end"]
    assert done.stdout.splitlines() == expected
    assert took < 12


def test_but_no_longer_than_its_continuity(dongle):
    script = f"{ASK}trap 'echo asked to end; exit 0' TERM\nask 'session 0'\n{PULL}{LINGER}"
    done, took = dongle(script)
    assert done.stdout.splitlines() == ["ok", "asked to end"]
    assert 8 < took < 14
