"""Attacks that have another application open the package: each is refused, before any hardware is asked."""

from __future__ import annotations

import os
import py_compile
import shutil
import subprocess
import sys
import time
import tomllib

import pytest

from hwlicense import loaded
from hwlicense_simulators import Tpm
from tests.installed import OPENING, Installation, Sold, shared_library
from tests.world import TERMS, run

APPLICATION = "import logic, other\nlogic.prepare()\n" + OPENING
LOGIC = "def prepare(): return 1\n"
EVIL = "def prepare(): return 2\n"
LIBRARY = "int answer(void) { return 42; }"
EVIL_LIBRARY = "int answer(void) { return 43; }"


@pytest.fixture(scope="module")
def installation(tmp_path_factory):
    made = Installation(tmp_path_factory.mktemp("device"))
    made.write("app.py", APPLICATION)
    made.write("logic.py", LOGIC)
    made.write("other.py", "import logic\n")
    shared_library(made.folder, "lib", LIBRARY)
    return made


@pytest.fixture(scope="module")
def sold(tmp_path_factory, vendor):
    with Tpm() as tpm:
        yield Sold(tmp_path_factory.mktemp("sold"), vendor, tpm)


def measure(installation, sold, name):
    """As the vendor measures: the application opens the package under a license that says nothing of it."""
    target = sold.folder / "app.toml"
    options = ["--python", installation.python, "--file", installation.folder / "lib.so", "-o", target, "--force"]
    said = run("vendor", "measure", *options, "--", name, *sold.license(), cwd=installation.folder)
    assert "2 of them required" in said.stderr
    return target.read_text()


@pytest.fixture(scope="module")
def measured(installation, sold):
    return measure(installation, sold, "app.py")


@pytest.fixture(scope="module")
def given(sold, measured):
    return sold.license(measured)


@pytest.fixture(autouse=True)
def as_installed(installation):
    """Each test begins and ends with the application as it was measured."""
    kept = {path: path.read_bytes() for path in installation.folder.iterdir() if path.is_file()}
    yield
    for path in installation.folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path not in kept:
            path.unlink()
    for path, content in kept.items():
        path.write_bytes(content)


def refused(done):
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith("APPLICATION_CHANGED ")
    return done.stdout


def start(installation, given, name="app.py", **how):
    return installation.run(installation.folder / name, *given, **how)


def test_what_was_measured_opens(installation, given, measured):
    table = tomllib.loads(TERMS + measured)["application"]
    assert {name.rpartition("/")[2] for name in table["required"]} == {
        "app.py",
        os.path.realpath(sys.executable).rpartition("/")[2],
    }
    names = {name.rpartition("/")[2] for name in table["files"]}
    assert names >= {"app.py", "logic.py", "other.py", "libc.so.6", "opening.py", "_rust.abi3.so", "lib.so"}
    for _ in range(2):  # the second time with caches of bytecode
        done = start(installation, given)
        assert done.stdout == "open\n", done.stdout + done.stderr


def test_a_changed_program(installation, given):
    installation.write("app.py", APPLICATION + "print('and more')\n")
    said = refused(start(installation, given))
    assert f"{installation.folder}/app.py is another than measured" in said
    assert f"{installation.folder}/app.py is missing" in said


def test_a_changed_module(installation, given):
    installation.write("logic.py", EVIL)
    assert "logic.py is another than measured" in refused(start(installation, given))


def test_another_module(installation, given):
    """It takes the place of one that the program imports, and hides what it did."""
    (installation.folder / "logic.py").unlink()
    installation.write("logic/__init__.py", "from logic.spy import *\n")
    installation.write("logic/spy.py", LOGIC)
    said = refused(start(installation, given))
    assert "logic/__init__.py is another than measured" in said or "logic/spy.py is not among the measured" in said


def test_bytecode_of_other_code_in_the_cache_of_a_measured_module(installation, given):
    evil = installation.write("evil.py", EVIL)
    original = installation.folder / "logic.py"
    status = original.stat()
    os.utime(evil, ns=(status.st_atime_ns, status.st_mtime_ns))
    cache = installation.folder / "__pycache__" / f"logic.{sys.implementation.cache_tag}.pyc"
    cache.parent.mkdir(exist_ok=True)
    assert evil.stat().st_size == status.st_size  # the header names size and time alone
    py_compile.compile(str(evil), str(cache), dfile=str(original))
    evil.unlink()
    check = installation.write("app.py", "import logic; print(logic.prepare())")
    assert installation.run(check).stdout == "2\n"
    installation.write("app.py", APPLICATION)
    assert "logic.py has other code in its cache" in refused(start(installation, given))
    # What an import would not take does not count
    os.utime(original, (1, 1))
    assert start(installation, given).stdout == "open\n"


@pytest.mark.parametrize("how", ["option", "pipe"])
def test_code_in_no_file(installation, given, how):
    if how == "option":
        command = [installation.python, "-c", APPLICATION, *given]
        done = subprocess.run(command, cwd=installation.folder, capture_output=True, text=True, check=False)
    else:
        command = [installation.python, "-", *given]
        done = subprocess.run(
            command, input=APPLICATION, cwd=installation.folder, capture_output=True, text=True, check=False
        )
    assert "__main__ is in no file" in refused(done)


def test_another_program_that_loads_nothing_else(installation, sold, measured):
    """All that it loads is allowed; what must be loaded is not there."""
    second = installation.write("second.py", APPLICATION + "# another\n")
    more = f'"{second}" = "{loaded.file_digest(second).hex()}"\n'
    said = refused(start(installation, sold.license(measured + more), "second.py"))
    assert said.count(" is ") == 1
    assert "app.py is missing" in said


def test_preloaded_libraries(installation, given, tmp_path):
    for name in ("LD_PRELOAD", "LD_AUDIT"):
        code = "unsigned la_version(unsigned version) { return version; }" if name == "LD_AUDIT" else LIBRARY + "int m;"
        path = shared_library(tmp_path, name.lower(), code)
        assert f"{path} is not among the measured" in refused(start(installation, given, **{name: str(path)}))


def test_modules_by_way_of_variables_and_path_files(installation, given, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("spied = 1\n")  # an empty file is like any other: no code
    assert "sitecustomize.py is not among" in refused(start(installation, given, PYTHONPATH=str(tmp_path)))
    (tmp_path / "spy.py").write_text("spied = 1\n")
    with installation.laid("spy.pth", f"import sys; sys.path.append({str(tmp_path)!r}); import spy\n"):
        assert f"{tmp_path}/spy.py is not among the measured" in refused(start(installation, given))


def test_a_replaced_interpreter(installation, given, tmp_path):
    other = tmp_path / "python3"
    shutil.copy(os.path.realpath(installation.python), other)
    with other.open("ab") as file:
        file.write(b"\0")
    command = [other, installation.folder / "app.py", *given]
    paths = {"PYTHONPATH": str(installation.packages), "PYTHONHOME": sys.base_prefix}
    done = subprocess.run(command, env=paths, cwd=installation.folder, capture_output=True, text=True, check=False)
    said = refused(done)
    assert f"{other} is not among the measured" in said
    assert "is missing" in said


LOADS = (
    """
import ctypes, os
library = ctypes.CDLL("./lib.so")
{then}
"""
    + OPENING
)


def test_a_library_that_gives_way_to_the_measured_one(installation, sold, tmp_path):
    """What lies on the path is right; what was loaded is not."""
    good = (installation.folder / "lib.so").read_bytes()
    then = 'os.rename("good.so", "lib.so") if os.path.exists("good.so") else None'
    installation.write("loads.py", LOADS.replace("{then}", then))
    given = sold.license(measure(installation, sold, "loads.py"))
    assert start(installation, given, "loads.py").stdout == "open\n"
    evil = shared_library(tmp_path, "lib", EVIL_LIBRARY)
    shutil.copy(evil, installation.folder / "lib.so")
    (installation.folder / "good.so").write_bytes(good)
    said = refused(start(installation, given, "loads.py"))
    assert "lib.so is another than measured" in said or "lib.so replaced since it was loaded" in said
    assert (installation.folder / "lib.so").read_bytes() == good


def test_code_that_is_changed_in_memory(installation, sold):
    """As a debugger's breakpoint is, and an inline hook."""
    then = """
address = ctypes.cast(library.answer, ctypes.c_void_p).value
ctypes.CDLL(None).mprotect(ctypes.c_void_p(address & ~4095), 4096, 7)
kept = ctypes.string_at(address, 1)
ctypes.memset(address, 0xCC, 1 if os.path.exists("attack") else 0)
"""
    installation.write("loads.py", LOADS.replace("{then}", then))
    given = sold.license(measure(installation, sold, "loads.py"))
    assert start(installation, given, "loads.py").stdout == "open\n"
    installation.write("attack", "")
    assert "lib.so changed in memory" in refused(start(installation, given, "loads.py"))


def test_a_module_whose_loader_is_of_nowhere(installation, sold):
    code = (
        """
import os, sys, types
if os.path.exists("attack"):
    found = types.ModuleType("spy")
    found.__loader__ = type("Loader", (), {})()
    sys.modules["spy"] = found
"""
        + OPENING
    )
    installation.write("loads.py", code)
    given = sold.license(measure(installation, sold, "loads.py"))
    assert start(installation, given, "loads.py").stdout == "open\n"
    installation.write("attack", "")
    assert "spy imported by __main__.Loader" in refused(start(installation, given, "loads.py"))


def test_what_is_loaded_later_ends_the_use_where_there_is_a_guard(installation, sold):
    code = (
        OPENING
        + """
import os, time
if os.path.exists("attack"):
    import later
    time.sleep(2.5)
try: print(len(model.read("weights.bin")) > 0)
except hwlicense.RefusedError as error: print(error.reason, error)
"""
    )
    installation.write("loads.py", code)
    given = sold.license(measure(installation, sold, "loads.py") + '[guard]\nrefuse = ["debugger"]\ninterval = "1s"\n')
    assert start(installation, given, "loads.py").stdout == "open\nTrue\n"
    installation.write("attack", "")
    installation.write("later.py", "more = 1\n")
    said = start(installation, given, "loads.py").stdout
    assert said.startswith("open\nAPPLICATION_CHANGED ")
    assert "later.py is not among the measured" in said


# ---- measuring -----------------------------------------------------------------------------------------------


def test_measuring_what_runs_already(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            time.sleep(0.2)
            said = run("vendor", "measure", "--pid", str(process.pid), "-o", tmp_path / "app.toml")
        finally:
            process.kill()
    table = tomllib.loads((tmp_path / "app.toml").read_text())["application"]
    assert [name.rpartition("/")[2] for name in table["required"]] == ["sleep"]
    assert any(name.endswith("libc.so.6") for name in table["files"])
    assert "not seen from outside" in said.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "USAGE"),
        (["--", "-m"], "USAGE"),
        (["--file", "absent"], "FILE_ABSENT"),
        (["--pid", "999999999"], "USAGE"),
        (["--", "absent.py"], "FILE_ABSENT"),
        (["--", "fails.py"], "USAGE"),
        (["--", "leaves.py"], "USAGE"),
        (["--python", "absent", "--", "fine.py"], "FILE_ABSENT"),
        (["--python", "/bin/false", "--", "fine.py"], "USAGE"),
    ],
)
def test_what_cannot_be_measured(tmp_path, arguments, reason):
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    (tmp_path / "leaves.py").write_text("import os; os._exit(0)")
    (tmp_path / "fine.py").write_text("")
    done = run("vendor", "measure", "-o", "app.toml", *arguments, cwd=tmp_path, status=None)
    assert done.returncode == 2
    assert f"reason: {reason}" in done.stderr
    assert not (tmp_path / "app.toml").exists()


def test_names_of_every_kind_come_back(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    names = ['"quoted"', "back\\slash", "größe", "tab\there", "new\nline", "del\x7f", os.fsdecode(b"raw\xff")]
    for name in names:
        (folder / name).write_text(name.encode(errors="replace").decode())
    run("vendor", "measure", "--file", folder, "-o", tmp_path / "app.toml")
    run("vendor", "measure", "--file", folder, "-o", tmp_path / "app.toml", status=2)
    table = tomllib.loads((tmp_path / "app.toml").read_text())["application"]["files"]
    assert sorted(name.rpartition("/")[2] for name in table) == sorted([*names[:-1], "raw\\udcff"])


def test_the_same_code_is_written_the_same():
    source = "class A:\n    x = 'a' in {'a', 'b', 1.5}\n    def f(self, y=(1, 2)): return lambda: y in {1, 2, 'c'}\n"
    one = compile(source, "a", "exec", dont_inherit=True)
    kept = [one.co_consts, one.co_names]  # more references, which marshal's newer versions would show
    assert loaded.written(one) == loaded.written(compile(source, "a", "exec", dont_inherit=True))
    assert loaded.written(one) != loaded.written(compile(source.replace("1.5", "1.6"), "a", "exec", dont_inherit=True))
    assert kept
