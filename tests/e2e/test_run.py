"""`hwlicense run`, from packing to the program's exit status, through the installed command line alone."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hwlicense
from hwlicense.core.keys import unwrap_for_vendor
from hwlicense.vendor.folder import Folder
from hwlicense.vendor.packing import read_manifest
from hwlicense_simulators import Tpm
from tests.packages import decrypt
from tests.sealed import native, written
from tests.world import PROGRAM, TERMS, run

NATIVE = """
#include <Python.h>
static PyObject *answer(PyObject *self, PyObject *none) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "fast", "", -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit_fast(void) { return PyModule_Create(&module); }
"""
FILES = {
    "inspector/__init__.py": "",
    "inspector/program.py": '''
"""A program that is sealed."""
import atexit, json, multiprocessing, os, sys, threading, time
import hwlicense
from inspector.parts import Part, find

def main():
    model = hwlicense.current()
    print(json.dumps([sys.argv[1:], bytes(model.read("weights.bin")).decode(), find(3), sys.flags.isolated]))

def ends():
    how = sys.argv[1]
    if how == "status": return 7
    if how == "text": return "it went wrong"
    if how == "exit": sys.exit(9)
    if how == "hard": os._exit(11)
    if how == "raise": find(None)
    if how == "refused": hwlicense.current().require("night-shift")
    if how == "missing": import inspector.gone
    if how == "absent": import no_such_module
    if how == "late":
        atexit.register(lambda: print("at exit", hwlicense.current().closed))
        threading.Thread(target=lambda: (time.sleep(0.3), print("thread", hwlicense.current().closed))).start()
    if how == "fork":
        child = os.fork()
        if child == 0:
            os._exit(len(hwlicense.current().read("weights.bin")))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def start():
    context = multiprocessing.get_context(sys.argv[1])
    with context.Pool(2) as pool:
        print(pool.map(find, [1, 2]), pool.apply(Part, ("bolt",)) == Part("bolt"))
    child = context.Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join()
    print(child.exitcode)

def child_asks():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(hwlicense.current)

def resources():
    import importlib.resources
    (importlib.resources.files("inspector") / "absent.txt").read_text()

def native():
    from inspector.fast import answer
    print(answer())

def wait():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", hwlicense.current().closed)

def spend():
    for _ in range(3):
        hwlicense.current().spend()
    print("spent", flush=True)
    if sys.argv[1:] == ["wait"]:
        time.sleep(60)

def started():
    from hwlicense.program import origins
    print(json.dumps([each._asdict() for each in origins()]))

def environment():
    print(json.dumps([sorted(n for n in os.environ if n.startswith(("PYTHON", "LD_"))), sys.path[0] != ""]))
''',
    "inspector/parts.py": (
        "def find(x):\n    assert x != 99, 'a check'\n    return x + 1\n\n\nclass Part(str):\n    pass\n"
    ),
    "inspector/broken.py": "import inspector.parts\nraise RuntimeError('while it was imported')\n",
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A vendor, and a device whose license opens the program."""
    folder = tmp_path_factory.mktemp("shop")
    written(folder / "source", FILES)
    native(folder / "source" / "inspector", "fast", NATIVE)
    (folder / "weights.bin").write_text("made-up weights")
    with Tpm() as tpm:
        run("vendor", "init", folder / "vendor", "--no-passphrase", "--name", "Acme")
        pack(folder, "--code", folder / "source" / "inspector", "--entry", "inspector.program:main")
        deliver(folder, tpm, "home", TERMS)
        deliver(folder, tpm, "limited", TERMS + "[limits]\ninferences = 100\n")
        yield folder


def deliver(folder, tpm, home, terms):
    request, licensed, text = (folder / f"{home}{ending}" for ending in (".hwreq", ".hwlic", ".toml"))
    text.write_text(terms)
    run("device", "enroll", "--home", folder / home, "--tpm", tpm.tcti, "-o", request)
    given = ("--request", request, "--package", folder / "program.hwpkg")
    agreed = ("--terms", text, "--ek-root", f"virtual={tpm.ek_root}")
    run("vendor", "issue", "--vendor", folder / "vendor", *given, *agreed, "-o", licensed)
    run("device", "trust", "--home", folder / home, folder / "vendor" / "vendor.pub.json")
    run("device", "install", "--home", folder / home, licensed)


def pack(folder, *code, status=0, out="program.hwpkg", inputs=("weights.bin",)):
    named = ("--vendor", folder / "vendor", "--name", "inspector", "--version", "1", "-o", folder / out)
    return run("vendor", "pack", *named, *code, *(folder / name for name in inputs), status=status)


def sealed(shop, *arguments, entry=None, status=0, **options):
    chosen = ("--entry", f"inspector.{entry}") if entry else ()
    command = [PROGRAM, "run", "--home", shop / "home", *chosen, shop / "program.hwpkg", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)
    assert done.returncode == status, done.stdout + done.stderr
    assert "hwlicense/cli" not in done.stderr
    return done


def reason(done):
    return next(line.removeprefix("reason: ") for line in done.stderr.splitlines() if line.startswith("reason: "))


def test_the_program_runs_with_its_arguments_and_its_model(shop, tmp_path):
    done = sealed(shop, "--", "--part", "7", "-x", cwd=tmp_path)
    assert json.loads(done.stdout) == [["--part", "7", "-x"], "made-up weights", 4, 1]
    assert json.loads(sealed(shop, "a", "--home", "b").stdout)[0] == ["a", "--home", "b"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("how", "status", "told"),
    [
        ("nothing", 0, ""),
        ("status", 7, ""),
        ("text", 1, "it went wrong\n"),
        ("exit", 9, ""),
        ("hard", 11, ""),
        ("fork", 15, ""),
        ("refused", 1, "error: The license does not have the feature 'night-shift'.\nreason: FEATURE_ABSENT\nhint: "),
        ("raise", 1, 'File "<sealed inspector/inspector/parts.py>", line 3, in find\nTypeError: unsupported operand'),
        ("missing", 1, "ModuleNotFoundError: No module named 'inspector.gone' in the sealed code\n"),
        ("absent", 1, "ModuleNotFoundError: No module named 'no_such_module'\n"),
    ],
)
def test_how_a_program_ends(shop, how, status, told):
    done = sealed(shop, how, entry="program:ends", status=status)
    assert told in done.stderr
    assert bool(done.stderr) == bool(told)
    assert ("Traceback" in done.stderr) == (how in {"raise", "missing", "absent"})
    if "Traceback" in done.stderr:
        assert done.stderr.splitlines()[1].startswith('  File "<sealed inspector/inspector/program.py>", line ')


def test_threads_and_exit_handlers_still_have_the_model(shop):
    assert sealed(shop, "late", entry="program:ends").stdout == "thread False\nat exit False\n"


def test_what_finds_and_reads_sealed_code_is_not_shown(shop):
    """As Python does not show its own importing."""
    for arguments, entry in ((["missing"], "program:ends"), ([], "program:resources")):
        shown = sealed(shop, *arguments, entry=entry, status=1).stderr
        assert shown.count('  File "') == 1
        assert '  File "<sealed inspector/inspector/program.py>", line ' in shown


def test_a_module_that_fails_is_shown_as_the_programs_own(shop):
    done = sealed(shop, entry="broken:main", status=1)
    assert done.stderr == (
        'Traceback (most recent call last):\n  File "<sealed inspector/inspector/broken.py>", line 2, in <module>\n'
        "RuntimeError: while it was imported\n"
    )


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_program_starts_processes(shop, method):
    assert sealed(shop, method, entry="program:start").stdout.splitlines() == ["[2, 3] True", "-15"]


def test_a_child_that_was_started_afresh_has_no_model(shop):
    done = sealed(shop, entry="program:child_asks", status=2)
    assert reason(done) == "USAGE"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_signals_reach_the_program(shop, number, status):
    command = [PROGRAM, "run", "--home", shop / "home", "--entry", "inspector.program:wait", shop / "program.hwpkg"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        printed, told = process.communicate(timeout=60)
    assert (process.returncode, printed) == (status, "cleaned up False\n"), told


def test_what_ignores_the_end_of_its_terminal_still_does(shop):
    command = [PROGRAM, "run", "--home", shop / "home", "--entry", "inspector.program:wait", shop / "program.hwpkg"]
    with subprocess.Popen(["nohup", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.terminate()
        assert process.wait(60) == 143


@pytest.mark.parametrize("arguments", [(), ("wait",)])
def test_what_is_not_spent_is_given_back_at_the_end(shop, arguments):
    def left():
        shown = run("device", "status", "--json", "--home", shop / "limited").stdout
        (limit,) = (limit for each in json.loads(shown)["licenses"] for limit in each["limits"])
        return 100 if limit["left"] is None else limit["left"]  # not known before the first opening

    before = left()
    command = [PROGRAM, "run", "--home", shop / "limited", "--entry", "inspector.program:spend"]
    with subprocess.Popen([*command, shop / "program.hwpkg", *arguments], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"spent\n"
        if arguments:
            process.terminate()
        assert process.wait(60) == (143 if arguments else 0)
    assert left() == before - 3


def test_nothing_of_the_environment_gets_in(shop, tmp_path):
    for name in ("inspector", "json", "sitecustomize", "hwlicense"):
        (tmp_path / f"{name}.py").write_text(f"print('{name} from elsewhere')\n")
    hostile = {"PYTHONPATH": str(tmp_path), "PYTHONINSPECT": "1", "PYTHONPYCACHEPREFIX": str(tmp_path / "cache")}
    hostile |= {"LD_PRELOAD": str(tmp_path / "no.so"), "PYTHONWARNINGS": "error", "LD_AUDIT": ""}
    del hostile["PYTHONINSPECT"]
    clean = {name: text for name, text in os.environ.items() if not name.startswith("LD_")}  # some libraries set them
    done = subprocess.run(
        [sys.executable, "-I", "-m", "hwlicense", "run", "--home", shop / "home", "--entry",
         "inspector.program:environment", shop / "program.hwpkg"],
        cwd=tmp_path, env=clean | hostile, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == [[], True]
    assert not (tmp_path / "cache").exists()


def test_the_program_that_a_license_names_is_hwlicense_itself(shop):
    """As for any program that -m starts: what runs within is covered by the package's signatures."""
    done = subprocess.run(
        [PROGRAM, "run", "--home", shop / "home", "--entry", "inspector.program:started", shop / "program.hwpkg"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == [{"file": str(Path(hwlicense.__file__).with_name("__main__.py")), "problem": ""}]


@pytest.mark.parametrize("way", ["module", "command"])
def test_what_run_loads_is_measured_and_then_required(shop, way, tmp_path):
    """In the isolated process that it starts anew; a native module of the package is not among it."""
    start = ["-m", "hwlicense"] if way == "module" else [PROGRAM]
    given = ["run", "--home", shop / "home", "--entry", "inspector.program:native", shop / "program.hwpkg"]
    hostile = os.environ | {"PYTHONPATH": str(tmp_path), "LD_PRELOAD": str(tmp_path / "no.so")}
    run("vendor", "measure", "-o", tmp_path / "app.toml", "--", *start, *given, env=hostile)
    table = tomllib.loads((tmp_path / "app.toml").read_text())["application"]
    own = str(Path(hwlicense.__file__).with_name("__main__.py"))
    assert own in table["required"]
    assert not [name for name in table["files"] if name.startswith(("/memfd", "<"))]
    with Tpm() as tpm:
        deliver(shop, tpm, f"measured-{way}", TERMS + (tmp_path / "app.toml").read_text())
        how = ["--home", shop / f"measured-{way}", "--tpm", tpm.tcti, "--entry", "inspector.program:native"]
        assert run("run", *how, shop / "program.hwpkg").stdout == "42\n"


@pytest.mark.parametrize(
    ("entry", "expected", "said"),
    [
        ("gone:main", "ENTRY_ABSENT", "no module 'inspector.gone'"),
        ("program:gone", "ENTRY_ABSENT", "no 'gone'"),
        ("program", "ENTRY_ABSENT", "is no entry point"),
        ("program:main()", "ENTRY_ABSENT", "is no entry point"),
    ],
)
def test_entries_that_are_not_there(shop, entry, expected, said):
    done = sealed(shop, entry=entry, status=2)
    assert reason(done) == expected
    assert said in done.stderr


def test_packages_without_a_program(shop):
    pack(shop, out="plain.hwpkg")
    pack(shop, "--code", shop / "source" / "inspector", out="library.hwpkg", inputs=())
    for name, expected in (("plain.hwpkg", "CODE_ABSENT"), ("library.hwpkg", "ENTRY_ABSENT")):
        assert reason(run("run", "--home", shop / "home", shop / name, status=2)) == expected
    started = ("run", "--home", shop / "home", "--entry", "inspector.program:main", shop / "library.hwpkg")
    assert reason(run(*started, status=1)) == "WRONG_PACKAGE"


def test_options_about_code_need_code(shop):
    for option in (("--entry", "a:b"), ("--python", "3.12"), ("-O",)):
        assert reason(pack(shop, *option, out="none.hwpkg", status=2)) == "USAGE"
    assert reason(pack(shop, out="none.hwpkg", inputs=(), status=2)) == "USAGE"
    absent = ("--code", shop / "source" / "inspector", "--entry", "inspector.program:gone")
    assert reason(pack(shop, *absent, out="none.hwpkg", status=2)) == "ENTRY_ABSENT"
    assert not (shop / "none.hwpkg").exists()


def test_inspect_and_check_know_of_code(shop):
    shown = run("inspect", shop / "program.hwpkg").stdout
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert (
        f"code         for Python {here}; 4 files" in " ".join(shown.split("  ")).replace("   ", " ") or here in shown
    )
    assert "begins at inspector.program:main" in shown
    assert "files" in shown
    document = json.loads(run("inspect", "--json", shop / "program.hwpkg").stdout)["document"]
    assert document["code"] == {"entry": "inspector.program:main", "versions": [here]}
    run("device", "check", "--open", "--home", shop / "home", shop / "program.hwpkg")


def test_no_source_and_no_path_of_the_vendors_is_in_the_bytecode(shop):

    def members(name):
        place = Folder(shop / "vendor")
        manifest = read_manifest(shop / name, place.public)
        key = unwrap_for_vendor(manifest.wrapped_content_key, manifest.content_key, place.unlock(None).content)
        return decrypt((shop / name).read_bytes(), bytes(key.buffer))

    plain = members("program.hwpkg")
    assert sorted({name.rpartition(".")[2] for name in plain}) == ["bin", "pyc", "so"]
    together = b"".join(plain.values())
    assert str(shop).encode() not in together
    assert b"return x + 1" not in together
    assert b"A program that is sealed" in together
    assert b"a check" in together
    pack(shop, "--code", shop / "source" / "inspector", "-OO", out="bare.hwpkg")
    bare = b"".join(members("bare.hwpkg").values())
    assert b"A program that is sealed" not in bare
    assert b"a check" not in bare
