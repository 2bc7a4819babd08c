"""Attacks that have another application open the package: each is refused, before any hardware is asked."""

from __future__ import annotations

import os
import py_compile
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
from pathlib import Path
from textwrap import indent

import pytest

from hwlicense import loaded, program
from hwlicense_simulators import Tpm
from tests.installed import OPENING, Installation, Sold, shared_library
from tests.world import PROGRAM, TERMS, run

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
    assert said.count("app.py") == 1
    assert f"{installation.folder}/app.py is another than measured" in said


def test_the_whole_list_is_in_the_notes(installation, given):
    """The sentence names three."""
    code = APPLICATION.replace(
        "    sys.exit", "    print(*getattr(error, '__notes__', ()), sep='\\n')\n    sys.exit", 1
    )
    installation.write("app.py", "".join(f"import more_{each}\n" for each in range(4)) + code)
    for each in range(4):
        installation.write(f"more_{each}.py", f"x = {each}\n")
    said, *notes = refused(start(installation, given)).splitlines()
    assert said.endswith("; and 2 more.")
    told = {f"{installation.folder}/more_{each}.py is not among the measured" for each in range(4)}
    assert set(notes) == told | {f"{installation.folder}/app.py is another than measured"}
    assert len(notes) == 5


def test_both_versions_of_an_application_open_in_the_time_of_an_update(installation, sold, measured):
    """Neither is required, as the other runs in its place; what both require stays so."""
    (sold.folder / "before.toml").write_text(measured)
    installation.write("app.py", APPLICATION + "# the next version\n")
    installation.write("logic.py", LOGIC + "# the next version\n")
    options = ["--with", sold.folder / "before.toml", "--python", installation.python]
    target = sold.folder / "both.toml"
    run(
        "vendor", "measure", "-o", target, "--force", *options, "--", "app.py", *sold.license(), cwd=installation.folder
    )
    table = tomllib.loads(target.read_text())["application"]
    assert table["required"] == [os.path.realpath(sys.executable)]
    assert len([name for name in table["files"] if "app.py" in name]) == 2
    both = sold.license(target.read_text())
    assert start(installation, both).stdout == "open\n"
    installation.write("app.py", APPLICATION)
    installation.write("logic.py", LOGIC)
    assert start(installation, both).stdout == "open\n"
    installation.write("logic.py", EVIL)
    assert "logic.py is another than measured" in refused(start(installation, both))


def test_measuring_under_a_license_that_refuses_says_what_to_do(installation, given):
    installation.write("app.py", APPLICATION + "# the next version\n")
    options = ["--python", installation.python, "-o", "new.toml"]
    done = run("vendor", "measure", *options, "--", "app.py", *given, cwd=installation.folder, status=2)
    assert "APPLICATION_CHANGED" in done.stderr
    assert "hint: Let it open under a license without [application]" in done.stderr


def test_a_table_to_be_named_with_that_is_none(tmp_path):
    (tmp_path / "fine.py").write_text("")
    for text, reason in (("", "TERM_INVALID"), ("[application]\nfiles = 1", "TERM_INVALID"), ("x", "TERM_INVALID")):
        (tmp_path / "old.toml").write_text(text)
        done = run("vendor", "measure", "-o", "a.toml", "--with", "old.toml", "--file", ".", cwd=tmp_path, status=2)
        assert f"reason: {reason}" in done.stderr
        assert "error: old.toml: " in done.stderr
    (tmp_path / "old.toml").write_text('[application.files]\n"a" = "zz"')
    done = run("vendor", "measure", "-o", "a.toml", "--with", "old.toml", "--file", ".", cwd=tmp_path, status=2)
    assert "reason: TERM_INVALID" in done.stderr


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


# Each names itself as the measured program, in all ways that a program has
CLAIM = """
import sys
main = sys.modules["__main__"]
main.__file__, sys.argv[0], sys.orig_argv[:] = "{app}", "{app}", ["{python}", "{app}"]
main.__spec__ = main.__loader__ = main.__cached__ = None
"""
STARTS = {
    "script": ("{claim}{opening}", "second.py is not among the measured"),
    "under a thread that was forked": (
        """{claim}
import os, threading
def fork():
    if child := os.fork(): os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    try: exec({opening!r})
    except SystemExit as end: os._exit(end.code)
threading.Thread(target=fork).start()
""",
        "the program cannot be told",
    ),
    "when it has ended": (
        """{claim}
import atexit, os
@atexit.register
def late():
    try: exec({opening!r})
    except SystemExit as end: os._exit(end.code)
""",
        "the program cannot be told",
    ),
    "with the measured one run within": (
        "{claim}\nimport runpy\nrunpy.run_path('{app}', run_name='__main__')\n",
        "second.py is not among the measured",
    ),
}


@pytest.mark.parametrize("how", STARTS)
def test_another_program_that_names_itself_as_the_measured_one(installation, given, how):
    code, said = STARTS[how]
    names = {"app": installation.folder / "app.py", "python": installation.python}
    claim = CLAIM.format(**names)
    second = installation.write("second.py", code.format(claim=claim, opening=APPLICATION, **names))
    assert said in refused(installation.run(second, *given))


@pytest.mark.parametrize("how", ["option", "run within"])
def test_code_in_no_file_that_names_itself_as_the_measured_program(installation, given, how):
    names = {"app": installation.folder / "app.py", "python": installation.python}
    code = CLAIM.format(**names) + APPLICATION
    if how == "run within":
        code = f"import runpy; runpy.run_path('{names['app']}', run_name='__main__')"
    command = [installation.python, "-c", code, *given]
    done = subprocess.run(command, cwd=installation.folder, capture_output=True, text=True, check=False)
    assert "__main__ is in no file" in refused(done)


@pytest.mark.parametrize("how", ["option", "pipe"])
def test_the_measured_program_run_by_code_in_no_file(installation, given, how):
    """All that the program loads is as measured, its own module included; who began is another."""
    code = "import runpy, sys\nrunpy.run_path('app.py', run_name='__main__')\n"
    command = [installation.python, *(["-c", code] if how == "option" else ["-"]), *given]
    done = subprocess.run(command, input=code, cwd=installation.folder, capture_output=True, text=True, check=False)
    assert "__main__ is in no file" in refused(done)


def test_a_thief_that_replaces_a_function_and_runs_the_measured_program(installation, given):
    """What it hooks is the application's own module, which no check of hwlicense looks into."""
    thief = """
import runpy, sys
sys.path.insert(0, ".")
import logic
logic.prepare = lambda: print("stolen")
runpy.run_path("app.py", run_name="__main__")
"""
    installation.write("thief.py", thief)
    done = start(installation, given, "thief.py")
    assert done.stdout.startswith("stolen\nAPPLICATION_CHANGED "), done.stdout + done.stderr
    assert f"{installation.folder}/thief.py is not among the measured" in done.stdout


def test_bytecode_that_names_itself_as_the_measured_program(installation, given):
    """What it was compiled of is whatever its maker wrote into it, the interpreter's own modules included."""
    app = installation.folder / "app.py"
    second = installation.write("second.py", CLAIM.format(app=app, python=installation.python) + APPLICATION)
    for name in (str(app), "<frozen runpy>", "<string>"):
        compiled = py_compile.compile(str(second), str(installation.folder / "second.pyc"), dfile=name)
        command = [installation.python, compiled, *given]
        said = refused(subprocess.run(command, cwd=installation.folder, capture_output=True, text=True, check=False))
        assert f"{app} does not hold the code that runs" in said or "__main__ is in no file" in said


def test_a_program_that_gives_way_to_the_measured_one(installation, given):
    """What lies on the path is right; what was started is not."""
    good = (installation.folder / "app.py").read_text()
    installation.write("app.py", f"open(__file__, 'w').write({good!r})\n{APPLICATION}")
    assert "app.py does not hold the code that runs" in refused(start(installation, given))


WAYS = """
import multiprocessing, multiprocessing.popen_fork, multiprocessing.popen_forkserver, multiprocessing.popen_spawn_posix
import concurrent.futures.process, multiprocessing.synchronize, os, sys, threading
def opening(arguments):
    import hwlicense
    package, vendor, home, tpm = arguments
    try:
        with hwlicense.open(package, vendor=open(vendor).read(), home=home, tpm=tpm): print("open", flush=True)
    except hwlicense.HwlicenseError as error: print(error.reason, error, flush=True)
def forking(arguments):
    if child := os.fork(): os.waitpid(child, 0)
    else: opening(arguments), os._exit(0)
def elsewhere(target, arguments):
    thread = threading.Thread(target=target, args=(arguments,))
    thread.start(), thread.join()
def main():
    way, *arguments = sys.argv[1:]
    if way == "main": opening(arguments)
    elif way == "thread": elsewhere(opening, arguments)
    elif way == "child": forking(arguments)
    elif way == "thread's child": opening(arguments), elsewhere(forking, arguments)
    elif way == "pool":
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool: pool.submit(opening, arguments).result()
    else:
        child = multiprocessing.get_context(way).Process(target=opening, args=(arguments,))
        child.start(), child.join()
if __name__ == "__main__": main()
"""


@pytest.fixture(scope="module")
def measured_ways(installation, sold):
    target = sold.folder / "ways.toml"
    installation.write("ways.py", WAYS)
    options = ["--python", installation.python, "-o", target, "--", "ways.py", "main", *sold.license()]
    run("vendor", "measure", *options, cwd=installation.folder)
    return sold.license(target.read_text())


@pytest.mark.parametrize("way", ["main", "thread", "child", "thread's child", "fork", "spawn", "forkserver", "pool"])
def test_the_measured_program_opens_in_whatever_process_and_thread(installation, measured_ways, way):
    path = installation.write("ways.py", WAYS)
    said = installation.run(path, way, *measured_ways)
    assert set(said.stdout.split("\n")) == {"open", ""}, said.stdout + said.stderr


def test_the_measured_program_opens_however_it_is_started(installation, measured_ways, tmp_path):
    path = installation.write("ways.py", WAYS)
    (tmp_path / "link").symlink_to(path)
    for command in (["ways.py"], ["-m", "ways"], ["-I", tmp_path / "link"], ["-O", "./ways.py"]):
        done = subprocess.run(
            [installation.python, *command, "main", *measured_ways],
            cwd=installation.folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout == "open\n", done.stdout + done.stderr


def test_modules_of_the_interpreter_that_are_files(installation, sold, measured_ways, tmp_path):
    """What runs a module is then one of them, and is named like any other."""

    def said_by(given):
        command = [installation.python, *options, *given]
        return subprocess.run(command, cwd=installation.folder, capture_output=True, text=True, check=False).stdout

    installation.write("ways.py", WAYS)
    options = ["-X", "frozen_modules=off", "-m", "ways", "main"]
    assert "/runpy.py is not among the measured" in said_by(measured_ways)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {installation.python} -X frozen_modules=off "$@"\n')
    python.chmod(0o755)
    measuring = ["--python", python, "-o", tmp_path / "app.toml", "--", "-m", "ways", "main", *sold.license()]
    run("vendor", "measure", *measuring, cwd=installation.folder)
    given = sold.license((tmp_path / "app.toml").read_text())
    assert said_by(given) == "open\n"
    installation.write("second.py", WAYS + "# another\n")
    options[3] = "second"
    assert "second.py is not among" in said_by(given)


@pytest.mark.parametrize(
    ("work", "said"),
    [("opening", "second.py is not among the measured"), ("exec", "<string> is code in no file")],
)
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_another_program_that_starts_a_child_afresh(installation, measured_ways, method, work, said):
    """There the main module is whatever the parent names, and what was first run is multiprocessing's own code."""
    path = installation.write("ways.py", WAYS)
    claim = CLAIM.format(app=path, python=installation.python)
    code = WAYS.replace('if __name__ == "__main__": main()', "")
    if work == "opening":  # names itself in the child, where it would otherwise be the measured program that runs
        code = code.replace("    import hwlicense\n", indent(claim + "import hwlicense", "    ") + "\n")
        arguments = "sys.argv[1:]"
    else:
        code += claim
        arguments = '"import sys; from __main__ import *; opening(sys.argv[1:])"'
    begin = f"""
if __name__ == "__main__":
    child = multiprocessing.get_context("{method}").Process(target={work}, args=({arguments},))
    child.start(), child.join()
"""
    second = installation.write("second.py", code + begin)
    done = installation.run(second, *measured_ways)
    assert done.stdout.startswith("APPLICATION_CHANGED "), done.stdout + done.stderr
    assert said in done.stdout


EMBEDDING = """
#include <Python.h>
int main(int argc, char **argv) {
    Py_NoSiteFlag = 1;
    Py_InitializeEx(0);
    PyRun_SimpleString("import sys; sys.path[:0] = ['%s', '.']");
    PyObject *given = PyList_New(0);
    for (int each = 0; each < argc; each++) PyList_Append(given, PyUnicode_FromString(argv[each]));
    PySys_SetObject("argv", given);
    if (!strcmp(argv[1], "file")) PyRun_SimpleFile(fopen("ways.py", "r"), "ways.py");
    else if (!strcmp(argv[1], "text")) PyRun_SimpleString("import ways, sys; ways.opening(sys.argv[2:])");
    else PyObject_CallMethod(PyImport_ImportModule("ways"), "opening", "O", PyList_GetSlice(given, 2, argc));
    return Py_FinalizeEx();
}
"""


def test_a_program_in_c_that_embeds_python(installation, sold, tmp_path):
    """It runs a file, which is the program; of other Python code that it runs, nobody can say whose it is."""
    installation.write("ways.py", WAYS.replace('way == "main"', 'way == "file"'))
    (tmp_path / "embedding.c").write_text(EMBEDDING % installation.packages)
    flags = [sysconfig.get_config_var(name) for name in ("INCLUDEPY", "LIBDIR", "LDVERSION")]
    options = [f"-I{flags[0]}", f"-L{flags[1]}", f"-Wl,-rpath,{flags[1]}", f"-lpython{flags[2]}"]
    program = tmp_path / "embedding"
    subprocess.run(["gcc", "-o", program, tmp_path / "embedding.c", *options], check=True)
    target = tmp_path / "app.toml"
    library = Path(flags[1], sysconfig.get_config_var("INSTSONAME"))
    files = ("--file", str(program), "--file", str(library))
    run(
        "vendor", "measure", "--python", installation.python, *files, "-o", target,
        "--", "ways.py", "file", *sold.license(), cwd=installation.folder,
    )  # fmt: skip
    interpreter = os.path.realpath(installation.python)
    given = sold.license(target.read_text().replace(f'"{interpreter}", ', "", 1))
    environment = {"PYTHONHOME": sys.base_prefix}
    for way, said in (("file", "open"), ("text", "__main__ is in no file"), ("call", "the program cannot be told")):
        command = [program, way, *given]
        done = subprocess.run(
            command, cwd=installation.folder, env=environment, capture_output=True, text=True, check=False
        )
        assert said in done.stdout, done.stdout + done.stderr


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


def test_a_line_of_a_path_file_goes_unseen(installation, given):
    """It is in no module; the guard's `site` finds the file. docs/guard.md says so."""
    with installation.laid("spy.pth", "import sys; sys.spied = True\n"):
        assert start(installation, given).stdout.startswith("open\nsite: ")


def test_another_hwlicense_beside_the_program(installation, given):
    """Whose checks are as they were: with others it would be the one that looks."""
    shutil.copytree(installation.packages / "hwlicense", installation.folder / "hwlicense")
    with (installation.folder / "hwlicense" / "device" / "model.py").open("a") as file:
        file.write("# changed\n")
    assert "hwlicense/device/model.py is another than measured" in refused(start(installation, given))


def test_what_an_opening_needs_is_measured_of_a_program_that_never_asks_for_findings(installation, sold):
    """Which of this package is imported depends on the license, and that comes after the measuring."""
    code = OPENING.replace('*(f"{one.check}: {one.what}" for one in model.findings), ', "")
    assert "findings" not in code
    installation.write("quiet.py", code)
    guard = '[guard]\nrefuse = ["debugger", "tracing", "preloaded", "replaced"]\ninterval = "1s"\n'
    given = sold.license(measure(installation, sold, "quiet.py") + guard)
    done = start(installation, given, "quiet.py")
    assert done.stdout == "open\n", done.stdout + done.stderr


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
        (["--python", sys.executable, "--file", "fine.py"], "USAGE"),
        (["--file", "absent"], "FILE_ABSENT"),
        (["--pid", "999999999"], "USAGE"),
        (["--", "absent.py"], "FILE_ABSENT"),
        (["--", "fails.py"], "USAGE"),
        (["--", "-m", "absent"], "USAGE"),
        (["--", "-m", "absent.late"], "USAGE"),
        (["--python", "./bare", "--", "fine.py"], "USAGE"),
        (["--python", "absent", "--", "fine.py"], "FILE_ABSENT"),
        (["--python", "/bin/false", "--", "fine.py"], "USAGE"),
    ],
)
def test_what_cannot_be_measured(tmp_path, arguments, reason):
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    (tmp_path / "fine.py").write_text("")
    (tmp_path / "bare").write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    (tmp_path / "bare").chmod(0o755)
    done = run("vendor", "measure", "-o", "app.toml", *arguments, cwd=tmp_path, status=None)
    assert done.returncode == 2
    assert f"reason: {reason}" in done.stderr
    assert not (tmp_path / "app.toml").exists()
    if "-m" in arguments[:-1]:
        assert f"{arguments[-1]} is no module that this Python finds" in done.stderr
    if "./bare" in arguments:
        assert " cannot import hwlicense (No module named 'hwlicense')" in done.stderr


ENDLESS = {
    "as any": "",
    "with a handler": "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit('ended'))",
    "in a thread": "threading.Thread(target=time.sleep, args=(60,)).start(); print('up', flush=True); sys.exit()",
}


@pytest.mark.parametrize("how", ENDLESS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_that_never_ends_is_measured_by_a_signal(tmp_path, number, how):
    lines = f"import json, sys, threading, time\n{ENDLESS[how]}\nprint('up', flush=True)\nimport late\ntime.sleep(60)\n"
    (tmp_path / "endless.py").write_text(lines)
    (tmp_path / "late.py").write_text("")
    command: list[str | Path] = [PROGRAM, "vendor", "measure", "-o", "app.toml", "--", "endless.py"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as measuring:
        assert measuring.stderr.readline() == "up\n"
        time.sleep(0.3)
        measuring.send_signal(number)
        said = measuring.communicate(timeout=30)[1]
    assert measuring.returncode == 0, said
    assert "Traceback" not in said
    table = tomllib.loads((tmp_path / "app.toml").read_text())["application"]
    assert {Path(name).name for name in table["required"]} == {
        "endless.py",
        Path(os.path.realpath(sys.executable)).name,
    }
    assert (str(tmp_path / "late.py") in table["files"]) == (how != "in a thread")


def test_a_program_is_measured_however_it_ends(tmp_path):
    """At once, with what its threads and exit handlers import; not by what it forks."""
    (tmp_path / "leaves.py").write_text("import os, wave\nif not os.fork(): os._exit(0)\nos._exit(0)")
    late = "import atexit, threading, time\natexit.register(lambda: __import__('wave'))\n"
    late += "threading.Thread(target=lambda: (time.sleep(0.5), __import__('chunk_'))).start()"
    (tmp_path / "late.py").write_text(late)
    (tmp_path / "chunk_.py").write_text("")
    for name, expected in (("leaves.py", {"wave.py"}), ("late.py", {"wave.py", "chunk_.py"})):
        run("vendor", "measure", "-o", "app.toml", "--force", "--", name, cwd=tmp_path)
        table = tomllib.loads((tmp_path / "app.toml").read_text())["application"]
        assert {Path(each).name for each in table["files"]} >= expected


def test_measuring_what_exec_runs_over(tmp_path, vendor):
    with Tpm() as tpm:
        sold = Sold(tmp_path, vendor, tpm)

        def command(given):
            package, _, home, tcti = given
            return ["exec", package, "--fd", "--home", home, "--tpm", tcti, "--", "true"]

        for start in (["-m", "hwlicense"], [PROGRAM]):
            run("vendor", "measure", "--force", "-o", tmp_path / "app.toml", "--", *start, *command(sold.license()))
            begin = [sys.executable, *start] if start[0] == "-m" else start
            words = [*begin, *command(sold.license((tmp_path / "app.toml").read_text()))]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        bare = f'[application.files]\n"a" = "{"0" * 64}"\n'
        done = run(*command(sold.license(bare)), status=1)
        lines = done.stderr.splitlines()
        assert [line.partition(":")[0] for line in lines[:3]] == ["error", "reason", "hint"]
        assert len(lines) > 100
        assert all(line.startswith("  /") and line.endswith(" is not among the measured") for line in lines[3:])


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
    assert program.written(one) == program.written(compile(source, "a", "exec", dont_inherit=True))
    assert program.written(one) != program.written(
        compile(source.replace("1.5", "1.6"), "a", "exec", dont_inherit=True)
    )
    assert kept
