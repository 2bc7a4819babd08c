"""Frozen documents of schema 1: this release reads and verifies them, and refuses each of them with one flaw."""

import datetime
import json
import sys
from pathlib import Path

import pytest

from hwlicense.cli import _run
from hwlicense.cli.commands import root
from hwlicense.core.documents import Approval, License, Request, grant_digest
from hwlicense.core.envelope import unverified, verified
from hwlicense.core.errors import HwlicenseError
from hwlicense.core.keys import unwrap_content_key, unwrap_license_secret
from hwlicense.core.secret import Secret
from hwlicense.core.tpm.policy import approved_digest, platform_reference
from hwlicense.core.tpm.signatures import check_approval
from hwlicense.core.tpm.structures import Public
from hwlicense.device.home import Home, read_vendor
from hwlicense.device.installing import install
from hwlicense.vendor import evidence

HERE = Path(__file__).parent
VECTORS = json.loads((HERE / "documents-1.json").read_text())
NAMES = {
    "request": "request-1.hwreq",
    "license": "license-1.hwlic",
    "approval": "approval-1.hwapp",
    "vendor": "vendor-1.pub.json",
}
GOOD = {kind: (HERE / name).read_bytes() for kind, name in NAMES.items()}
VENDOR = read_vendor(GOOD["vendor"])
SCHEMAS = {"license": License, "approval": Approval}


def examine(raw):
    roots = evidence.read_roots((HERE / "ek-root-1.pem").read_bytes(), "virtual")
    return evidence.examine(raw, evidence.Trusted(roots), datetime.datetime.fromisoformat(VECTORS["now"]))


def opened(raw):
    """As a device does once its hardware has given the member secret."""
    document = verified(raw, License, VENDOR)
    with unwrap_license_secret(document.wraps, {0: secret("member_secret")}) as found:
        assert found == secret("license_secret")
        return unwrap_content_key(found, document, document.grant.packages[0].content_key)


def secret(name):
    return Secret(bytearray.fromhex(VECTORS[name]))


READERS = {
    "request": examine,
    "license": opened,
    "approval": lambda raw: verified(raw, Approval, VENDOR),
    "vendor": read_vendor,
}


def flawed(flaw):
    if "content" in flaw:
        return flaw["content"].encode()
    old, new = flaw["replace"]
    text = GOOD[flaw["kind"]].decode()
    assert text.count(old) == 1
    return text.replace(old, new).encode()


def test_the_vendor():
    assert VENDOR.fingerprint == VECTORS["fingerprint"]


def test_the_request():
    examined = examine(GOOD["request"])
    assert examined.tpm.endorsement.basis == "certificate"
    assert [(pcr.bank, pcr.index) for pcr in examined.pcrs] == [("sha256", 0), ("sha256", 7)]


def test_the_license():
    assert opened(GOOD["license"]) == secret("content_key")
    document = verified(GOOD["license"], License, VENDOR)
    assert grant_digest(document.grant).hex() == VECTORS["grant_digest"]
    assert document.bindings[0].storage_root_key == examine(GOOD["request"]).tpm.storage_root_key.name


def test_the_approval():
    approval = verified(GOOD["approval"], Approval, VENDOR)
    binding = verified(GOOD["license"], License, VENDOR).bindings[0]
    assert approved_digest(approval.pcrs) == approval.policy
    assert binding.policy_key
    reference = platform_reference(approval.product, approval.generation)
    assert reference == binding.platform
    check_approval(Public.parse(binding.policy_key), approval.policy, reference, approval.signature)


@pytest.mark.parametrize("flaw", VECTORS["flaws"], ids=lambda flaw: f"{flaw['kind']}: {flaw['comment']}")
def test_one_flaw(flaw, tmp_path, monkeypatch, capsys):
    raw = flawed(flaw)
    assert raw != GOOD[flaw["kind"]]
    with pytest.raises(HwlicenseError) as caught:
        READERS[flaw["kind"]](raw)
    assert caught.value.reason == flaw["reason"]
    assert caught.value.hint
    # The same through an installation, which must not come to ask the hardware, and through the command line; both
    # take a file for what it says it is
    reason = "SIGNATURE_INVALID" if flaw["comment"] == "the type of a license" else flaw["reason"]
    if flaw["kind"] in SCHEMAS and flaw["reason"] != "LICENSE_DAMAGED":
        home = Home(tmp_path / "home")
        home.trust(VENDOR)
        with pytest.raises(HwlicenseError) as caught:
            install(home, raw, lambda _kind: pytest.fail("the hardware was asked"))
        assert caught.value.reason in (reason, "VENDOR_UNTRUSTED")
        (tmp_path / "file").write_bytes(raw)
        arguments = ["inspect", "--vendor", str(HERE / NAMES["vendor"]), str(tmp_path / "file")]
        monkeypatch.setattr(sys, "argv", ["hwlicense", *arguments])
        assert _run(root) == caught.value.exit_status
        assert f"reason: {reason}" in capsys.readouterr().err


def test_every_kind_has_its_flaws():
    kinds = [flaw["kind"] for flaw in VECTORS["flaws"]]
    assert {kind: kinds.count(kind) >= 9 for kind in NAMES} == dict.fromkeys(NAMES, True)
    assert unverified(GOOD["request"], Request)
