"""What a license encloses is this license's alone: no other device, license or edited grant opens it."""

import base64
import datetime
import json

import msgspec
import pytest

from hwlicense.core.documents import ENCLOSURE_LIMIT, License, Presence
from hwlicense.core.envelope import seal
from hwlicense.core.errors import DamagedError, HwlicenseError, Reason, UsageError
from hwlicense.core.keys import open_enclosure, seal_enclosure
from hwlicense.core.schema import encode
from hwlicense.core.secret import Secret
from hwlicense.device.home import Home
from hwlicense.vendor import enclosing
from tests.world import TERMS, Device

SEED = b"a watermark's seed for Acme Robotics"


def used(device, raw, vendor):
    device.install(raw, vendor)
    device.open(vendor).close()


def secret(content):
    return Secret(bytearray(content))


@pytest.fixture
def licensed(vendor, device):
    """A device whose license encloses something."""
    issued = vendor.issue(device.request(), device.tpm, TERMS, enclosure=secret(SEED))
    device.install(issued.raw, vendor)
    return issued


def test_the_application_reads_it(vendor, device, licensed):
    assert SEED not in licensed.raw
    assert SEED not in encode(licensed.license)
    with device.open(vendor) as model:
        assert bytes(model.enclosure) == SEED
        held = model.enclosure
        with pytest.raises(TypeError):
            held[0] = 0
    assert bytes(held) == SEED
    with pytest.raises(HwlicenseError, match="closed"):
        _ = model.enclosure


def test_without_one_it_is_empty(vendor, device):
    device.install(vendor.issue(device.request(), device.tpm, TERMS).raw, vendor)
    with device.open(vendor) as model:
        assert bytes(model.enclosure) == b""


def test_it_is_wiped_with_the_keys(vendor, device, licensed):
    with device.open(vendor) as model:
        memory = model._keys.memory
        assert SEED in bytes(memory.view)
        model._keys.zero()
        assert not any(memory.view)
    assert licensed


def test_one_license_does_not_open_anothers(vendor, device, licensed):
    other = vendor.issue(device.request(), device.tpm, TERMS, enclosure=secret(b"another customer's"))
    swapped = msgspec.structs.replace(licensed.license, enclosure=other.license.enclosure)
    device.install(seal(swapped, vendor.keys.signers), vendor)
    with pytest.raises(DamagedError) as error:
        device.open(vendor)
    assert error.value.reason == Reason.LICENSE_DAMAGED


def test_no_other_device_opens_it(vendor, licensed, tmp_path, hwlicense_tpms):
    """Neither by the license itself, nor moved into one of its own, even by who has the vendor's signing keys."""
    other = Device(Home(tmp_path / "other"), hwlicense_tpms())
    own = vendor.issue(other.request(), other.tpm, TERMS, enclosure=secret(b"another device's"))
    with pytest.raises(HwlicenseError) as error:
        other.install(licensed.raw, vendor)
    assert error.value.reason == Reason.WRONG_DEVICE
    for changes in (
        {"enclosure": licensed.license.enclosure},
        {"enclosure": licensed.license.enclosure, "grant": licensed.license.grant},
        {"enclosure": licensed.license.enclosure, "grant": licensed.license.grant, "keys": licensed.license.keys},
    ):
        moved = seal(msgspec.structs.replace(own.license, **changes), vendor.keys.signers)
        with pytest.raises(HwlicenseError) as error:
            used(other, moved, vendor)
        assert error.value.reason in {Reason.LICENSE_DAMAGED, Reason.WRONG_DEVICE}
    other.install(own.raw, vendor)
    with other.open(vendor) as model:
        assert bytes(model.enclosure) == b"another device's"


def test_an_edited_grant_does_not_open_it(vendor, device, licensed):
    """Signed anew, by whoever got at the vendor's signing keys: the digest of the grant is in the key."""
    grant = licensed.license.grant
    edited = {
        "licensee": "Another",
        "product": "another",
        "not_after": datetime.date(2099, 1, 1),
        "issued": grant.issued + datetime.timedelta(days=1),
        "generation": 2,
        "presence": Presence(interval=86400, grace=0, regain=None, repeat=True),
        "continuity": 3600,
    }
    for field, value in edited.items():
        assert getattr(grant, field) != value
        changed = msgspec.structs.replace(licensed.license, grant=msgspec.structs.replace(grant, **{field: value}))
        with pytest.raises(HwlicenseError) as error:
            used(device, seal(changed, vendor.keys.signers), vendor)
        assert error.value.reason == Reason.LICENSE_DAMAGED, field


def test_it_hangs_on_the_grant():
    from tests.metered import grant, limited  # noqa: PLC0415

    with secret(b"s" * 32) as key:
        sealed = seal_enclosure(key, grant(limited()), secret(SEED))
        license_ = License(1, grant(limited()), [], 1, [], [], [], sealed)
        assert open_enclosure(key, license_) == secret(SEED)
        for changed in (sealed[:-1], sealed[:7], bytes([sealed[0] ^ 1]) + sealed[1:]):
            with pytest.raises(DamagedError):
                open_enclosure(key, msgspec.structs.replace(license_, enclosure=changed))
        for field, value in (("revision", 2), ("license", "1" * 32), ("licensee", "x"), ("packages", [])):
            edited = msgspec.structs.replace(license_.grant, **{field: value})
            assert edited != license_.grant
            with pytest.raises(DamagedError):
                open_enclosure(key, msgspec.structs.replace(license_, grant=edited))
        with secret(b"t" * 32) as another, pytest.raises(DamagedError):
            open_enclosure(another, license_)
    assert seal_enclosure(key, grant(limited()), secret(b"")) == b""


def test_the_vendor_sees_what_is_too_large_or_empty(tmp_path):
    path = tmp_path / "seed"
    for size, good in ((0, False), (1, True), (ENCLOSURE_LIMIT, True), (ENCLOSURE_LIMIT + 1, False)):
        path.write_bytes(b"x" * size)
        if good:
            assert len(enclosing.read(path)) == size
        else:
            with pytest.raises(UsageError):
                enclosing.read(path)
    with pytest.raises(UsageError):
        enclosing.read(tmp_path / "none")


def test_it_cannot_be_left_out_of_a_license(vendor, device, licensed):
    envelope = json.loads(licensed.raw)
    document = json.loads(base64.b64decode(envelope["payload"]))
    del document["enclosure"]
    stripped = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    envelope["payload"] = base64.b64encode(stripped).decode()
    with pytest.raises(DamagedError) as error:
        device.install(json.dumps(envelope, separators=(",", ":")).encode() + b"\n", vendor)
    assert error.value.reason == Reason.SIGNATURE_INVALID
