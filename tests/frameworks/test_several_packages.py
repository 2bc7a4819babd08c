"""A base model and an adapter, two packages under one license, from the order desk to the numbers."""

from __future__ import annotations

import json

import numpy
import pytest
import safetensors.numpy

import hwlicense
from hwlicense.core.errors import ExceededError, Reason
from hwlicense.integrations import metered
from hwlicense.integrations.safetensors import load
from tests.counter import told
from tests.world import run

TERMS = 'licensee = "Acme Robotics"\nproduct = "reader"\n[limits]\ninferences = 10\n'


@pytest.fixture(scope="module")
def weights() -> tuple[dict[str, numpy.ndarray], dict[str, numpy.ndarray]]:
    made = numpy.random.default_rng(1)
    base = {"w": made.random((32, 16), dtype="f4")}
    return base, {"a": made.random((32, 2), dtype="f4"), "b": made.random((2, 16), dtype="f4")}


@pytest.fixture
def shop(tmp_path, hwlicense_tpms, weights):
    for name, tensors in zip(("base", "adapter", "other"), (*weights, weights[1]), strict=True):
        (tmp_path / name).mkdir()
        safetensors.numpy.save_file(tensors, tmp_path / name / "model.safetensors")
    run("vendor", "init", "vendor", "--no-passphrase", cwd=tmp_path)
    for name in ("base", "adapter", "other"):
        out = ("--name", name, "--version", "1", "-o", f"{name}.hwpkg", name)
        run("vendor", "pack", "--vendor", "vendor", *out, cwd=tmp_path)
    tpm = hwlicense_tpms()
    (tmp_path / "terms.toml").write_text(TERMS)
    run("device", "enroll", "--home", "home", "--tpm", tpm.tcti, "--counted", "-o", "a.hwreq", cwd=tmp_path)
    named = ("--package", "base.hwpkg", "--package", "adapter.hwpkg", "--terms", "terms.toml", "-o", "a.hwlic")
    root = ("--ek-root", f"virtual={tpm.ek_root}")
    run("vendor", "issue", "--vendor", "vendor", "--request", "a.hwreq", *named, *root, cwd=tmp_path)
    run("device", "trust", "--home", "home", "vendor/vendor.pub.json", cwd=tmp_path)
    run("device", "install", "--home", "home", "--tpm", tpm.tcti, "a.hwlic", cwd=tmp_path)
    return tmp_path, tpm.tcti


def test_base_and_adapter_are_opened_together_and_spend_from_one_account(shop, weights):
    folder, tcti = shop
    text = (folder / "vendor/vendor.pub.json").read_text()

    def opened(name):
        return hwlicense.open(folder / f"{name}.hwpkg", vendor=text, home=folder / "home", tpm=tcti)

    batch = numpy.ones((3, 32), "f4")
    plain_base, plain_adapter = weights
    expected = batch @ (plain_base["w"] + plain_adapter["a"] @ plain_adapter["b"])
    with opened("base") as base, opened("adapter") as adapter:
        assert (base.name, adapter.name) == ("base", "adapter")
        network, change = load(base, "model.safetensors"), load(adapter, "model.safetensors")
        run_both = metered(lambda batch: batch @ (network["w"] + change["a"] @ change["b"]), base)
        assert (run_both(batch) == expected).all()
        assert (metered(lambda batch: batch @ network["w"], adapter)(batch) == batch @ plain_base["w"]).all()
        assert (run_both(batch) == expected).all()
        with pytest.raises(ExceededError) as refused:  # 10 in all, whichever model they are spent by
            run_both(batch)
        assert refused.value.reason == Reason.INFERENCES_EXHAUSTED
    with pytest.raises(hwlicense.RefusedError) as absent:
        opened("other")
    assert absent.value.reason == Reason.LICENSE_ABSENT


def test_the_license_says_which_packages_it_opens(shop):
    folder, tcti = shop
    said = json.loads(run("inspect", "a.hwlic", "--json", cwd=folder).stdout)
    assert "base" in str(said)
    assert "adapter" in str(said)
    for name in ("base", "adapter"):
        run("device", "check", "--open", "--home", "home", "--tpm", tcti, f"{name}.hwpkg", cwd=folder)
    refused = run("device", "check", "--open", "--home", "home", "--tpm", tcti, "other.hwpkg", cwd=folder, status=1)
    told(refused, "LICENSE_ABSENT")
