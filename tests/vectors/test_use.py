"""A frozen license with every term of use, and a clock reset: read, verified, and refused with any flaw in them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hwlicense.cli import _run
from hwlicense.cli.commands import root
from hwlicense.core.documents import ClockReset, License, TpmBinding, grant_digest
from hwlicense.core.envelope import unverified, verified
from hwlicense.core.errors import DamagedError
from hwlicense.core.keys import unwrap_content_key, unwrap_license_secret
from hwlicense.core.limits import Distances, Limits, Monitor, Rate, Regularity, Use
from hwlicense.core.schema import decode, encode
from hwlicense.core.secret import Secret
from hwlicense.core.tpm.composing import MILLISECONDS, Conditions, write_reference
from hwlicense.core.tpm.policy import digest
from hwlicense.core.tpm.signatures import check_approval
from hwlicense.core.tpm.structures import Public
from hwlicense.device.home import read_vendor

HERE = Path(__file__).parent
VECTOR = json.loads((HERE / "use-1.json").read_text())
VENDOR = read_vendor((HERE / "vendor-2.pub.json").read_bytes())
FILES = {"license": HERE / "license-2.hwlic", "clock reset": HERE / "clock-reset-1.hwclk"}
KINDS: dict[str, Any] = {"license": License, "clock reset": ClockReset}
LICENSE = verified(FILES["license"].read_bytes(), License, VENDOR)


def secret(name):
    return Secret(bytearray.fromhex(VECTOR[name]))


def test_the_grant_says_what_was_written():
    assert VENDOR.fingerprint == VECTOR["fingerprint"]
    grant = LICENSE.grant
    assert (grant.revision, grant_digest(grant).hex()) == (3, VECTOR["grant_digest"])
    assert grant.use == Use(
        limits=Limits(1000, 1_000_000, [Rate(100, 3600), Rate(1000, 86400), Rate(7, 90)], 8760, 2),
        days=90,
        features={"language": "de", "cameras": 4, "offset": -3, "overlay": True, "größe": False},
        monitor=Monitor(7200, Regularity(300, 200, 500, "throttle"), Distances(200, 850, 16, "deny"), Rate(10, 60)),
        anchor=True,
        revocable=True,
        cap=15,
    )


def test_the_member_secret_opens_it():
    with unwrap_license_secret(LICENSE.wraps, {0: secret("member_secret")}) as found:
        assert found == secret("license_secret")
        assert unwrap_content_key(found, LICENSE, LICENSE.grant.packages[0].content_key) == secret("content_key")


def test_the_tpm_part_is_what_its_conditions_compose():
    (binding,) = LICENSE.bindings
    assert isinstance(binding, TpmBinding)
    assert binding.policy_key
    asked = Conditions.of(binding)
    assert Public.parse(binding.public).policy == digest(asked.sealed)
    assert binding.counter.value == VECTOR["counter"]
    assert binding.deadline == VECTOR["deadline"] == VECTOR["quoted_clock"] + 8760 * MILLISECONDS
    assert [(index.purpose, index.limit) for index in binding.indexes] == [("opens", 1000), ("anchor", 2**32 - 1)]
    key = Public.parse(binding.policy_key)
    for index in binding.indexes:
        reference = write_reference(index.purpose, VENDOR.fingerprint, LICENSE.grant.license, binding.counter.value)
        assert index.reference == reference
        check_approval(key, digest(asked.write(index)), reference, index.write)


def test_the_clock_reset():
    reset = verified(FILES["clock reset"].read_bytes(), ClockReset, VENDOR)
    assert reset == ClockReset(1, VENDOR.fingerprint, LICENSE.grant.license, VECTOR["time"])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_written_as_it_was(kind):
    document, envelope = unverified(FILES[kind].read_bytes(), KINDS[kind])
    assert encode(document) == envelope.payload


@pytest.mark.parametrize("flaw", VECTOR["flaws"], ids=lambda flaw: f"{flaw['kind']}: {flaw['comment']}")
def test_one_flaw(flaw):
    payload = unverified(FILES[flaw["kind"]].read_bytes(), KINDS[flaw["kind"]])[1].payload
    old, new = (text.encode() for text in flaw["replace"])
    assert payload.count(old) == 1
    with pytest.raises(DamagedError) as caught:
        decode(payload.replace(old, new), KINDS[flaw["kind"]])
    assert caught.value.reason == "DOCUMENT_MALFORMED"


def test_there_are_flaws():
    assert len(VECTOR["flaws"]) > 40


def test_inspect_shows_it_all(monkeypatch, capsys):
    shown = {}
    for kind, path in FILES.items():
        arguments = ["inspect", "--vendor", str(HERE / "vendor-2.pub.json"), str(path)]
        monkeypatch.setattr(sys, "argv", ["hwlicense", *arguments])
        assert _run(root) == 0
        shown[kind] = capsys.readouterr().out
    assert "2030-01-01 12:00:00 UTC" in shown["clock reset"]
    for words in (
        "1,000,000", "100/hour", "8,760", "opens for 90 days", 'language = "de"', "größe = false",
        "regularity: throttle, distances: deny, for 2 h; throttled: 10/minute", "PCR sha256:15",
        "must be anchored",
    ):  # fmt: skip
        assert words in shown["license"]
