"""A frozen license that names its application and has a guard: read, verified, and refused with any flaw in it."""

import hashlib
import json
import sys
from pathlib import Path

import pytest

from hwlicense.cli import _run
from hwlicense.cli.commands import root
from hwlicense.core.documents import License, grant_digest
from hwlicense.core.envelope import unverified, verified
from hwlicense.core.errors import DamagedError
from hwlicense.core.keys import unwrap_content_key, unwrap_license_secret
from hwlicense.core.process import Application, File, Guard
from hwlicense.core.schema import decode, encode
from hwlicense.core.secret import Secret
from hwlicense.device.home import read_vendor

HERE = Path(__file__).parent
VECTOR = json.loads((HERE / "process-1.json").read_text())
VENDOR = read_vendor((HERE / "vendor-4.pub.json").read_bytes())
RAW = (HERE / "license-4.hwlic").read_bytes()
LICENSE = verified(RAW, License, VENDOR)


def secret(name):
    return Secret(bytearray.fromhex(VECTOR[name]))


def digest(text):
    return hashlib.sha256(text).digest()


def test_the_grant_says_what_was_written():
    assert VENDOR.fingerprint == VECTOR["fingerprint"]
    grant = LICENSE.grant
    assert grant_digest(grant).hex() == VECTOR["grant_digest"]
    assert grant.guard == Guard(["debugger", "preloaded", "replaced"], 10)
    assert grant.application == Application(
        [
            File("/opt/reader/lib/größe.so", digest(b"library")),
            File("/opt/reader/reader.py", digest(b"program"), required=True),
            File("/usr/bin/python3.11", digest(b"interpreter"), required=True),
        ]
    )


def test_the_member_secret_opens_it():
    with unwrap_license_secret(LICENSE.wraps, {0: secret("member_secret")}) as found:
        assert found == secret("license_secret")
        assert unwrap_content_key(found, LICENSE, LICENSE.grant.packages[0].content_key) == secret("content_key")


def test_it_is_written_as_it_was():
    document, envelope = unverified(RAW, License)
    assert encode(document) == envelope.payload


@pytest.mark.parametrize("flaw", VECTOR["flaws"], ids=lambda flaw: flaw["comment"])
def test_one_flaw(flaw):
    payload = unverified(RAW, License)[1].payload
    old, new = (text.encode() for text in flaw["replace"])
    assert payload.count(old) == 1
    with pytest.raises(DamagedError) as caught:
        decode(payload.replace(old, new), License)
    assert caught.value.reason == "DOCUMENT_MALFORMED"


def test_there_are_flaws():
    assert len(VECTOR["flaws"]) == 18


def test_inspect_shows_it_all(monkeypatch, capsys):
    arguments = ["inspect", "--vendor", str(HERE / "vendor-4.pub.json"), str(HERE / "license-4.hwlic")]
    monkeypatch.setattr(sys, "argv", ["hwlicense", *arguments])
    assert _run(root) == 0
    shown = capsys.readouterr().out
    for words in (
        "refuses debugger, preloaded, replaced; looks every 10 s",
        "3 files may be loaded",
        "/opt/reader/reader.py must be",
    ):
        assert words in shown
