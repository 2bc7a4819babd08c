"""What tests of sealed code share: packages of code, and scripts in processes of their own that import them."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from typing import TYPE_CHECKING

from hwlicense.vendor.compiling import compile_code
from tests.packages import content_key

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.world import Vendor

CODE = {
    "reader/__init__.py": "from reader.numbers import double\nSECRET = 'a marker in the docstring'\n",
    "reader/numbers.py": (
        "def double(x):\n    return 2 * x\n\n\ndef fail():\n    raise ValueError('no number')\n\n\n"
        "class Part:\n    def __init__(self, name):\n        self.name = name\n\n"
        "    def __eq__(self, other):\n        return type(self) is type(other) and self.name == other.name\n"
    ),
    "reader/deep/__init__.py": "",
    "reader/deep/down.py": "from ..numbers import double\nVALUE = double(21)\n",
    "reader/data/labels.txt": "bolt\nnut\n",
    "reader/data/empty": "",
}

# What a script starts from: an open model without license and hardware.
_START = """
import sys
from pathlib import Path
from hwlicense.core.documents import VendorPublic
from hwlicense.core.keys import Content
from hwlicense.core.schema import decode
from hwlicense.core.secret import Secret
from hwlicense.device.model import Model
from hwlicense.device.reading import PackageFile

def opened():
    vendor = decode(Path(sys.argv[2]).read_bytes(), VendorPublic, spaced=True)
    content = Content(Secret(bytearray.fromhex(sys.argv[3])), Secret(bytearray()))
    return Model(PackageFile(Path(sys.argv[1]), vendor), content)

"""


def written(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


class Sealed:
    """A package of code, packed."""

    def __init__(
        self, vendor: Vendor, folder: Path, files: Mapping[str, str | bytes] = CODE, *, name: str = "reader", **options
    ):
        self.vendor, self.folder = vendor, folder
        source = written(folder / "source", files)
        compiled = compile_code(sorted(source.iterdir()), name, **options)
        self.package = folder / "sealed.hwpkg"
        (folder / "weights.bin").write_bytes(b"weights")
        self.manifest = vendor.pack(self.package, folder / "weights.bin", name=name, compiled=compiled, force=True)
        self.key = content_key(vendor, self.manifest)

    def run(self, script: str, *arguments: str, status: int = 0, options: tuple[str, ...] = (), **more):
        """Run `script`, with `opened()` for the model, in an empty folder; what it printed."""
        here = self.folder / "here"
        here.mkdir(exist_ok=True)
        file = self.folder / "script.py"
        file.write_text(_START + script)
        given = (self.package, self.vendor.folder / "vendor" / "vendor.pub.json", bytes(self.key.buffer).hex())
        done = subprocess.run(
            [sys.executable, *options, file, *given, *arguments],
            cwd=here, capture_output=True, text=True, timeout=120, check=False, **more,
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done


def native(folder: Path, name: str, body: str) -> Path:
    """A native module, compiled from C."""
    folder.mkdir(parents=True, exist_ok=True)
    source, out = folder / f"{name}.c", folder / f"{name}.abi3.so"
    source.write_text(body)
    include = f"-I{sysconfig.get_path('include')}"
    subprocess.run(["gcc", "-shared", "-fPIC", "-DPy_LIMITED_API=0x030b0000", include, source, "-o", out], check=True)
    return out
