"""tests/conftest.py turns every way to skip into a failure."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

WAYS = {
    "marked": "import pytest\n@pytest.mark.skip(reason='no time')\ndef test(): pass\n",
    "called": "import pytest\ndef test(): pytest.skip('no TPM')\n",
    "in a fixture": "import pytest\n@pytest.fixture\ndef tpm(): pytest.skip('no TPM')\ndef test(tpm): pass\n",
    "whole module": "import pytest\npytest.skip('no TPM', allow_module_level=True)\ndef test(): pass\n",
    "import": "import pytest\npytest.importorskip('no_such_module')\ndef test(): pass\n",
    "expected to fail": "import pytest\n@pytest.mark.xfail\ndef test(): assert False\n",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_skip_is_a_failure(way, tmp_path):
    shutil.copy(Path(__file__).parents[1] / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(WAYS[way])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", tmp_path],
        capture_output=True,
        check=False,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode in (1, 2), run.stdout
    assert "which is not allowed here" in run.stdout
    assert " skipped" not in run.stdout.splitlines()[-1]
