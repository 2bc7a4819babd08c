"""Attacks on sealed code: other modules in its place, itself in others' place, plaintext where it should not be."""

from __future__ import annotations

import pytest

from hwlicense.core.documents import Code
from hwlicense.core.errors import Reason, UsageError
from hwlicense.vendor.compiling import compile_code
from tests.packages import content_key, pack
from tests.sealed import CODE, Sealed, written

REFUSED = """
import hwlicense
with opened() as model:
    try:
        model.importer().install()
    except hwlicense.UsageError as error:
        print(error.reason, error)
    print(len([path for path in sys.path if path.startswith("/proc/self")]))
"""


@pytest.mark.parametrize("name", ["reader.py", "reader/__init__.py", "reader/names.txt", "reader.abi3.so"])
def test_a_module_in_its_place_is_refused_beforehand(vendor, tmp_path, name):
    sealed = Sealed(vendor, tmp_path)
    written(tmp_path, {name: ""})  # beside the script: the first place where Python looks
    printed = sealed.run(REFUSED).stdout.splitlines()
    assert printed[0].startswith("MODULE_SHADOWED The sealed code has a module 'reader', which is also found in ")
    assert printed[1] == "0"


def test_it_takes_no_module_that_is_there_already(vendor, tmp_path):
    sealed = Sealed(vendor, tmp_path, {"pluggy/__init__.py": "", "iniconfig.py": ""})
    assert "a module 'pluggy', which is already imported" in sealed.run("import pluggy\n" + REFUSED).stdout
    assert "a module 'iniconfig', which is also found in" in sealed.run(REFUSED).stdout
    odd = "import types\nsys.modules['pluggy._hooks'] = types.ModuleType('pluggy._hooks')\n"
    assert "a module 'pluggy', which is already imported from elsewhere" in sealed.run(odd + REFUSED).stdout


def test_a_module_that_comes_later_is_not_taken(vendor, tmp_path):
    sealed = Sealed(vendor, tmp_path)
    done = sealed.run(
        """
import os
with opened() as model, model.importer():
    for place in (Path(sys.argv[0]).parent, Path.cwd()):
        (place / "reader").mkdir()
        for name in ("__init__", "numbers", "evil"):
            (place / "reader" / f"{name}.py").write_text("print('evil')")
    sys.path[:0] = ["", os.getcwd(), "."]
    import reader.numbers
    print(reader.numbers.double(1))
    # even where the importer is taken away
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder.__class__.__name__ != "Importer"]
    hooks = sys.path_hooks[:]
    for keep in (hooks, [hook for hook in hooks if "sealed_code" not in repr(hook)]):
        sys.path_hooks[:] = keep
        sys.path_importer_cache.clear()
        try:
            import reader.evil
        except ModuleNotFoundError as error:
            print("not there")
"""
    )
    assert done.stdout.splitlines() == ["2", "not there", "not there"]


def test_two_packages_hide_nothing_of_each_other(vendor, tmp_path):
    sealed = Sealed(vendor, tmp_path)
    done = sealed.run(
        """
with opened() as one, opened() as two, one.importer():
    try:
        two.importer().install()
    except Exception as error:
        print(error.reason)
"""
    )
    assert done.stdout == "MODULE_SHADOWED\n"


LOST = """
import multiprocessing, hwlicense
if __name__ == "__main__":
    with opened() as model, model.importer():
        import reader
        model.lose_keys(hwlicense.AbsentError(hwlicense.Reason.DONGLE_ABSENT, "The dongle was pulled.", "Plug it in."))
        try:
            try:
                import reader.deep.down
            except ImportError:
                print("taken for a module that is not installed")
        except hwlicense.HardwareError as error:
            print(error.reason, error.hint)
        child = multiprocessing.get_context("spawn").Process(target=reader.double, args=(1,))
        try:
            child.start()
        except hwlicense.HardwareError as error:
            print(error.reason)
        print(reader.double(4))
"""


def test_a_refusal_is_no_missing_module(vendor, tmp_path):
    done = Sealed(vendor, tmp_path).run(LOST)
    assert done.stdout.splitlines() == ["DONGLE_ABSENT Plug it in.", "DONGLE_ABSENT", "8"]


def test_changed_code_is_not_run(vendor, tmp_path):
    sealed = Sealed(vendor, tmp_path, {"reader/__init__.py": "print('run')\n"})
    raw = bytearray(sealed.package.read_bytes())
    at = len(raw) - len(b"weights") - 16 - 40  # in the last chunk of code: members go by name, and . is before w
    raw[at] ^= 1
    sealed.package.write_bytes(raw)
    done = sealed.run(
        "with opened() as model, model.importer():\n    try:\n        import reader\n"
        "    except Exception as error:\n        print(error.reason, isinstance(error, ImportError))\n"
    )
    assert done.stdout == "PACKAGE_DAMAGED False\n"


def test_code_for_another_python(vendor, tmp_path):
    sealed = Sealed(vendor, tmp_path)
    compiled = Code(None, ["3.98", "3.99"])
    here = tmp_path / "other"
    source = written(here / "source", CODE)
    sealed.manifest = vendor.pack(
        here / "other.hwpkg", compiled=compile_code([source / "reader"], "reader")._replace(code=compiled)
    )
    sealed.package = here / "other.hwpkg"
    sealed.key = content_key(vendor, sealed.manifest)
    said = sealed.run(REFUSED).stdout
    assert said.startswith("PYTHON_UNSUPPORTED The code in 'reader' is for Python 3.98, 3.99; this is Python 3.")


def test_what_is_handed_over_is_code_in_sealed_memory(vendor, tmp_path):
    done = Sealed(vendor, tmp_path).run(
        """
import fcntl, multiprocessing, os
from hwlicense.device.memory import protection

def kept(pipe):
    files = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    pipe.send((protection().dumpable, sum("memfd" in str(file) for file in files)))

if __name__ == "__main__":
    with opened() as model, model.importer() as importer:
        file = importer.handed.to(object.__new__(type("Popen", (), {})))
        raw = Path(file.path).read_bytes()
        print(b"a marker in the docstring" in raw, b"weights" in raw, bytes(model._keys.memory.view) in raw)
        try:
            os.pwrite(os.open(file.path, os.O_RDWR), b"x", 0)
        except PermissionError:
            print("sealed")
        for method in ("spawn", "forkserver"):
            here, there = multiprocessing.Pipe()
            child = multiprocessing.get_context(method).Process(target=kept, args=(there,))
            child.start()
            print(here.recv())
            child.join()
"""
    )
    printed = done.stdout.splitlines()
    assert printed[:2] == ["True False False", "sealed"]
    assert printed[2:] == ["(False, 1)"] * 2


def test_inputs_cannot_pass_for_code(vendor, tmp_path):
    for place, name in enumerate((".code/x.pyc", ".CODE/x", ".code")):
        (tmp_path / str(place)).mkdir()
        with pytest.raises(UsageError) as refused:
            pack(vendor, tmp_path / str(place), {name: b""})
        assert refused.value.reason == Reason.MEMBER_NAME
