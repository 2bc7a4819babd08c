"""Revisions on the device: replayed, edited, mixed with one another, and what they do to what was used up."""

import shutil

import pytest

from hwlicense.core.documents import License
from hwlicense.core.envelope import unverified, verified
from hwlicense.core.terms import parse_terms
from hwlicense.device import grace
from hwlicense.device.home import Home
from hwlicense.vendor import evidence, issuing, revising
from hwlicense.vendor.basis import packaged, recorded
from tests.forging import edited, now, refused, replace, signed_anew
from tests.world import MEMBERS, NOW, WITH_PCRS, Device, Vendor, everything

LONG = WITH_PCRS + "[validity]\nnot_after = 2098-12-31\n"
SHORT = WITH_PCRS + "[validity]\nnot_after = 2020-01-01\n"
PRESENCE = WITH_PCRS + '[presence]\ninterval = "1h"\ngrace = "5m"\n'


class Sold:
    """A license that is kept in the vendor's folder, and its revisions."""

    def __init__(self, vendor: Vendor, device: Device, terms: str = LONG) -> None:
        self.vendor, self.device = vendor, device
        trusted = evidence.Trusted(evidence.read_roots(device.tpm.ek_root.read_bytes(), "virtual"))
        self.parts = evidence.examine(device.request(), trusted, now()).parts
        agreed = parse_terms(terms)
        known = vendor.place.approvals(agreed.product)
        made = issuing.issue(vendor.public, vendor.keys, self.parts, [vendor.manifest], agreed, known, today=NOW.date())
        if made.approval:
            vendor.place.keep_approval(*made.approval)
        vendor.place.keep_license(
            made.license, made.raw, recorded(made.license, self.parts, [packaged(vendor.manifest)])
        )
        self.files = [made.raw]
        device.install(made.raw, vendor)

    def revise(self, terms: str = LONG) -> bytes:
        place = self.vendor.place
        old = place.issued(self.files[-1])
        source = revising.sources(old, place.basis(old), [], [])
        agreed = revising.kept_revocable(old, parse_terms(terms))
        made = issuing.make(
            self.vendor.public,
            self.vendor.keys,
            source.parts,
            source.packages,
            agreed,
            place.approvals(agreed.product),
            today=NOW.date(),
            license_id=old.grant.license,
            revision=old.grant.revision + 1,
            since=source.since,
        )
        place.keep_license(made.license, made.raw, recorded(made.license, source.parts, source.packages, source.since))
        self.files.append(made.raw)
        return made.raw


@pytest.fixture
def sold(own_vendor, device):
    return Sold(own_vendor, device)


def kept(device):
    (folder,) = (device.home.path / "licenses").iterdir()
    return folder / "license.hwlic"


def test_the_latest_installed_revision_is_in_force(own_vendor, device, sold):
    device.open(own_vendor).close()
    device.install(sold.revise(SHORT), own_vendor)
    with refused("LICENSE_EXPIRED"):
        device.open(own_vendor)
    with refused("LICENSE_SUPERSEDED"):
        device.install(sold.files[0], own_vendor)
    device.install(sold.revise(LONG), own_vendor)
    with device.open(own_vendor) as model:
        assert everything(model) == MEMBERS
    for older in sold.files[:2]:
        with refused("LICENSE_SUPERSEDED"):
            device.install(older, own_vendor)
    device.install(sold.files[2], own_vendor)  # again does no harm


def test_revisions_may_be_left_out(own_vendor, device, sold):
    for _ in range(3):
        sold.revise()
    device.install(sold.files[3], own_vendor)
    device.open(own_vendor).close()
    with refused("LICENSE_SUPERSEDED"):
        device.install(sold.files[2], own_vendor)


def test_a_revision_opens_on_no_other_device(own_vendor, sold, tmp_path, hwlicense_tpms):
    other = Device(Home(tmp_path / "other"), hwlicense_tpms())
    with refused("WRONG_DEVICE"):
        other.install(sold.revise(), own_vendor)


def test_an_older_file_put_into_the_home_does_not_open(own_vendor, device, sold):
    """What the hardware gave belongs to the revision that is installed."""
    device.install(sold.revise(SHORT), own_vendor)
    kept(device).write_bytes(sold.files[0])
    with refused("HOME_DAMAGED"):
        device.open(own_vendor)


def test_a_whole_older_home_goes_on_where_nothing_is_counted(own_vendor, device, sold, tmp_path):
    """As `vendor revise` says: without a counter nothing in hardware ends the older revision."""
    shutil.copytree(device.home.path, tmp_path / "before")
    device.install(sold.revise(SHORT), own_vendor)
    Device(Home(tmp_path / "before"), device.tpm).open(own_vendor).close()


@pytest.mark.parametrize("signed", [True, False])
def test_no_part_of_one_revision_serves_in_another(own_vendor, device, sold, signed):
    """Even with the vendor's document keys: content keys hang on grant and license secret, and both are new."""
    old = unverified(sold.files[0], License)[0]
    raw = sold.revise(SHORT)
    new = unverified(raw, License)[0]
    mixed = {
        "the old grant": replace(new, grant=old.grant),
        "the old grant, numbered anew": replace(new, grant=replace(old.grant, revision=2)),
        "the old keys": replace(new, grant=replace(old.grant, revision=2), keys=old.keys),
        "the old wraps": replace(new, grant=replace(old.grant, revision=2), wraps=old.wraps),
        "old wraps and keys": replace(new, grant=replace(old.grant, revision=2), wraps=old.wraps, keys=old.keys),
        "a number of its own": replace(old, grant=replace(old.grant, revision=3)),
    }
    device.install(raw, own_vendor)
    for document in mixed.values():
        forged = signed_anew(document, own_vendor) if signed else edited(raw, document)
        if not signed:
            with refused("SIGNATURE_INVALID"):
                device.install(forged, own_vendor)
            continue
        kept(device).write_bytes(forged)
        with refused("LICENSE_DAMAGED", "HOME_DAMAGED", "LICENSE_EXPIRED"):
            device.open(own_vendor)
    kept(device).write_bytes(raw)
    with refused("LICENSE_EXPIRED"):
        device.open(own_vendor)


def test_no_byte_of_a_revision_may_differ(own_vendor, sold):
    raw = sold.revise()
    verified(raw, License, own_vendor.public)
    for place in range(0, len(raw), 11):
        with refused("DOCUMENT_MALFORMED", "SIGNATURE_INVALID", "SIGNATURE_MISSING"):
            verified(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :], License, own_vendor.public)


def test_a_revision_carries_the_state_that_was_approved_since(own_vendor, device, sold):
    device.tpm.reboot(firmware=b"firmware 2")
    with refused("PCR_MISMATCH"):
        device.open(own_vendor)
    own_vendor.approve(device.request())
    device.install(sold.revise(), own_vendor)
    device.open(own_vendor).close()


def test_a_revision_has_its_grace_whole(own_vendor, device):
    """Its account has a key of its own, by which the account of the revision before counts as damaged: used up."""
    sold = Sold(own_vendor, device, PRESENCE)
    device.open(own_vendor).close()
    grant = unverified(sold.files[0], License)[0].grant
    first = grace.presence_folder(device.home.state, grant)
    assert (first / "presence").is_file()
    device.install(sold.revise(PRESENCE), own_vendor)
    with device.open(own_vendor):
        pass
    second = grace.presence_folder(device.home.state, replace(grant, revision=2))
    assert second != first
    assert grace.recorded(second).used == 0
    shutil.copy(first / "presence", second / "presence")  # the old one's, put in its place
    device.open(own_vendor).close()
    assert grace.recorded(second).used == 300_000
