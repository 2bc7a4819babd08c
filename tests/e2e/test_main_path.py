"""The main path and its refusals, through the installed command line alone."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import hwlicense
from tests.world import MEMBERS, PROGRAM, TERMS, WITH_PCRS, everything, run


@pytest.fixture
def shop(tmp_path):
    """A vendor's folder with a package, by the command line."""
    files = tmp_path / "files"
    for name, content in MEMBERS.items():
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).write_bytes(content)
    (tmp_path / "secret").write_text("correct horse\n")
    run("vendor", "init", tmp_path / "vendor", "--name", "Acme", "--passphrase-file", tmp_path / "secret")
    pack = ("vendor", "pack", "--vendor", tmp_path / "vendor", "--name", "reader", "--version", "1.0")
    run(*pack, "--passphrase-file", tmp_path / "secret", "-o", tmp_path / "model.hwpkg", files)
    (tmp_path / "terms.toml").write_text(WITH_PCRS)
    return tmp_path


def issue(shop, tpm, request="a.hwreq", out="a.hwlic", status=0, *more):
    root = ("--ek-root", f"virtual={tpm.ek_root}")
    given = ("--request", shop / request, "--package", shop / "model.hwpkg", "--terms", shop / "terms.toml")
    secret = ("--passphrase-file", shop / "secret")
    return run(
        "vendor", "issue", "--vendor", shop / "vendor", *given, *root, *secret, *more, "-o", shop / out, status=status
    )


def enroll(shop, tpm, home="a", out="a.hwreq", status=0):
    pcrs = ("--pcrs", "sha256:0,7")
    return run("device", "enroll", "--home", shop / home, "--tpm", tpm.tcti, *pcrs, "-o", shop / out, status=status)


def deliver(shop, tpm):
    enroll(shop, tpm)
    issue(shop, tpm)
    run("device", "trust", "--home", shop / "a", shop / "vendor" / "vendor.pub.json")
    run("device", "install", "--home", shop / "a", shop / "a.hwlic")


def reason(done):
    """The reason line; every refusal has exactly one, and no traceback."""
    lines = done.stderr.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1, done.stderr
    return next(line.removeprefix("reason: ") for line in lines if line.startswith("reason: "))


def check_open(shop, status=0, home="a", **environment):
    arguments = ("device", "check", "--open", "--json", "--home", shop / home, shop / "model.hwpkg")
    return run(*arguments, status=status, env=os.environ | environment)


def test_from_packing_to_the_open_model(shop, hwlicense_tpms):
    tpm = hwlicense_tpms()
    deliver(shop, tpm)
    assert json.loads(check_open(shop).stdout)["opened"] is True
    (entry,) = json.loads(run("device", "status", "--json", "--home", shop / "a").stdout)["licenses"]
    assert (entry["state"], entry["licensee"], entry["packages"]) == ("installed", "Acme Robotics", ["reader 1.0"])
    text = (shop / "vendor" / "vendor.pub.json").read_text()
    with hwlicense.open(shop / "model.hwpkg", vendor=text, home=shop / "a") as model:
        assert everything(model) == MEMBERS
        assert Path(model.path("weights.bin")).read_bytes() == MEMBERS["weights.bin"]


def test_another_device_refuses(shop, hwlicense_tpms):
    a, b = hwlicense_tpms(), hwlicense_tpms()
    deliver(shop, a)
    shutil.copytree(shop / "a", shop / "b")
    assert reason(check_open(shop, 1, "b", HWLICENSE_TPM=b.tcti)) == "WRONG_DEVICE"
    installed = run("device", "install", "--home", shop / "b", "--tpm", b.tcti, shop / "a.hwlic", status=1)
    assert reason(installed) == "WRONG_DEVICE"


def test_a_firmware_update_needs_one_approval(shop, hwlicense_tpms):
    tpm = hwlicense_tpms()
    deliver(shop, tpm)
    tpm.reboot(firmware=b"firmware 2")
    refused = check_open(shop, 1)
    assert reason(refused) == "PCR_MISMATCH"
    assert "PCR 0 (sha256)" in refused.stderr
    enroll(shop, tpm, out="b.hwreq")
    second = issue(shop, tpm, "b.hwreq", "b.hwlic", 1)
    assert reason(second) == "PLATFORM_UNAPPROVED"
    approve = (
        "vendor",
        "approve",
        "--vendor",
        shop / "vendor",
        "--product",
        "label-reader",
        "--passphrase-file",
        shop / "secret",
    )
    trusted = ("--request", shop / "b.hwreq", "--ek-root", tpm.ek_root)
    run(*approve, *trusted, "-o", shop / "update.hwapp")
    run("device", "install", "--home", shop / "a", shop / "update.hwapp")
    check_open(shop)
    issue(shop, tpm, "b.hwreq", "b.hwlic", 0)


def test_golden_values_are_approved_without_a_request(shop, hwlicense_tpms):
    tpm = hwlicense_tpms()
    probed = run("device", "probe", "--tpm", tpm.tcti, "--home", shop / "a", "--pcrs", "sha256:0,7")
    (shop / "golden.toml").write_text(probed.stdout)
    approve = (
        "vendor",
        "approve",
        "--vendor",
        shop / "vendor",
        "--product",
        "label-reader",
        "--passphrase-file",
        shop / "secret",
    )
    run(*approve, "--pcrs", shop / "golden.toml", "-o", shop / "golden.hwapp")
    other = hwlicense_tpms(firmware=b"somebody's own")
    enroll(shop, other, "b", "b.hwreq")
    assert reason(issue(shop, other, "b.hwreq", "b.hwlic", 1)) == "PLATFORM_UNAPPROVED"
    deliver(shop, tpm)
    check_open(shop)


def test_a_pin_is_asked_for_and_a_wrong_one_refused(shop, hwlicense_tpms):
    tpm = hwlicense_tpms()
    (shop / "terms.toml").write_text(TERMS)
    (shop / "pin").write_text("2468\n")
    (shop / "wrong").write_text("1357\n")
    enroll(shop, tpm)
    issue(shop, tpm, "a.hwreq", "a.hwlic", 0, "--pin-file", shop / "pin")
    run("device", "trust", "--home", shop / "a", shop / "vendor" / "vendor.pub.json")
    run("device", "install", "--home", shop / "a", shop / "a.hwlic")
    check = ("device", "check", "--open", "--home", shop / "a", shop / "model.hwpkg")
    assert reason(run(*check, status=1)) == "PIN_NEEDED"
    assert reason(run(*check, "--pin-file", shop / "wrong", status=1)) == "PIN_WRONG"
    run(*check, "--pin-file", shop / "pin")


def test_validity(shop, hwlicense_tpms):
    tpm = hwlicense_tpms()
    for days, expected in (
        ("not_after = 2020-01-01", "LICENSE_EXPIRED"),
        ("not_before = 2099-01-01", "LICENSE_NOT_YET_VALID"),
    ):
        (shop / "terms.toml").write_text(f"{TERMS}[validity]\n{days}\n")
        shutil.rmtree(shop / "a", ignore_errors=True)
        for file in ("a.hwreq", "a.hwlic"):
            (shop / file).unlink(missing_ok=True)
        deliver(shop, tpm)
        assert reason(check_open(shop, 1)) == expected
        assert f"refused: {expected}" in run("device", "status", "--home", shop / "a").stdout


def test_inspect_shows_every_kind_of_file(shop, hwlicense_tpms):
    tpm = hwlicense_tpms()
    deliver(shop, tpm)
    public = ("--vendor", shop / "vendor" / "vendor.pub.json")
    approval = next((shop / "vendor" / "approvals").iterdir())
    for file, shown in (
        ("model.hwpkg", "weights.bin"),
        ("a.hwreq", "EK RSA-2048"),
        ("a.hwlic", "class virtual"),
        (approval, "PCR sha256:7"),
        ("vendor/vendor.pub.json", "Acme"),
    ):
        assert shown in run("inspect", shop / file).stdout
        assert shown in run("inspect", *public, shop / file).stdout
        assert json.loads(run("inspect", "--json", shop / file).stdout)["document"]
    (shop / "other").write_text("{}")
    assert reason(run("inspect", shop / "other", status=4)) == "DOCUMENT_MALFORMED"


def test_each_command_has_help_and_bad_calls_say_so():
    for group in ("vendor", "device"):
        listed = run(group, "--help").stdout
        assert "Commands" in listed
    for arguments in (["nonsense"], ["vendor", "pack"], ["device", "enroll"], ["device", "check", "--frobnicate"]):
        assert reason(run(*arguments, status=2)) == "USAGE"
    assert run("--version").stdout.strip() == f"hwlicense, version {hwlicense.__version__}"


def test_the_license_that_opened_is_named(shop, hwlicense_tpms):
    tpm = hwlicense_tpms()
    deliver(shop, tpm)
    issue(shop, tpm, out="second.hwlic")
    run("device", "install", "--home", shop / "a", shop / "second.hwlic")
    folders = list((shop / "a" / "licenses").iterdir())
    first = json.loads(check_open(shop).stdout)["license"]
    (damaged,) = (folder for folder in folders if folder.name == first)
    next((damaged / "held").iterdir()).write_bytes(b"")
    (other,) = (folder.name for folder in folders if folder.name != first)
    assert json.loads(check_open(shop).stdout)["license"] == other
    with hwlicense.open(
        shop / "model.hwpkg", vendor=(shop / "vendor" / "vendor.pub.json").read_text(), home=shop / "a"
    ) as model:
        assert model.grant is not None
        assert (model.grant.license, model.grant.licensee) == (other, "Acme Robotics")


def test_keys_of_a_vendor_folder_are_never_packed(shop):
    pack = ("vendor", "pack", "--vendor", shop / "vendor", "--name", "x", "--version", "1", "-o", shop / "x.hwpkg")
    secret = ("--passphrase-file", shop / "secret")
    for inputs in ([shop], [shop / "vendor"], [shop / "vendor" / "keys"], [shop / "vendor" / "keys" / "policy.pem"]):
        refused = run(*pack, *secret, *inputs, status=2)
        assert reason(refused) == "USAGE"
        assert "key of a vendor folder" in refused.stderr
    assert not (shop / "x.hwpkg").exists()


def test_a_group_without_a_command_shows_its_help():
    for group in ([], ["vendor"], ["device"]):
        shown = run(*group, status=2)
        assert "Commands:\n" in shown.stderr
        assert not shown.stdout


def test_a_closed_pipe_is_no_refusal(shop):
    command = f"set -o pipefail; '{PROGRAM}' inspect --json '{shop}/model.hwpkg' | true"
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 141


def test_errors_name_their_file(shop):
    given = ("--request", shop / "secret", "--package", shop / "model.hwpkg", "--terms", shop / "terms.toml")
    refused = run("vendor", "issue", "--vendor", shop / "vendor", *given, "-o", shop / "x.hwlic", status=4)
    assert f"error: {shop}/secret: " in refused.stderr


def test_a_signed_package_that_was_cut_or_changed_is_named(shop):
    content = (shop / "model.hwpkg").read_bytes()
    (shop / "cut.hwpkg").write_bytes(content[:-1])
    (shop / "flip.hwpkg").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    public = shop / "vendor/vendor.pub.json"
    assert "signed by" in run("inspect", "--vendor", public, shop / "flip.hwpkg").stdout
    cut = run("inspect", "--vendor", public, shop / "cut.hwpkg", status=4)
    assert f"error: {shop}/cut.hwpkg: The package has" in cut.stderr
    run("device", "trust", "--home", shop / "home", public)
    flip = run("device", "check", "--home", shop / "home", shop / "flip.hwpkg", status=4)
    assert f"error: {shop}/flip.hwpkg: Chunk" in flip.stderr


def test_the_doctor_sees_another_tpm_and_another_state(shop, hwlicense_tpms):
    tpm = hwlicense_tpms()
    deliver(shop, tpm)
    doctor = ("device", "doctor", "--home", shop / "a")
    assert "its hardware is here" in run(*doctor).stdout
    tpm.reboot(firmware=b"firmware 2")
    assert "present state is not approved" in run(*doctor, status=3).stdout
    assert "is not here" in run(*doctor, "--tpm", hwlicense_tpms().tcti, status=3).stdout
    (shop / "a" / "device.json").write_text("{")
    assert "device.json is damaged" in run(*doctor, status=3).stdout
