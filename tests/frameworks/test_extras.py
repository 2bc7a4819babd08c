"""Frameworks that are not installed, or not in a version that serves; and none that is imported unasked."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from hwlicense.core.errors import Reason, UsageError
from hwlicense.integrations import gguf, openvino, safetensors
from hwlicense.integrations.extras import extra, require

# what is imported, what is missing, the extra
MISSING = [
    ("import hwlicense.integrations.onnxruntime", "onnxruntime", "onnxruntime"),
    ("import hwlicense.integrations.safetensors", "safetensors", "safetensors"),
    ("import hwlicense.integrations.openvino", "openvino", "openvino"),
    ("import hwlicense.integrations.transformers", "torch", "transformers"),
    ("import hwlicense.integrations.transformers", "safetensors", "transformers"),
    ("import hwlicense.integrations.transformers", "tokenizers", "transformers"),
    ("from hwlicense.integrations import safetensors; safetensors._numpy()", "numpy", "safetensors"),
    ("from hwlicense.integrations import safetensors; safetensors._torch('pt')", "torch", "torch"),
    ("from hwlicense.integrations import gguf; gguf.reader(None, 'a')", "gguf", "gguf"),
]
OLD = [("onnxruntime", "1.19.2"), ("safetensors", "0.5.3"), ("openvino", "2024.5.0-17288-7975fa5da0c")]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


REPORT = """
import sys
from hwlicense.core.errors import HwlicenseError
try:
    {}
except HwlicenseError as error:
    print(error.reason, error.hint)
"""


@pytest.mark.parametrize(("code", "missing", "name"), MISSING)
def test_what_is_missing_is_said_with_what_mends_it(code, missing, name):
    said = python(f"import sys; sys.modules[{missing!r}] = None" + REPORT.format(code))
    assert said == f'EXTRA_MISSING pip install "hwlicense[{name}]"\n'


@pytest.mark.parametrize(("name", "version"), OLD)
def test_what_is_too_old_is_said_with_what_mends_it(name, version):
    before = f"import {name}; {name}.__version__ = {version!r}"
    said = python(before + REPORT.format(f"import hwlicense.integrations.{name}"))
    assert said == f'EXTRA_UNSUPPORTED pip install --upgrade "hwlicense[{name}]"\n'


@pytest.mark.parametrize(
    ("version", "least", "serves"),
    [
        ("1.20.0", "1.20", True),
        ("1.9", "1.20", False),
        ("2.14.1+cu130", "2.7", True),
        ("1.24.0rc1", "1.24", True),
        ("1.24.dev5", "1.24", True),
        ("1.23.9rc1", "1.24", False),
        ("2024.6.0", "2024.6", True),
    ],
)
def test_versions_compare_by_their_numbers(version, least, serves):
    if serves:
        require("onnxruntime", "onnxruntime", version, least)
        return
    with pytest.raises(UsageError) as refused:
        require("onnxruntime", "onnxruntime", version, least)
    assert refused.value.reason == Reason.EXTRA_UNSUPPORTED
    assert version in refused.value.what


def test_another_module_that_is_missing_is_another_error():
    with pytest.raises(ModuleNotFoundError), extra("onnxruntime", "onnxruntime"):
        importlib.import_module("no_such_module")


@pytest.mark.parametrize("call", [openvino.read_model, openvino.compile_model, safetensors.load, gguf.reader])
def test_a_path_of_a_package_is_no_model(call):
    with pytest.raises(UsageError, match=r"'base[.]hwpkg' is a path") as refused:
        call("base.hwpkg", "a member")
    assert (refused.value.reason, "hwlicense.open" in refused.value.hint) == (Reason.USAGE, True)


def test_nothing_is_imported_unasked():
    code = "import sys, hwlicense, hwlicense.integrations, hwlicense.integrations.gguf, hwlicense.cli\n"
    named = "{'onnxruntime', 'safetensors', 'torch', 'transformers', 'openvino', 'gguf', 'numpy'}"
    assert python(f"{code}print({named} & set(sys.modules))") == "set()\n"
