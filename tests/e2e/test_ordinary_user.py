"""The main path by a user without any privilege, with a read-only home; and what of the TPM a user may not touch."""

import contextlib
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.forging import as_root, listing
from tests.world import MEMBERS, PROGRAM, WITH_PCRS

LENT = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


@pytest.fixture(scope="module")
def user():
    """The words before a command that make it an ordinary user's, and that user's numbers: nobody, or who tests."""
    if not as_root():
        return [], os.geteuid(), os.getegid()
    entry = pwd.getpwnam("nobody")
    return as_user(entry.pw_uid, entry.pw_gid), entry.pw_uid, entry.pw_gid


def as_user(uid, gid):
    words = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]
    if subprocess.run([*words, PROGRAM, "--version"], check=False, capture_output=True).returncode:
        # The interpreter of the tests lies where only root may read: that right is lent, and nothing else
        words += LENT
    return words


@pytest.fixture
def shop(user):
    """A folder of the user's, where its files and its TPM's sockets are."""
    with tempfile.TemporaryDirectory(prefix="hwlicense-", dir="/tmp") as name:  # a short path, which the user can reach
        folder = Path(name)
        for member, content in MEMBERS.items():
            (folder / "files" / member).parent.mkdir(parents=True, exist_ok=True)
            (folder / "files" / member).write_bytes(content)
        (folder / "terms.toml").write_text(WITH_PCRS)
        _own(folder, user)
        yield folder
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir():
                path.chmod(0o700)


def _own(folder, user):
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, user[1], user[2], follow_symlinks=False)


@pytest.fixture
def run(user, shop):
    def call(*arguments, status=0, under=(), **environment):
        clean = {"PATH": os.environ["PATH"], "HOME": str(shop / "nowhere"), "LANG": "C.UTF-8"}
        words = [*under, *user[0], PROGRAM, *map(str, arguments)]
        done = subprocess.run(
            words, cwd=shop, env=clean | environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == status, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return call


@pytest.fixture
def tcti(hwlicense_tpms, shop, user):
    """A TPM whose sockets are the user's: swtpm's own belong to whoever runs the tests."""
    tpm = hwlicense_tpms()
    shutil.copy(tpm.ek_root, shop / "root.pem")
    with tpm.tapped(record=False) as wire:
        for suffix in ("", ".ctrl"):
            os.chown(f"{wire.path}{suffix}", user[1], user[2])
        wire.path.parent.chmod(0o711)
        yield wire.tcti


def test_the_whole_way_writes_nothing_elsewhere(shop, run, tcti):
    run("vendor", "init", "vendor", "--name", "Acme", "--no-passphrase")
    run("vendor", "pack", "--vendor", "vendor", "--name", "reader", "--version", "1.0", "-o", "model.hwpkg", "files")
    run("device", "enroll", "--home", "home", "--tpm", tcti, "--pcrs", "sha256:0,7", "-o", "a.hwreq")
    given = ("--request", "a.hwreq", "--package", "model.hwpkg", "--terms", "terms.toml", "--ek-root", "root.pem")
    run("vendor", "issue", "--vendor", "vendor", *given, "-o", "a.hwlic")
    run("device", "trust", "--home", "home", "vendor/vendor.pub.json")
    run("device", "install", "--home", "home", "a.hwlic")
    approval = next((shop / "vendor" / "approvals").iterdir())
    for path in sorted((shop / "home").rglob("*"), reverse=True):
        path.chmod(0o500 if path.is_dir() else 0o400)
    (shop / "home").chmod(0o500)
    before = listing(shop)
    at = ("--home", "home", "--state", "state")
    run("device", "install", *at, approval)
    opened = run("device", "check", "--open", "--json", *at, "model.hwpkg")
    assert json.loads(opened.stdout)["opened"] is True
    run("device", "status", *at)
    run("device", "probe", *at, "--pcrs", "sha256:7")
    assert "ok      TPM:" in run("device", "doctor", *at).stdout
    run("inspect", "a.hwlic")
    after = {path: kept for path, kept in listing(shop).items() if not path.startswith(f"{shop}/state")}
    assert after == before
    assert {path.stat().st_mode & 0o077 for path in (shop / "state").rglob("*")} == {0}
    assert not (shop / "nowhere").exists()
    # What cannot be written is said, and nothing is half done
    refused = run("device", "install", *at, "a.hwlic", status=5)
    assert "reason: STORAGE" in refused.stderr
    assert "hint: Check the permissions" in refused.stderr
    refused = run("device", "trust", *at, "vendor/vendor.pub.json")  # trusted already: nothing to write
    run("device", "check", "--open", *at, "model.hwpkg")


def _licensed(shop, run, tcti):
    """The home's license, and a folder for `exec --at`."""
    run("vendor", "init", "vendor", "--no-passphrase")
    run("vendor", "pack", "--vendor", "vendor", "--name", "reader", "--version", "1.0", "-o", "model.hwpkg", "files")
    run("device", "trust", "--home", "home", "vendor/vendor.pub.json")
    given = ("--request", "a.hwreq", "--package", "model.hwpkg", "--terms", "terms.toml", "--ek-root", "root.pem")
    run("device", "enroll", "--home", "home", "--tpm", tcti, "--pcrs", "sha256:0,7", "-o", "a.hwreq")
    run("vendor", "issue", "--vendor", "vendor", *given, "-o", "a.hwlic")
    run("device", "install", "--home", "home", "a.hwlic")
    place = shop / "at"
    place.mkdir()
    if as_root():
        os.chown(place, shop.stat().st_uid, shop.stat().st_gid)
    return place


def test_a_program_in_namespaces_of_its_own(shop, run, tcti):
    """Where no right to mount is there, a user namespace gives it: to hwlicense, and not to the program."""
    place = _licensed(shop, run, tcti)
    run("exec", "model.hwpkg", "--home", "home", "--at", "files", "--", "true", status=2)
    script = """
        exec 2>&1
        cat at/labels/names.txt; wc -c <at/weights.bin; touch at/new; umount at
        grep CapEff /proc/self/status; id -u; unshare --user --map-root-user umount at; cat at/labels/names.txt
    """
    done = run("exec", "model.hwpkg", "--home", "home", "--at", "at", "--", "sh", "-c", script)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[:3] == ["bolt", "nut", str(len(MEMBERS["weights.bin"]))]
    assert "Read-only file system" in lines[3]
    assert "umount" in lines[4]
    assert lines[5:7] == ["CapEff:\t0000000000000000", str(shop.stat().st_uid)]
    assert lines[-2:] == ["bolt", "nut"]
    assert not list(place.iterdir())
    done = run("exec", "model.hwpkg", "--home", "home", "--fd", "--", "cat", "{labels/names.txt}")
    assert done.stdout == "bolt\nnut\n"


WAY_IN = """
import subprocess, sys
from pathlib import Path
with subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
    assert process.stdout.readline() == b"ready\\n"
    pids = [process.pid]
    while len(pids) < 3:
        pids.append(int(Path(f"/proc/{pids[-1]}/task/{pids[-1]}/children").read_text().split()[0]))
    for pid, name in zip(pids, ("hwlicense", "keeper", "COMMAND")):
        try:
            open(f"/proc/{pid}/mem", "rb").close()
        except PermissionError:
            print("no way into", name)
        else:
            print("a way into", name)
"""


@pytest.mark.parametrize("how", [["--at", "at"], ["--fd"]])
def test_neither_hwlicense_nor_the_keeper_is_a_way_in_for_the_same_user(shop, run, tcti, user, how):
    """Either could be stopped and led to show what it likes. COMMAND is an ordinary process, and so the control.

    From the process that has started them, which Yama (ptrace_scope) does not keep from its descendants.
    """
    _licensed(shop, run, tcti)
    command = [PROGRAM, "exec", "model.hwpkg", "--home", "home", *how, "--", "sh", "-c", "echo ready; read line"]
    lent = [word for word in LENT if as_root() and word not in user[0]]  # where a program of its own needs it, too
    words = [*user[0], *lent, sys.executable, "-c", WAY_IN, *command]
    done = subprocess.run(
        words, cwd=shop, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60, check=False
    )
    said = ["no way into hwlicense", "no way into keeper", "a way into COMMAND"]
    assert done.stdout.splitlines() == said, done.stderr


def test_a_program_that_is_set_uid(shop, run, tcti, user):
    """With --at its owner is nobody whom the user namespace knows; with --fd it is as without hwlicense."""
    _licensed(shop, run, tcti)
    shutil.copy("/usr/bin/id", shop / "id")
    (shop / "id").chmod(0o4755)  # who runs the tests owns it
    words = [word for word in user[0] if word != "--no-new-privs"]
    for how, forbidden, allowed in (
        (["--fd"], False, as_root()),
        (["--fd"], True, False),
        (["--at", "at"], False, False),
    ):
        under = ["setpriv", "--no-new-privs"] if forbidden else []
        command = [*under, *words, PROGRAM, "exec", "model.hwpkg", "--home", "home", *how, "--", "./id"]
        environment = {"PATH": os.environ["PATH"]}
        done = subprocess.run(command, cwd=shop, env=environment, capture_output=True, text=True, check=True)
        assert f"uid={user[1]}" in done.stdout
        assert ("euid=0(root)" in done.stdout) == allowed


def test_every_file_that_is_written_lies_in_home_state_or_output(shop, run, tcti):
    """As the kernel sees it, over enrolling, installing and opening."""
    run("vendor", "init", "vendor", "--no-passphrase")
    run("vendor", "pack", "--vendor", "vendor", "--name", "reader", "--version", "1.0", "-o", "model.hwpkg", "files")
    run("device", "trust", "--home", "home", "vendor/vendor.pub.json")
    given = ("--request", "a.hwreq", "--package", "model.hwpkg", "--terms", "terms.toml", "--ek-root", "root.pem")
    calls = "open,openat,openat2,creat,mkdir,mkdirat,rename,renameat,renameat2,link,linkat,unlink,unlinkat,symlink"
    written = set()
    for arguments in (
        ("device", "enroll", "--home", "home", "--tpm", tcti, "--pcrs", "sha256:0,7", "-o", "a.hwreq"),
        ("vendor", "issue", "--vendor", "vendor", *given, "-o", "a.hwlic"),
        ("device", "install", "--home", "home", "a.hwlic"),
        ("device", "check", "--open", "--home", "home", "model.hwpkg"),
    ):
        trace = ["strace", "-f", "-qq", "-s", "4096", "-y", "-e", f"trace={calls}", "-e", "signal=none", "-o", "trace"]
        run(*arguments, under=trace, PYTHONDONTWRITEBYTECODE="1")
        for line in (shop / "trace").read_text(errors="replace").splitlines():
            reading = "O_RDONLY" in line and "O_CREAT" not in line
            failed = " = -1 " in line
            if not reading and not failed and "unfinished" not in line and "O_DIRECTORY|O_CLOEXEC" not in line:
                written.add(line.partition(" ")[2])
    # Python imports, /dev/null, sockets and /proc/self/fd aside, only these
    allowed = ("home", "vendor/issued", "vendor/approvals", "a.hwreq", "a.hwlic", str(shop), "O_TMPFILE", "/dev/null")
    strange = [call for call in written if not any(part in call for part in allowed) and "/proc/self/fd" not in call]
    assert not strange
    assert any("O_TMPFILE" in call or "a.hwlic" in call for call in written)


def test_no_permission_for_the_tpm(shop, run):
    """Its socket or device node belongs to someone else, or nobody may open it."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(shop / "tpm"))
        listener.listen()
        (shop / "tpm").chmod(0)
        node = shop / "node"
        node.touch(0)
        if as_root():
            os.chown(node, 0, 0)
            os.chown(shop / "tpm", 0, 0)
        for tcti in (f"swtpm:path={shop}/tpm", f"device:{node}"):
            done = run("device", "enroll", "--home", "home", "--tpm", tcti, "-o", "new.hwreq", status=3)
            assert "reason: TPM_NO_PERMISSION" in done.stderr
            assert 'hint: Add the user to the group "tss"' in done.stderr
            doctor = run("device", "doctor", "--home", "home", "--tpm", tcti, status=3)
            assert "missing TPM: No permission" in doctor.stdout
            assert tcti.startswith("swtpm:") or "usermod" in doctor.stdout
    assert not (shop / "home").exists()
    assert not (shop / "new.hwreq").exists()


def test_a_home_that_belongs_to_another_user(shop, run):
    (shop / "home" / "licenses").mkdir(parents=True)
    (shop / "home" / "trust.json").write_text("{}")
    for path in (shop / "home" / "licenses", shop / "home"):
        path.chmod(0)
        if as_root():
            os.chown(path, 0, 0)
    done = run("device", "status", "--home", "home", status=5)
    assert "reason: STORAGE" in done.stderr
    assert "hint: Check the permissions" in done.stderr
    doctor = run("device", "doctor", "--home", "home", status=3).stdout  # goes on, and reports it as a finding
    assert "Permission denied" in doctor
    assert "mend: Check the permissions" in doctor


def test_a_user_without_name_or_home():
    """As in containers that are started with some number for a user."""
    words = as_user(54321, 54321) if as_root() else ["unshare", "--user", "--map-user=54321"]
    words += [PROGRAM, "device", "status"]
    done = subprocess.run(words, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "hint: Give --home DIR" in done.stderr
