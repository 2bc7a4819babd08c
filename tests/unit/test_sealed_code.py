"""Sealed code through Python's own import system: modules, data, native modules, other processes."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.packages import content_key
from tests.sealed import CODE, Sealed, native

IMPORTED = """
with opened() as model, model.importer():
    import reader, reader.deep.down
    from reader.numbers import Part, fail
"""


@pytest.fixture(scope="module")
def sealed(vendor, tmp_path_factory):
    return Sealed(vendor, tmp_path_factory.mktemp("sealed"), entry="reader.numbers:double")


def test_modules_come_from_the_package(sealed):
    done = sealed.run(
        IMPORTED
        + """
    print(reader.double(4), reader.deep.down.VALUE, Part.__module__, model.names)
    print(reader.__file__, reader.__path__, reader.__spec__.loader.get_source("reader"))
print(any(path.startswith("/proc/") for path in sys.path))
import reader.numbers
print(reader.double(5))
"""
    )
    root = "/proc/self/hwlicense/reader"
    assert done.stdout.splitlines() == [
        "8 42 reader.numbers ('weights.bin',)",
        f"{root}/reader/__init__.py ['{root}/reader'] None",
        "False",
        "10",
    ]


def test_a_traceback_names_module_line_and_function_and_shows_no_source(sealed):
    done = sealed.run(IMPORTED + "    fail()\n", status=1)  # the standard library has a numbers.py, too
    assert '  File "<sealed reader/reader/numbers.py>", line 6, in fail\nValueError: no number' in done.stderr
    done = sealed.run(
        "import traceback\n" + IMPORTED + "    try: fail()\n    except ValueError: traceback.print_exc()\n"
    )
    assert '  File "<sealed reader/reader/numbers.py>", line 6, in fail\nValueError: no number' in done.stderr


def test_what_is_missing_is_not_there(sealed):
    done = sealed.run(
        IMPORTED
        + """
    try:
        import reader.gone
    except ModuleNotFoundError as error:
        print(error, error.name)
"""
    )
    assert done.stdout == "No module named 'reader.gone' in the sealed code reader.gone\n"


def test_listing_and_running_modules(sealed):
    done = sealed.run(
        IMPORTED
        + """
    import pkgutil, runpy
    print([m.name for m in pkgutil.walk_packages(reader.__path__, "reader.")])
    print([m.name for m in pkgutil.iter_modules() if m.name.startswith("reader")])
    print(pkgutil.resolve_name("reader.numbers:double")(1), runpy.run_module("reader.deep.down")["VALUE"])
"""
    )
    assert done.stdout.splitlines() == [
        "['reader.deep', 'reader.deep.down', 'reader.numbers']",
        "['reader']",
        "2 42",
    ]


def test_data_files(sealed):
    done = sealed.run(
        """
import importlib.resources, pkgutil
with opened() as model, model.importer():
    import reader
    files = importlib.resources.files(reader)
    print(sorted(each.name for each in files.iterdir()), files.is_dir(), files)
    labels = files / "data" / "labels.txt"
    print(labels.read_text().split(), labels.open("rb").read(4), labels.open(encoding="ascii").readline(), labels.name)
    print((files / "data/empty").read_bytes(), pkgutil.get_data("reader", "data/labels.txt"))
    print([each.name for each in importlib.resources.files("reader.data").iterdir()])
    with importlib.resources.as_file(labels) as path:
        print(path.parent, path.read_text().split())
    with importlib.resources.path("reader.data", "labels.txt") as path:
        print(path.parent)
    for what in ("gone", "../secret", "/etc/passwd", "__init__.cpython-311.pyc", "data/../data/labels.txt"):
        each = files / what
        try:
            each.read_bytes()
        except FileNotFoundError:
            print("absent", each.is_file(), each.is_dir())
    try:
        with importlib.resources.as_file(files):
            pass
    except Exception as error:
        print(error.reason)
    up = lambda: pkgutil.get_data("reader", "../../../x")
    for wrong in (up, lambda: files.read_bytes(), lambda: labels.open("w")):
        try:
            wrong()
        except (OSError, ValueError) as error:
            print(type(error).__name__)
"""
    )
    assert done.stdout.splitlines() == [
        "['data', 'deep'] True <sealed reader>",
        "['bolt', 'nut'] b'bolt' bolt",
        " labels.txt",
        "b'' b'bolt\\nnut\\n'",
        "['empty', 'labels.txt']",
        "/proc/self/fd ['bolt', 'nut']",
        "/proc/self/fd",
        *["absent False False"] * 5,
        "USAGE",
        "FileNotFoundError",
        "IsADirectoryError",
        "ValueError",
    ]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("isolated", [(), ("-I",)])
def test_other_processes(sealed, method, isolated):
    done = sealed.run(
        """
import multiprocessing, os, pickle
from concurrent.futures import ProcessPoolExecutor

def main():
    with opened() as model, model.importer():
        from reader.numbers import Part, double
        context = multiprocessing.get_context(sys.argv[4])
        with context.Pool(2) as pool:
            print(pool.map(double, [1, 2, 3]))
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            print(pool.submit(Part, "bolt").result() == Part("bolt"))
        child = context.Process(target=os._exit, args=(double(3),))
        child.start()
        child.join()
        print(child.exitcode, type(pickle.loads(pickle.dumps(sys.path[-1]))).__name__)

if __name__ == "__main__":
    main()
""",
        method,
        options=isolated,
    )
    assert done.stdout.splitlines() == ["[2, 4, 6]", "True", "6 str"]


def test_children_hand_it_on(vendor, tmp_path):
    files = {
        **CODE,
        "reader/family.py": (
            "import importlib.resources, multiprocessing, os\n\n\n"
            "def talk(pipe, more):\n"
            "    if more:\n"
            "        here, there = multiprocessing.get_context('spawn').Pipe()\n"
            "        child = multiprocessing.get_context('spawn').Process(target=talk, args=(there, more - 1))\n"
            "        child.start()\n"
            "        pipe.send(here.recv())\n"
            "        child.join()\n"
            "        return\n"
            "    with importlib.resources.as_file(importlib.resources.files('reader') / 'data/labels.txt') as path:\n"
            "        pipe.send((path.read_text(), str(path.parent), __file__))\n"
        ),
    }
    done = Sealed(vendor, tmp_path, files).run(
        """
import multiprocessing

def main():
    with opened() as model, model.importer():
        from reader.family import talk
        here, there = multiprocessing.Pipe()
        child = multiprocessing.get_context("forkserver").Process(target=talk, args=(there, 2))
        child.start()
        print(here.recv())
        child.join()

if __name__ == "__main__":
    main()
"""
    )
    assert done.stdout == "('bolt\\nnut\\n', '/proc/self/fd', '/proc/self/hwlicense/reader/reader/family.py')\n"


NATIVE = """
#include <Python.h>
static PyObject *answer(PyObject *self, PyObject *none) { return PyLong_FromLong(%d); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "%s", "", -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit_%s(void) { return PyModule_Create(&module); }
"""


def test_native_modules(vendor, tmp_path):
    made = [native(tmp_path / "built", name, NATIVE % (value, name, name)) for name, value in (("one", 1), ("two", 2))]
    files: dict[str, str | bytes] = {
        "fast/__init__.py": "from fast.one import answer as first\nfrom fast.two import answer as second\n",
        **{f"fast/{path.name}": path.read_bytes() for path in made},
        "alone.abi3.so": native(tmp_path / "built", "alone", NATIVE % (3, "alone", "alone")).read_bytes(),
    }
    done = Sealed(vendor, tmp_path, files, entry="alone:answer").run(
        """
import multiprocessing

def main():
    with opened() as model:
        with model.importer():
            import alone, fast
            print(fast.first(), fast.second(), alone.answer(), fast.one.__file__.rpartition("/")[0])
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.apply(alone.answer))
    with opened() as model, model.importer():
        import importlib
        print(importlib.reload(fast).second())
    print(fast.first(), open(fast.one.__file__, "rb").read(4))

if __name__ == "__main__":
    main()
"""
    )
    assert done.stdout.splitlines() == ["1 2 3 /proc/self/fd", "3", "2", "1 b'\\x7fELF'"]


def test_closed_and_opened_again(sealed):
    done = sealed.run(
        """
import importlib.resources
model = opened()
importer = model.importer()
importer.install()
importer.install()
import reader
model.close()
try:
    import reader.deep.down
except Exception as error:
    print(error.reason, isinstance(error, ImportError), reader.double(2))
importer.remove()
importer.remove()
with opened() as model, model.importer():
    import reader.deep.down
    print((importlib.resources.files(reader) / "data/labels.txt").read_text().split())
"""
    )
    assert done.stdout.splitlines() == ["MODEL_CLOSED False 4", "['bolt', 'nut']"]


def test_a_package_without_code(vendor, tmp_path):
    made = Sealed(vendor, tmp_path)
    made.package = vendor.package
    made.key = content_key(vendor, vendor.manifest)
    done = made.run("try:\n    opened().importer()\nexcept Exception as error:\n    print(error.reason)\n")
    assert done.stdout == "CODE_ABSENT\n"


@pytest.fixture
def scratch():
    with TemporaryDirectory() as folder:  # short: multiprocessing makes sockets in TMPDIR
        yield Path(folder)


def test_nothing_is_left_on_any_disk(vendor, tmp_path, scratch):
    sealed = Sealed(vendor, tmp_path)
    places = {name: str(scratch / name) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "PYTHONPYCACHEPREFIX")}
    for place in places.values():
        Path(place).mkdir()
    before = set(tmp_path.rglob("*"))
    done = sealed.run(
        """
import importlib.resources, multiprocessing
if __name__ == "__main__":
    with opened() as model, model.importer():
        import reader.deep.down
        with importlib.resources.as_file(importlib.resources.files(reader) / "data" / "labels.txt") as path:
            for method in ("spawn", "forkserver"):
                with multiprocessing.get_context(method).Pool(1) as pool:
                    print(pool.apply(reader.double, (4,)))
""",
        env=os.environ | places,
    )
    assert done.stdout == "8\n8\n"
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "here", tmp_path / "script.py"}
    made = {path for path in scratch.rglob("*") if path.is_file()}
    assert {path for path in made if not path.is_relative_to(places["PYTHONPYCACHEPREFIX"])} == set()
    assert {
        path for path in made if "reader/" in str(path) or b"a marker in the docstring" in path.read_bytes()
    } == set()
