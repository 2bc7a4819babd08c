"""Licenses changed, exchanged and replayed."""

import collections
import datetime
import shutil

import pytest

import hwlicense
from hwlicense.core.documents import License
from hwlicense.core.envelope import unverified
from hwlicense.core.errors import HwlicenseError
from hwlicense.core.terms import parse_terms
from hwlicense.device.home import Home, verified_by_any
from hwlicense.device.installing import install
from hwlicense.device.opening import utc_today
from hwlicense.device.reporting import status
from hwlicense.vendor import evidence, issuing
from tests.forging import edited, flipped, now, refused, rejoined, replace, signed_anew
from tests.world import MEMBERS, TERMS, WITH_PCRS, Device, Vendor, everything, licensed

EDITS = {
    "licensee": lambda g: replace(g, licensee="Someone Else"),
    "end": lambda g: replace(g, not_after=datetime.date(2099, 1, 1)),
    "no end": lambda g: replace(g, not_after=None),
    "PCRs": lambda g: replace(g, pcrs=[]),
    "generation": lambda g: replace(g, generation=2),
    "revision": lambda g: replace(g, revision=2),
    "product": lambda g: replace(g, product="other"),
}
LONG = WITH_PCRS + "[validity]\nnot_after = 2098-12-31\n"
ENDING = TERMS + "[validity]\nnot_after = 2020-01-01\n"


def only(home):
    (folder,) = (home.path / "licenses").iterdir()
    return folder / "license.hwlic"


def put(home, licensed, raw):
    """A file that an attacker writes into the home, with what the hardware gave for the license that is there."""
    folder = home.path / "licenses"
    target = folder / licensed.grant.license
    if not target.exists():
        shutil.copytree(next(folder.iterdir()), target)
    (target / "license.hwlic").write_bytes(raw)


def untouchable(_kind):
    pytest.fail("the hardware was asked before the signatures held")


# ---- every byte -------------------------------------------------------------------------------------------


def test_no_byte_of_a_license_may_differ(vendor, device):
    """Two flips of each byte: the lowest bit, and the one between capital and small letters."""
    raw = licensed(vendor, device)
    kept = only(device.home)
    ends: collections.Counter[str] = collections.Counter()
    for mask in (0x01, 0x20):
        for place in range(len(raw)):
            bad = flipped(raw, place, mask)
            try:
                verified_by_any(bad, License, [vendor.public])
            except HwlicenseError as error:
                ends[error.reason] += 1
                continue
            kept.write_bytes(bad)  # it verifies: then it must not open
            with refused("LICENSE_DAMAGED", "WRONG_DEVICE", "HOME_DAMAGED"):
                device.open(vendor)
            ends["verified, not opened"] += 1
    print(f"\nlicense of {len(raw):,} bytes, {sum(ends.values()):,} flips, none opened:")  # noqa: T201
    for reason, count in ends.most_common():
        print(f"  {count:>7,}  {reason}")  # noqa: T201
    assert sum(ends.values()) == 2 * len(raw)
    assert set(ends) <= {"DOCUMENT_MALFORMED", "SIGNATURE_INVALID", "SIGNATURE_MISSING"}
    kept.write_bytes(raw)
    with device.open(vendor) as model:
        assert everything(model) == MEMBERS


def test_nothing_is_asked_of_the_hardware_before_the_signatures_hold(vendor, device):
    raw = vendor.issue(device.request(), device.tpm).raw
    device.home.trust(vendor.public)
    for place in range(0, len(raw), len(raw) // 97):
        with refused("DOCUMENT_MALFORMED", "SIGNATURE_INVALID", "SIGNATURE_MISSING"):
            install(device.home, flipped(raw, place), untouchable)
    for size in range(0, len(raw), len(raw) // 97):
        with refused("DOCUMENT_MALFORMED"):
            install(device.home, raw[:size], untouchable)
    with refused("DOCUMENT_MALFORMED"):
        install(device.home, raw + b"\n", untouchable)
    assert not (device.home.path / "licenses").exists()


# ---- terms edited -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("signed", ["as before", "classically", "by ML-DSA alone", "by both keys"])
def test_an_edited_grant_never_opens(vendor, device, edit, signed):
    """By both keys: even who has stolen the vendor's document keys cannot change what the hardware's secret opens."""
    raw = licensed(vendor, device, LONG)
    changed = unverified(raw, License)[0]
    changed = replace(changed, grant=edit(changed.grant))
    forged = {
        "as before": lambda: edited(raw, changed),
        "classically": lambda: _signed_classically(raw, changed, vendor),
        "by ML-DSA alone": lambda: signed_anew(changed, vendor, which=slice(1, None)),
        "by both keys": lambda: signed_anew(changed, vendor),
    }[signed]()
    only(device.home).write_bytes(forged)
    expected = {
        "as before": "SIGNATURE_INVALID",
        "classically": "SIGNATURE_INVALID",
        "by ML-DSA alone": "SIGNATURE_MISSING",
        "by both keys": "APPROVAL_WITHDRAWN"
        if (changed.grant.product, changed.grant.generation) != ("label-reader", 1)
        else "LICENSE_DAMAGED",
    }
    with refused(expected[signed]):
        device.open(vendor)


def _signed_classically(raw, changed, vendor):
    classical = unverified(signed_anew(changed, vendor, which=slice(1)), License)[1].signatures[0]
    post_quantum = unverified(raw, License)[1].signatures[1]
    return rejoined(signed_anew(changed, vendor), signatures=[classical, post_quantum])


def test_the_second_signature_may_not_be_left_out(vendor, device):
    raw = licensed(vendor, device)
    signatures = unverified(raw, License)[1].signatures
    for kept in (signatures[:1], signatures[1:]):
        only(device.home).write_bytes(rejoined(raw, signatures=kept))
        with refused("SIGNATURE_MISSING"):
            device.open(vendor)
    only(device.home).write_bytes(rejoined(raw, signatures=[]))
    with refused("LICENSE_ABSENT"):
        device.open(vendor)
    both = [signatures[0], replace(signatures[0], keyid=signatures[1].keyid)]  # the classical one, twice
    only(device.home).write_bytes(rejoined(raw, signatures=both))
    with refused("SIGNATURE_INVALID"):
        device.open(vendor)
    order = [signatures[1], signatures[0]]
    only(device.home).write_bytes(rejoined(raw, signatures=order))
    device.open(vendor).close()


def test_an_expired_license_does_not_open_with_the_keys_of_another(vendor, device):
    """The parts of two genuine licenses, signed by whoever stole the document keys."""
    licensed(vendor, device)
    good = unverified(only(device.home).read_bytes(), License)[0]
    old = vendor.issue(device.request(), device.tpm, ENDING).license
    for parts in (
        {"grant": good.grant},
        {"grant": good.grant, "keys": good.keys},
        {"bindings": good.bindings, "wraps": good.wraps},
        {"keys": good.keys},
    ):
        mixed = replace(old, **parts)
        mixed = replace(mixed, grant=replace(mixed.grant, license=good.grant.license, not_after=None))
        only(device.home).write_bytes(signed_anew(mixed, vendor))
        with refused("LICENSE_DAMAGED", "HOME_DAMAGED", "APPROVAL_WITHDRAWN", "PLATFORM_UNAPPROVED"):
            device.open(vendor)


# ---- for something else -----------------------------------------------------------------------------------


def test_a_license_for_another_device(vendor, device, hwlicense_tpms, tmp_path):
    raw = licensed(vendor, device)
    other = Device(Home(tmp_path / "other"), hwlicense_tpms())
    with refused("WRONG_DEVICE"):
        other.install(raw, vendor)
    with refused("LICENSE_ABSENT"):
        other.open(vendor)
    shutil.copytree(device.home.path, tmp_path / "copy")
    with refused("WRONG_DEVICE"):
        Device(Home(tmp_path / "copy"), other.tpm).open(vendor)


def test_a_license_for_another_package_or_build(own_vendor, device, tmp_path):
    vendor, files = own_vendor, tmp_path / "acme" / "files"
    licensed(vendor, device)
    rebuilt, newer, other = (tmp_path / f"{name}.hwpkg" for name in ("rebuilt", "newer", "other"))
    vendor.pack(rebuilt, files)  # the same name, version and content
    manifest = vendor.pack(newer, files, version="2.0")
    vendor.pack(other, files, name="other")
    for package, reason in ((rebuilt, "WRONG_PACKAGE"), (newer, "WRONG_PACKAGE"), (other, "LICENSE_ABSENT")):
        with refused(reason):
            device.open(vendor, package)
    # An old package under a license for the new one alone
    shutil.rmtree(device.home.path)
    vendor.manifest = manifest
    licensed(vendor, device)
    device.open(vendor, newer).close()
    with refused("WRONG_PACKAGE"):
        device.open(vendor)


def test_a_license_whose_keys_are_exchanged_between_packages(own_vendor, device, tmp_path):
    """Signed by stolen document keys: the content key of one package does not pass for another's."""
    vendor = own_vendor
    licensed(vendor, device)
    newer = tmp_path / "newer.hwpkg"
    manifest = vendor.pack(newer, tmp_path / "acme" / "files", version="2.0")
    good = unverified(only(device.home).read_bytes(), License)[0]
    named = replace(good.grant.packages[0], content_key=manifest.content_key)
    renamed = replace(good.keys[0], content_key=manifest.content_key)
    forged = replace(good, grant=replace(good.grant, packages=[named]), keys=[renamed])
    only(device.home).write_bytes(signed_anew(forged, vendor))
    with refused("LICENSE_DAMAGED"):
        device.open(vendor, newer)


def test_the_keys_of_two_packages_exchanged_in_one_license(own_vendor, device, tmp_path):
    """By stolen document keys. Each wrap has a key of its own: two under one key would share a nonce, too."""
    vendor, newer = own_vendor, tmp_path / "newer.hwpkg"
    manifests = [vendor.manifest, vendor.pack(newer, tmp_path / "acme" / "files", version="2.0")]
    roots = evidence.read_roots(device.tpm.ek_root.read_bytes(), "virtual")
    examined = evidence.examine(device.request(), evidence.Trusted(roots), now())
    made = [vendor.public, vendor.keys, examined.parts, manifests, parse_terms(TERMS), []]
    issued = issuing.issue(*made, today=now().date())
    device.install(issued.raw, vendor)
    for package in (vendor.package, newer):
        device.open(vendor, package).close()
    one, two = issued.license.keys
    exchanged = [replace(one, wrapped=two.wrapped), replace(two, wrapped=one.wrapped)]
    only(device.home).write_bytes(signed_anew(replace(issued.license, keys=exchanged), vendor))
    for package in (vendor.package, newer):
        with refused("LICENSE_DAMAGED"):
            device.open(vendor, package)


def test_another_vendors_license_beside_ours_is_ignored(own_vendor, vendor, device):
    licensed(own_vendor, device)
    theirs = vendor.issue(device.request(), device.tpm)
    put(device.home, theirs.license, theirs.raw)
    with device.open(own_vendor) as model:
        assert everything(model) == MEMBERS
    shutil.rmtree(device.home.path / "licenses" / theirs.license.grant.license)
    only(device.home).write_bytes(theirs.raw)  # and in its place
    with refused("LICENSE_ABSENT"):
        device.open(own_vendor)


def test_a_license_for_our_package_by_another_vendor_opens_nothing(own_vendor, vendor, device):
    """The other vendor may name our content key; it has no wrap of it."""
    ours = own_vendor.manifest
    licensed(vendor, device)
    theirs = unverified(only(device.home).read_bytes(), License)[0]
    named = replace(theirs.grant.packages[0], content_key=ours.content_key)
    forged = replace(
        theirs,
        grant=replace(theirs.grant, packages=[named], vendor=own_vendor.public.fingerprint),
        keys=[replace(theirs.keys[0], content_key=ours.content_key)],
    )
    only(device.home).write_bytes(signed_anew(forged, vendor))
    with refused("LICENSE_ABSENT"):
        device.open(own_vendor)
    with refused("WRONG_VENDOR"):
        hwlicense.open(own_vendor.package, vendor=vendor.text, home=device.home.path, tpm=device.tpm.tcti)


def test_a_license_granted_in_another_vendors_name(vendor, own_vendor, device):
    good = vendor.issue(device.request(), device.tpm).license
    forged = replace(good, grant=replace(good.grant, vendor=own_vendor.public.fingerprint))
    with refused("WRONG_VENDOR"):
        device.install(signed_anew(forged, vendor), vendor)
    licensed(vendor, device)
    put(device.home, unverified(only(device.home).read_bytes(), License)[0], signed_anew(forged, vendor))
    with refused("WRONG_VENDOR"):
        device.open(vendor)


def test_an_untrusted_vendors_license_is_not_installed(vendor, own_vendor, device):
    device.home.trust(own_vendor.public)
    with refused("VENDOR_UNTRUSTED"):
        install(device.home, vendor.issue(device.request(), device.tpm).raw, untouchable)


def test_an_older_revision_does_not_replace_a_newer_one(vendor, device):
    raw = licensed(vendor, device)
    good = unverified(raw, License)[0]
    newer = replace(good, grant=replace(good.grant, revision=2))
    only(device.home).write_bytes(signed_anew(newer, vendor))
    with refused("LICENSE_SUPERSEDED"):
        device.install(raw, vendor)


# ---- damage beside a good one -----------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "folder", "other kind", "lost held", "bad held"])
def test_damage_to_one_license_leaves_the_other_usable(vendor, device, damage):
    licensed(vendor, device)
    first = only(device.home)
    raw = vendor.issue(device.request(), device.tpm).raw
    device.install(raw, vendor)
    newest = utc_today() + datetime.timedelta(1)
    changed = unverified(raw, License)[0]
    assert changed.grant.issued < newest
    second = device.home.path / "licenses" / changed.grant.license
    (held,) = (second / "held").iterdir()
    for target, kept in ((second, held), (first.parent, next((first.parent / "held").iterdir()))):
        file, saved, saved_held = target / "license.hwlic", (target / "license.hwlic").read_bytes(), kept.read_bytes()
        {
            "cut": lambda: file.write_bytes(saved[:-100]),  # noqa: B023
            "empty": lambda: file.write_bytes(b""),  # noqa: B023
            "flipped": lambda: file.write_bytes(flipped(saved, len(saved) // 2)),  # noqa: B023
            "folder": lambda: (file.unlink(), file.mkdir()),  # noqa: B023
            "other kind": lambda: file.write_bytes(device.request()),  # noqa: B023
            "lost held": kept.unlink,
            "bad held": lambda: kept.write_bytes(b"{}"),  # noqa: B023
        }[damage]()
        with device.open(vendor) as model:
            assert everything(model) == MEMBERS
        entries, problems = status(device.home, utc_today())
        if "held" in damage:
            assert sorted(entry["state"] for entry in entries) in (
                ["damaged: HOME_DAMAGED", "installed"],
                ["installed", "installed"],  # reading its content takes the binder
            )
        else:
            assert [entry["state"] for entry in entries] == ["installed"]
            assert str(file) in problems[0].what
        if file.is_dir():
            file.rmdir()
        file.write_bytes(saved)
        kept.write_bytes(saved_held)


def test_a_license_is_bound_by_its_vendor_constant(vendor, device, tmp_path):
    licensed(vendor, device)
    (tmp_path / "other").mkdir()
    other = Vendor(tmp_path / "other")
    with refused("WRONG_VENDOR"):
        hwlicense.open(vendor.package, vendor=other.text, home=device.home.path, tpm=device.tpm.tcti)
    with refused("USAGE"):
        hwlicense.open(vendor.package, vendor=str(vendor.folder), home=device.home.path)


def test_a_license_that_contradicts_itself_on_its_bindings(vendor, device):
    good = unverified(licensed(vendor, device), License)[0]
    put(device.home, good, signed_anew(replace(good, need=2), vendor))
    with refused("LICENSE_DAMAGED"):
        device.open(vendor)
