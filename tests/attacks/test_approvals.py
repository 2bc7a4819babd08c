"""Approvals of other products, generations and vendors; old ones replayed, and edited ones."""

import pytest

from hwlicense.core.documents import Approval, Request
from hwlicense.core.envelope import unverified
from hwlicense.core.tpm.policy import approved_digest, platform_reference
from hwlicense.core.tpm.signatures import sign_approval
from hwlicense.device.installing import install
from hwlicense.vendor import approving
from tests.forging import SoftwareKey, edited, flipped, refused, replace, signed_anew
from tests.world import MEMBERS, Vendor, everything, licensed


@pytest.fixture
def updated(own_vendor, device):
    """A licensed device after a firmware update that nothing approves yet; the request tells of the new state."""
    licensed(own_vendor, device)
    device.tpm.reboot(firmware=b"firmware 2")
    with refused("PCR_MISMATCH"):
        device.open(own_vendor)
    return device


def pcrs_of(request):
    return unverified(request, Request)[0].hardware[0].pcrs


def put(device, raw):
    """Written into the home by someone who can write there."""
    (folder,) = (device.home.path / "licenses").iterdir()
    (folder / "approvals").mkdir(exist_ok=True)
    path = folder / "approvals" / "new.hwapp"
    path.write_bytes(raw)
    return path


def test_the_right_approval_opens(updated, own_vendor):
    updated.install(own_vendor.approve(updated.request()), own_vendor)
    with updated.open(own_vendor) as model:
        assert everything(model) == MEMBERS


def test_an_approval_for_another_product(updated, own_vendor):
    raw = own_vendor.approve(updated.request(), product="other")
    with refused("WRONG_PRODUCT"):
        updated.install(raw, own_vendor)
    put(updated, raw)
    with refused("PCR_MISMATCH"):
        updated.open(own_vendor)
    renamed = replace(unverified(raw, Approval)[0], product="label-reader")  # by stolen document keys
    put(updated, signed_anew(renamed, own_vendor))
    with refused("SIGNATURE_INVALID"):
        updated.open(own_vendor)


def test_an_approval_by_another_vendor(updated, own_vendor, vendor):
    raw = vendor.approve(updated.request())
    with refused("VENDOR_UNTRUSTED"):
        install(updated.home, raw, updated.connect)
    with refused("WRONG_PRODUCT"):
        updated.install(raw, vendor)  # trusted now, but none of its licenses is here
    put(updated, raw)
    with refused("PCR_MISMATCH"):
        updated.open(own_vendor)


def test_an_approval_signed_by_another_policy_key(updated, own_vendor):
    """By stolen document keys: the TPM, and the device before it, hold to the policy key of the license."""
    good = unverified(own_vendor.approve(updated.request()), Approval)[0]
    reference = platform_reference(good.product, good.generation)
    signature = sign_approval(SoftwareKey().private, good.policy, reference)
    raw = signed_anew(replace(good, signature=signature), own_vendor)
    with refused("SIGNATURE_INVALID"):
        updated.install(raw, own_vendor)
    put(updated, raw)
    with refused("SIGNATURE_INVALID"):
        updated.open(own_vendor)


def test_values_and_policy_of_an_approval_belong_together(updated, own_vendor, device):
    """One edited and the other kept, by stolen document keys."""
    old = own_vendor.place.approvals("label-reader")[0]
    present = pcrs_of(updated.request())
    for forged in (replace(old, pcrs=present), replace(old, policy=approved_digest(present))):
        raw = signed_anew(forged, own_vendor)
        with refused("SIGNATURE_INVALID"):
            device.install(raw, own_vendor)
        put(device, raw)
        with refused("SIGNATURE_INVALID"):
            device.open(own_vendor)
    both = replace(old, pcrs=present, policy=approved_digest(present))
    with refused("SIGNATURE_INVALID"):
        device.install(signed_anew(both, own_vendor), own_vendor)
    with refused("SIGNATURE_INVALID"):
        device.install(edited(signed_anew(old, own_vendor), both), own_vendor)


def test_a_higher_generation_ends_older_approvals(device, own_vendor):
    """The vendor withdraws the first firmware. Its approval, kept by the owner, serves no new license."""
    licensed(own_vendor, device)
    device.open(own_vendor).close()
    (old,) = (own_vendor.folder / "vendor" / "approvals").iterdir()
    device.tpm.reboot(firmware=b"firmware 2")
    own_vendor.approve(device.request(), generation=2)
    (device.home.path / "licenses").rename(device.home.path / "before")
    licensed(own_vendor, device)
    device.open(own_vendor).close()
    device.tpm.reboot(firmware=b"firmware 1")
    with refused("PCR_MISMATCH"):
        device.open(own_vendor)
    with refused("APPROVAL_WITHDRAWN"):
        device.install(old.read_bytes(), own_vendor)
    put(device, old.read_bytes())
    with refused("PCR_MISMATCH"):
        device.open(own_vendor)
    raised = replace(unverified(old.read_bytes(), Approval)[0], generation=2)  # by stolen document keys
    with refused("SIGNATURE_INVALID"):
        device.install(signed_anew(raised, own_vendor), own_vendor)
    put(device, signed_anew(raised, own_vendor))
    with refused("SIGNATURE_INVALID"):
        device.open(own_vendor)


def test_an_approval_of_a_coming_generation_waits_for_its_license(updated, own_vendor):
    updated.install(own_vendor.approve(updated.request(), generation=2), own_vendor)
    with refused("PCR_MISMATCH"):
        updated.open(own_vendor)


def test_no_byte_of_an_approval_may_differ(updated, own_vendor):
    raw = own_vendor.approve(updated.request())
    for place in range(0, len(raw), 7):
        with refused("DOCUMENT_MALFORMED", "SIGNATURE_INVALID", "SIGNATURE_MISSING", "USAGE"):  # of an unknown type
            updated.install(flipped(raw, place), own_vendor)
    with refused("PCR_MISMATCH"):
        updated.open(own_vendor)


def test_an_approval_that_no_device_would_read_is_not_made(own_vendor, device):
    pcrs = pcrs_of(device.request())
    for product, generation in (("x" * 201, 1), ("", 1), ("\udcff", 1), ("x", 0), ("x", 1 << 32)):
        with refused("USAGE"):
            approving.approve(own_vendor.public, own_vendor.keys, product, generation, pcrs)
    with refused("USAGE"):
        approving.approve(own_vendor.public, own_vendor.keys, "x", 1, [])


def test_more_approved_states_than_a_license_holds(own_vendor, device):
    """The license carries that of its own device, and others as far as they fit."""
    request = device.request()
    first = pcrs_of(request)
    for number in range(101):
        values = [replace(first[0], value=bytes([number + 1]) * 32), first[1]]
        approval, raw = approving.approve(own_vendor.public, own_vendor.keys, "label-reader", 1, values)
        own_vendor.place.keep_approval(approval, raw)
    own_vendor.approve(request)
    issued = own_vendor.issue(request, device.tpm)
    assert len(issued.license.approvals) == 100
    device.install(issued.raw, own_vendor)
    device.open(own_vendor).close()


def test_a_damaged_approval_in_the_vendors_folder_is_named(own_vendor, device):
    request = device.request()
    own_vendor.issue(request, device.tpm)
    (path,) = (own_vendor.folder / "vendor" / "approvals").iterdir()
    path.write_bytes(flipped(path.read_bytes(), 700))
    with refused("DOCUMENT_MALFORMED", "SIGNATURE_INVALID", words=str(path)):
        own_vendor.issue(request, device.tpm)
    other = Vendor(_made(own_vendor.folder / "other"))
    path.write_bytes(other.approve(request))
    with refused("WRONG_VENDOR", words=str(path)):
        own_vendor.issue(request, device.tpm)


def _made(folder):
    folder.mkdir()
    return folder
