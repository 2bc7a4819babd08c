"""A product's own tests, in CI without special hardware: swtpm is the TPM, through the plugin of hwlicense-simulators.

Needs Debian's swtpm, swtpm-tools and the libraries of libtss2-dev, and
`pip install hwlicense[tpm] hwlicense-simulators numpy pytest`. Nothing here weakens a check: the simulated TPM is
accepted because this test's vendor chose its maker's root certificate, as an order desk chooses Infineon's.
"""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest

import hwlicense

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from hwlicense_simulators import Tpm

PROGRAM = Path(sysconfig.get_path("scripts"), "hwlicense")
WEIGHTS = np.array([0.5, 2.0, 4.0], dtype=np.float32)
VALUES = np.array([2.0, 2.0, 2.0], dtype=np.float32)
TERMS = """
licensee = "Acme Robotics"
product = "my-product"
"""


def scale(values: NDArray[np.float32], package: Path, *, vendor: str, home: Path) -> NDArray[np.float32]:
    """Stand for the product, which a real test imports: it scales values with weights that are sold under a license."""
    with hwlicense.open(package, vendor=vendor, home=home) as model:
        weights = np.frombuffer(model.read("weights.bin"), dtype=np.float32)
        return weights * values


class Delivery(NamedTuple):
    """What the customer holds: the package, the device's home and, in the application, the vendor's public keys."""

    package: Path
    home: Path
    vendor: str


def run(*arguments: str | Path) -> None:
    """Run a command of hwlicense and show what it said if it fails."""
    done = subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stderr}"


@pytest.fixture
def delivered(tmp_path: Path, hwlicense_tpm: Tpm) -> Delivery:
    """Everything that happens between the release and the first start, with keys made for this test alone."""
    vendor, home, package = tmp_path / "vendor", tmp_path / "device", tmp_path / "my-product.hwpkg"
    request, granted, terms = tmp_path / "device.hwreq", tmp_path / "device.hwlic", tmp_path / "terms.toml"
    weights = tmp_path / "weights.bin"
    weights.write_bytes(WEIGHTS.tobytes())
    terms.write_text(TERMS, encoding="utf-8")

    run("vendor", "init", vendor, "--no-passphrase")
    run("vendor", "pack", "--vendor", vendor, "--name", "my-product", "--version", "1.0", "-o", package, weights)
    run("device", "enroll", "--home", home, "--tpm", hwlicense_tpm.tcti, "-o", request)
    chosen = ("--ek-root", hwlicense_tpm.ek_root, "--terms", terms, "-o", granted)
    run("vendor", "issue", "--vendor", vendor, "--request", request, "--package", package, *chosen)
    run("device", "trust", "--home", home, vendor / "vendor.pub.json")
    run("device", "install", "--home", home, granted)
    return Delivery(package, home, (vendor / "vendor.pub.json").read_text(encoding="utf-8"))


def test_the_product_works_on_the_device_it_was_sold_for(delivered: Delivery) -> None:
    """The whole way, from packing to the result."""
    result = scale(VALUES, delivered.package, vendor=delivered.vendor, home=delivered.home)
    assert result.tolist() == [1.0, 4.0, 8.0]


def test_a_copy_of_the_whole_device_does_not_work_on_another_machine(
    delivered: Delivery, hwlicense_tpms: Callable[[], Tpm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Package, license and home are all there: only the TPM is another one, of the same maker."""
    monkeypatch.setenv("HWLICENSE_TPM", hwlicense_tpms().tcti)
    with pytest.raises(hwlicense.RefusedError) as refusal:
        scale(VALUES, delivered.package, vendor=delivered.vendor, home=delivered.home)
    assert refusal.value.reason == hwlicense.Reason.WRONG_DEVICE


def test_without_a_license_the_product_says_so(delivered: Delivery, tmp_path: Path) -> None:
    """What a customer's log shows before anything is installed."""
    with pytest.raises(hwlicense.RefusedError) as refusal:
        scale(VALUES, delivered.package, vendor=delivered.vendor, home=tmp_path / "never-enrolled")
    assert refusal.value.reason == hwlicense.Reason.LICENSE_ABSENT
