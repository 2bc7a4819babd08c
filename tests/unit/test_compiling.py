"""Code on its way into a package: what goes in, as what, and what is refused."""

from __future__ import annotations

import importlib.util
import marshal
import os
import socket
import sys

import pytest

from hwlicense.core import code
from hwlicense.core.documents import Code, Manifest, Member
from hwlicense.core.errors import DamagedError, HwlicenseError, Reason, UsageError
from hwlicense.core.package import check_manifest
from hwlicense.core.schema import SCHEMA, decode, encode
from hwlicense.vendor.compiling import compile_code
from tests.sealed import CODE, written

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
TAG = f"cpython-{HERE.replace('.', '')}"
# An interpreter of another version, as far as the compiler can tell
OTHER = f"""#!{sys.executable}
import importlib.util, sys
sys.version_info = ({{}}, {{}}, 0, "final", 0)
sys.stdlib_module_names |= {{{{"arrives"}}}}
importlib.util.MAGIC_NUMBER = b"\\x99\\x99\\r\\n"
code = sys.argv[sys.argv.index("-c") + 1]
sys.argv = ["-c", sys.argv[-1]]
exec(code)
"""


def other(path, major=3, minor=99):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OTHER.format(major, minor))
    path.chmod(0o755)
    return path


def members(compiled):
    return {source.name: source.content for source in compiled.sources}


def test_modules_become_bytecode_and_data_travels(tmp_path):
    files: dict[str, str | bytes] = {
        **CODE,
        "reader/fast.abi3.so": b"\x7fELF",
        "reader/fast.py": "source of a native module\n",
        "reader/__pycache__/numbers.cpython-311.pyc": b"old",
        "reader/old.pyc": b"old",
        "reader/fast.pyx": "source",
        "reader/fast.c": "source",
        "reader/numbers.pyi": "source",
        "reader/numbers.py~": "source",
        "reader/.git/objects/a.py": "source",
        "reader/.numbers.py.swp": "source",
        "alone.py": "X = 1\n",
    }
    source = written(tmp_path, files)
    made = members(compile_code([source / "reader", source / "alone.py"], "a reader/2"))
    assert sorted(made) == [
        f".code/alone.{TAG}.pyc",
        f".code/reader/__init__.{TAG}.pyc",
        ".code/reader/data/empty",
        ".code/reader/data/labels.txt",
        f".code/reader/deep/__init__.{TAG}.pyc",
        f".code/reader/deep/down.{TAG}.pyc",
        ".code/reader/fast.abi3.so",
        f".code/reader/numbers.{TAG}.pyc",
    ]
    raw = made[f".code/reader/numbers.{TAG}.pyc"]
    assert raw[:16] == importlib.util.MAGIC_NUMBER + b"\1\0\0\0" + bytes(8)
    assert marshal.loads(raw[16:]).co_filename == "<sealed a reader_2/reader/numbers.py>"  # noqa: S302  # made just now
    assert str(tmp_path).encode() not in b"".join(content or b"" for content in made.values())


def test_levels_of_optimization(tmp_path):
    source = written(tmp_path, {"m.py": "'''told'''\nassert X, 'checked'\n"})
    found = [members(compile_code([source / "m.py"], "m", optimize=level))[f".code/m.{TAG}.pyc"] for level in (0, 1, 2)]
    assert [(b"told" in raw, b"checked" in raw) for raw in found] == [(True, True), (True, False), (False, False)]


def test_other_versions(tmp_path, monkeypatch):
    source = written(tmp_path / "source", {"m.py": "X = 1\n"})
    other(tmp_path / "bin" / "python3.99")
    by_path = other(tmp_path / "elsewhere" / "python", minor=100)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    compiled = compile_code([source / "m.py"], "m", pythons=[HERE, "3.99", str(by_path)])
    assert compiled.code == Code(None, [HERE, "3.99", "3.100"])
    made = members(compiled)
    assert sorted(made) == [".code/m.cpython-3100.pyc", f".code/m.{TAG}.pyc", ".code/m.cpython-399.pyc"]
    assert made[".code/m.cpython-399.pyc"][:4] == b"\x99\x99\r\n"


@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("3.98", "no python3.98 on PATH"),
        ("three", "no version of Python"),
        ("2.7", "no version of Python"),
        ("/bin/true", "no CPython"),
        ("/bin/cat", "did not compile the code: /bin/cat"),
        ("/nowhere/python", "could not compile"),
        ("old", "is Python 3.9"),
    ],
)
def test_other_versions_that_cannot_be(tmp_path, python, said):
    source = written(tmp_path, {"m.py": "X = 1\n"})
    given = str(other(tmp_path / "bin" / "old", minor=9)) if python == "old" else python
    with pytest.raises(UsageError, match=said) as refused:
        compile_code([source / "m.py"], "m", pythons=[given])
    assert refused.value.reason == Reason.PYTHON_UNSUPPORTED


ENTRY = """
import os.path as paths, json
from somewhere import taken as given
if json:
    with open("x") as opened:
        chosen, (other, *rest) = 1, (2, 3)
else:
    def branch(): inner = 1
class Program:
    def main(self): pass
for looped in []: pass
(walrus := 3)
"""


@pytest.mark.parametrize(
    "name",
    [
        "paths",
        "json",
        "given",
        "opened",
        "chosen",
        "other",
        "rest",
        "branch",
        "Program",
        "Program.main",
        "looped",
        "walrus",
    ],
)
def test_entries_that_are_there(tmp_path, name):
    source = written(tmp_path, {"p/__init__.py": "", "p/m.py": ENTRY})
    assert compile_code([source / "p"], "p", f"p.m:{name}").code.entry == f"p.m:{name}"


@pytest.mark.parametrize(
    "entry", ["p.m:inner", "p.m:main", "p.m:taken", "p.gone:x", "p:x", "p.m", ":x", "p.m:x()", "p.m:x\n"]
)
def test_entries_that_are_not(tmp_path, entry):
    source = written(tmp_path, {"p/__init__.py": "", "p/m.py": ENTRY})
    with pytest.raises(UsageError) as refused:
        compile_code([source / "p"], "p", entry)
    assert refused.value.reason == Reason.ENTRY_ABSENT


def test_entries_that_only_running_would_tell(tmp_path):
    source = written(tmp_path, {"p/__init__.py": "from elsewhere import *\n", "p/fast.abi3.so": b""})
    for entry in ("p:anything", "p.fast:main"):
        assert compile_code([source / "p"], "p", entry).code.entry == entry


@pytest.mark.parametrize(
    ("files", "given", "said"),
    [
        ({"json/__init__.py": ""}, ["json"], f"'json' is the name of a module of Python {HERE}'s standard library"),
        ({"msgspec.py": ""}, ["msgspec.py"], "'msgspec' is the name of a module that Python or hwlicense itself needs"),
        ({"_cffi_backend.so": b""}, ["_cffi_backend.so"], "'_cffi_backend' is the name of a module that"),
        ({"hwlicense/__init__.py": ""}, ["hwlicense"], "hwlicense itself"),
        ({"a/p/__init__.py": "", "b/p.py": ""}, ["a/p", "b/p.py"], "both imported as 'p'"),
        ({"src/p.py": ""}, ["src"], "no __init__.py"),
        ({"p.txt": ""}, ["p.txt"], "neither"),
        ({"my-program.py": ""}, ["my-program.py"], "cannot be imported"),
        ({"class/__init__.py": ""}, ["class"], "cannot be imported"),
        ({"p/__init__.py": "", "p/a-b.py": ""}, ["p"], "'a-b' is no name"),
        ({"p/__init__.py": "x ="}, ["p"], "line 1: invalid syntax"),
        ({"p/__init__.py": b"x = 1\0"}, ["p"], "null"),
        ({"p/__init__.py": b"\xff"}, ["p"], "no module for Python"),
        ({"p/__init__.py": "(" * 5000}, ["p"], "no module for Python"),
    ],
)
def test_code_that_cannot_be_packed(tmp_path, files, given, said):
    written(tmp_path, files)
    with pytest.raises(UsageError, match=said) as refused:
        compile_code([tmp_path / name for name in given], "p")
    assert refused.value.reason == Reason.CODE_INVALID
    assert refused.value.hint


def test_a_name_of_the_standard_library_of_another_version(tmp_path):
    source = written(tmp_path, {"arrives.py": ""})
    assert compile_code([source / "arrives.py"], "p")
    with pytest.raises(UsageError, match=r"'arrives' is the name of a module of Python 3\.99's standard library"):
        compile_code([source / "arrives.py"], "p", pythons=[str(other(tmp_path / "python"))])


def bound(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def test_paths_that_escape(tmp_path, vendor):
    package = written(tmp_path, {"p/__init__.py": "", "outside/secret.py": "", "outside/secret.txt": ""}) / "p"
    for make in (
        lambda path: path.symlink_to(tmp_path / "outside" / "secret.py"),
        lambda path: path.with_suffix(".txt").symlink_to(tmp_path / "outside" / "secret.txt"),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(tmp_path / "gone"),
        os.mkfifo,
        bound,
        lambda path: path.with_suffix("").symlink_to(tmp_path / "outside"),
        lambda path: path.with_name("a\\up.txt").write_text(""),
        lambda path: (path.with_name("Up.py").write_text(""), path.with_name("up.py").write_text("")),
    ):
        make(package / "link.py")
        with pytest.raises(HwlicenseError):
            vendor.pack(tmp_path / "out.hwpkg", compiled=compile_code([package], "p"))
        assert not (tmp_path / "out.hwpkg").exists()
        for path in package.iterdir():
            if path.name != "__init__.py":
                path.unlink()
    compile_code([package], "p")


def test_a_link_within_the_package_is_followed(tmp_path):
    package = written(tmp_path, {"p/__init__.py": "", "p/a.py": "X = 1\n"}) / "p"
    (package / "b.py").symlink_to("a.py")
    assert f".code/p/b.{TAG}.pyc" in members(compile_code([package], "p"))


def manifest(names, sealed):
    made = [Member(name, 0, b"") for name in names]
    return Manifest(SCHEMA, "n", "1", "0" * 64, "0" * 32, b"", "blake3", 4096, bytes(32), made, sealed)


@pytest.mark.parametrize(
    ("names", "sealed"),
    [
        ([".code/p.cpython-311.pyc"], None),
        (["a"], Code(None, ["3.11"])),
        ([".CODE/p"], Code(None, ["3.11"])),
        ([".code/p", ".code"], Code(None, ["3.11"])),
        ([".code/../p"], Code(None, ["3.11"])),
    ],
)
def test_manifests_that_contradict_themselves(names, sealed):
    with pytest.raises(DamagedError) as refused:
        check_manifest(manifest(names, sealed))
    assert refused.value.reason == Reason.PACKAGE_DAMAGED


@pytest.mark.parametrize(
    "sealed", [Code("p", ["3.11"]), Code("p:a b", ["3.11"]), Code(None, []), Code(None, ["3"]), Code(None, ["3.11\n"])]
)
def test_code_that_no_reader_takes(sealed):
    with pytest.raises(DamagedError):
        decode(encode(manifest([".code/p"], sealed)), Manifest)


def test_where_there_is_no_code_the_manifest_is_as_it_was():
    assert b"code" not in encode(manifest(["a"], None)).replace(b"content_key", b"")
    check_manifest(manifest(["a", ".code/p/x"], Code("p:x", ["3.11"])))
    decode(encode(manifest([".code/p"], Code("p.q:x.y", ["3.11", "3.12"]))), Manifest)


def test_how_modules_are_found():
    names = ["p/__init__.c", "p/a.c", "p/a.so", "p/a/__init__.c", "p/b.c", "p/b.so", "p/d/x.txt", "q.c", "p/n/m.c"]
    tree = code.Tree([*(f".code/{name}" for name in names), "weights"], [".so", ".c"])
    found = {name: tree.find(name) for name in ("p", "p.a", "p.b", "p.d", "q", "p.n.m", "gone", "p.d.x", "weights")}
    assert {name: tuple(each) if each else None for name, each in found.items()} == {
        "p": ("p/__init__.c", True),
        "p.a": ("p/a/__init__.c", True),
        "p.b": ("p/b.so", False),
        "p.d": (None, True),
        "q": ("q.c", False),
        "p.n.m": ("p/n/m.c", False),
        "gone": None,
        "p.d.x": None,
        "weights": None,
    }
    assert tree.tops == {"p", "q"}
    assert tree.modules("p") == {"a": True, "b": False}
