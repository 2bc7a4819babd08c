"""Somebody records what goes between the processor and the TPM, as is done with probes at discrete chips.

Holds: all that the TPM gives out travels in sessions that are salted to the key which the license pins, encrypted. The
controls take the encryption away, in this process alone, and the same search finds what it is to find.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from tpm2_pytss import TPM2_SE, TPMA_SESSION

from hwlicense.binders.tpm import installing
from hwlicense.binders.tpm.connection import Work
from hwlicense.core.documents import License
from hwlicense.core.envelope import verified
from hwlicense.core.keys import unwrap_content_key, unwrap_for_vendor, unwrap_license_secret
from hwlicense.core.secret import Secret
from hwlicense.core.tpm.duplicate import member_secret, pin_value
from hwlicense.device.home import Home
from tests.world import MEMBERS, TERMS, WITH_PCRS, Device, everything, licensed

if TYPE_CHECKING:
    from pathlib import Path

    from hwlicense_simulators import Tpm
    from tests.world import Vendor

PIN = b"a PIN that is long enough to be searched for"
GIVEN_OUT = {"storage share", "attestation share", "sealed value"}


def pin(_prompt: str = "") -> Secret:
    return Secret(bytearray(PIN))


def pieces(secret: bytes) -> set[bytes]:
    """Every eight bytes of a secret: a part of it would be found, too."""
    return {secret[at : at + 8] for at in range(len(secret) - 7)}


def found(recording: Recording) -> set[str]:
    """Which secrets are in it, in either order of their bytes."""
    traffic = recording.traffic
    return {
        name
        for name, secret in recording.secrets.items()
        if any(piece in traffic or piece[::-1] in traffic for piece in pieces(secret))
    }


@pytest.fixture
def taken(monkeypatch) -> list[bytes]:
    """What the TPM gives out in this process, in order: both shares at installation, the sealed value at opening."""
    seen: list[bytes] = []
    take = installing.taken

    def watched(buffer: Any) -> Secret:
        secret = take(buffer)
        seen.append(bytes(secret.buffer))
        return secret

    monkeypatch.setattr(installing, "taken", watched)
    return seen


class Recording(NamedTuple):
    """What went over the bus, and everything that must not be in it."""

    traffic: bytes
    secrets: dict[str, bytes]


def recorded(vendor: Vendor, tpm: Tpm, folder: Path, taken: list[bytes], terms: str, *, with_pin: bool) -> Recording:
    """From enrolling to the closed model."""
    with tpm.tapped() as wire:
        device = Device(Home(folder / "home"), SimpleNamespace(tcti=wire.tcti, ek_root=tpm.ek_root))  # type: ignore[arg-type]
        raw = licensed(vendor, device, terms, pin=pin() if with_pin else None)
        with device.open(vendor, pin=pin) as model:
            assert everything(model) == MEMBERS
        traffic = wire.traffic
    storage, attestation, value = taken
    manifest, sent = vendor.manifest, verified(raw, License, vendor.public)
    member = member_secret(*(Secret(bytearray(part)) for part in (value, storage, attestation)))
    license_secret = unwrap_license_secret(sent.wraps, {0: member})
    content_key = unwrap_content_key(license_secret, sent, manifest.content_key)
    # The vendor's own way to the content key: so what was captured are the true secrets.
    assert content_key == unwrap_for_vendor(manifest.wrapped_content_key, manifest.content_key, vendor.keys.content)
    named = {"member secret": member, "license secret": license_secret, "content key": content_key}
    secrets = {
        "storage share": storage,
        "attestation share": attestation,
        "sealed value": value,
        "PIN": PIN,
        "authorization value": bytes(pin_value(pin()).buffer),
        **{name: bytes(secret.buffer) for name, secret in named.items()},
    }
    return Recording(traffic, secrets)


@pytest.mark.parametrize("storage_key", [None, "ecc", "rsa"])
@pytest.mark.parametrize(("terms", "with_pin"), [(TERMS, False), (WITH_PCRS, False), (WITH_PCRS, True)])
def test_a_recording_holds_no_secret(vendor, hwlicense_tpms, tmp_path, taken, storage_key, terms, with_pin):
    tpm = hwlicense_tpms(storage_key=storage_key)
    recording = recorded(vendor, tpm, tmp_path, taken, terms, with_pin=with_pin)
    assert found(recording) == set()
    assert tpm.pcr(0) in recording.traffic  # it is the recording of this machine


def test_the_search_finds_what_is_not_encrypted(vendor, hwlicense_tpms, tmp_path, taken, monkeypatch):
    """The control: the same with sessions that encrypt nothing."""
    session = Work.session

    def plain(self: Work, salt: Any, kind: Any, _attributes: TPMA_SESSION, *more: Any) -> Any:
        # A session that authorises nothing must serve for something: here to audit, which hides nothing.
        return session(self, salt, kind, TPMA_SESSION.AUDIT if kind == TPM2_SE.HMAC else TPMA_SESSION(0), *more)

    monkeypatch.setattr(Work, "session", plain)
    recording = recorded(vendor, hwlicense_tpms(), tmp_path, taken, WITH_PCRS, with_pin=False)
    assert found(recording) == GIVEN_OUT  # the keys above them are made in the processor, and cross no bus


def test_the_search_finds_each_secret_and_parts_of_it(vendor, hwlicense_tpms, tmp_path, taken):
    """The control for what crosses no bus in any case: put into the recording, it is found."""
    recording = recorded(vendor, hwlicense_tpms(), tmp_path, taken, WITH_PCRS, with_pin=True)
    middle = len(recording.traffic) // 2
    for name, secret in recording.secrets.items():
        for hidden in (secret, secret[:12], secret[-9:], secret[::-1]):
            traffic = recording.traffic[:middle] + hidden + recording.traffic[middle:]
            assert name in found(recording._replace(traffic=traffic))
