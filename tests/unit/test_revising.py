"""Revisions, made without hardware: what they keep, what they change, and what they are made from."""

import datetime
import stat
from typing import NamedTuple

import pytest

from hwlicense.core.documents import (
    Endorsement,
    EndorsementKey,
    License,
    Pcr,
    TokenEvidence,
    TpmCounter,
    TpmEvidence,
)
from hwlicense.core.envelope import unverified, verified
from hwlicense.core.errors import HwlicenseError
from hwlicense.core.schema import decode, encode
from hwlicense.core.secret import Secret
from hwlicense.core.terms import parse_terms
from hwlicense.core.tpm.structures import STORAGE_ROOT_TEMPLATE, Public
from hwlicense.vendor import approving, issuing, revising
from hwlicense.vendor.basis import Basis, TokenBasis, TpmBasis, packaged, parts_of, recorded
from hwlicense.vendor.evidence import TokenPart, TpmPart
from hwlicense.vendor.signing import public_bytes
from tests.forging import SoftwareKey, listing, refused, replace
from tests.world import TERMS, WITH_PCRS, Vendor

TODAY = datetime.date(2030, 1, 1)
HOUR = 3_600_000
OPENS = TERMS + "[limits]\nopens = 10\n"
PCR_VALUES = [Pcr("sha256", index, bytes([index + 1]) * 32) for index in (0, 7)]
RECORDED = Endorsement("recorded", "", "unknown")


def tpm_part(clock=5 * HOUR, counter=None, pcrs=PCR_VALUES, **keys):
    """A TPM as `examine` gives it. The keys are an attacker's, or nobody's: here nothing is opened."""
    made = {name: SoftwareKey(STORAGE_ROOT_TEMPLATE).public for name in ("ek", "srk", "ak")} | keys
    evidence = TpmEvidence(
        manufacturer="SIM",
        firmware="1",
        endorsement_keys=[EndorsementKey(made["ek"].raw, None)],
        storage_root_key=made["srk"].raw,
        attestation_key=made["ak"].raw,
        pcrs=list(pcrs),
        counter=counter,
    )
    return TpmPart(evidence, made["ek"], made["srk"], made["ak"], RECORDED, clock)


def token_part():
    key = SoftwareKey()
    uri = f"pkcs11:token={key.public.name.hex()[:8]}"
    return TokenPart(TokenEvidence(uri, public_bytes(key.private.public_key()), "ecdh", True, []), RECORDED)  # noqa: FBT003


COUNTED = tpm_part(counter=TpmCounter(0x01880000, 41))


class Issued(NamedTuple):
    license: License
    raw: bytes
    vendor: Vendor

    @property
    def tpm(self):
        return self.license.bindings[0]


def issue(vendor, terms=TERMS, parts=(COUNTED,), pin=None):
    agreed = parse_terms(terms)
    made = issuing.issue(
        vendor.public, vendor.keys, parts, [vendor.manifest], agreed, vendor.place.approvals(agreed.product),
        today=TODAY, pin=pin,
    )  # fmt: skip
    if made.approval:
        vendor.place.keep_approval(*made.approval)
    vendor.place.keep_license(made.license, made.raw, recorded(made.license, parts, [packaged(vendor.manifest)]))
    return Issued(made.license, made.raw, vendor)


def revise(old, terms=TERMS, parts=(), manifests=(), **options):
    """As the command does."""
    vendor = old.vendor
    known = vendor.place.issued(old.raw)
    source = revising.sources(known, vendor.place.basis(known), parts, [packaged(m) for m in manifests])
    agreed = revising.kept_revocable(known, parse_terms(terms))
    made = issuing.make(
        vendor.public, vendor.keys, source.parts, source.packages, agreed, vendor.place.approvals(agreed.product),
        today=TODAY, license_id=known.grant.license, revision=known.grant.revision + 1, since=source.since, **options,
    )  # fmt: skip
    vendor.place.keep_license(
        made.license, made.raw, recorded(made.license, source.parts, source.packages, source.since)
    )
    return Issued(made.license, made.raw, vendor)


# ---- what stays, and what is new --------------------------------------------------------------------------


def test_the_license_stays_and_all_its_secrets_are_new(own_vendor):
    old = issue(own_vendor)
    new = revise(old, TERMS + "[validity]\nnot_after = 2031-01-01\n")
    assert verified(new.raw, License, own_vendor.public) == new.license
    before, after = old.license.grant, new.license.grant
    assert (after.license, after.revision) == (before.license, 2)
    assert after == replace(before, revision=2, not_after=datetime.date(2031, 1, 1), use=after.use)
    assert new.license.keys[0].content_key == old.license.keys[0].content_key
    for name in ("public", "duplicate", "seed", "storage_credential", "attestation_credential"):
        assert getattr(new.tpm, name) != getattr(old.tpm, name)
    for name in ("storage_root_key", "attestation_key", "endorsement_key", "endorsement"):
        assert getattr(new.tpm, name) == getattr(old.tpm, name)
    assert new.license.wraps != old.license.wraps
    assert new.license.keys != old.license.keys


def test_any_term_may_change(own_vendor):
    old = issue(own_vendor, OPENS)
    new = revise(old, 'licensee = "B"\nproduct = "other"\n[features]\nx = 1\n[continuity]\nsession = "1h"\n')
    grant = new.license.grant
    assert (grant.licensee, grant.product, grant.continuity) == ("B", "other", 3600)
    assert grant.terms_of_use.features == {"x": 1}
    assert grant.terms_of_use.limits.opens is None


def test_other_packages_take_the_place_of_those_before(own_vendor, tmp_path):
    (tmp_path / "more").write_bytes(b"more")
    second = own_vendor.pack(tmp_path / "second.hwpkg", tmp_path / "more", name="second")
    old = issue(own_vendor)
    new = revise(old, manifests=[own_vendor.manifest, second])
    assert [package.name for package in new.license.grant.packages] == ["reader", "second"]
    assert revise(new).license.grant.packages == new.license.grant.packages
    assert [package.name for package in revise(revise_last(new), manifests=[second]).license.grant.packages] == [
        "second"
    ]


def revise_last(issued):
    place = issued.vendor.place
    latest = place.latest_revision(issued.license.grant.license)
    raw = (place.path / "issued" / f"{issued.license.grant.license}-r{latest}.hwlic").read_bytes()
    return Issued(unverified(raw, License)[0], raw, issued.vendor)


def test_a_revision_may_have_a_pin_and_lose_it(own_vendor):
    old = issue(own_vendor)
    assert not revising.had_pin(old.license)
    new = revise(old, pin=Secret(bytearray(b"1234")))
    assert revising.had_pin(new.license)
    assert not revising.had_pin(revise(new).license)


# ---- counter, opens, hours --------------------------------------------------------------------------------


def test_the_counter_goes_on_by_two(own_vendor):
    last = issue(own_vendor, OPENS)
    values = [last.tpm.counter.value]
    for _ in range(4):
        last = revise(last, OPENS)
        values.append(last.tpm.counter.value)
    assert values == [42, 44, 46, 48, 50]
    assert "dead in hardware" in revising.end_of(issue(own_vendor, OPENS).license, last.license)


def test_hours_go_on_from_the_request(own_vendor):
    old = issue(own_vendor, TERMS + "[limits]\npowered_on_hours = 8760\n")
    assert old.tpm.deadline == 5 * HOUR + 8760 * HOUR
    more = revise(old, TERMS + "[limits]\npowered_on_hours = 9000\n")
    assert more.tpm.deadline == old.tpm.deadline + 240 * HOUR
    assert revise(more).tpm.deadline is None


def test_a_new_request_starts_from_its_own_clock_and_counter(own_vendor):
    terms = TERMS + "[limits]\npowered_on_hours = 10\n"
    old = revise(issue(own_vendor, terms), terms)
    keys = {"ek": COUNTED.endorsement_key, "srk": COUNTED.storage_root_key, "ak": COUNTED.attestation_key}
    fresh = tpm_part(clock=7000 * HOUR, counter=TpmCounter(0x01880004, 91), **keys)
    new = revise(old, terms, [fresh])
    assert new.tpm.deadline == 7010 * HOUR
    assert (new.tpm.counter.handle, new.tpm.counter.value) == (0x01880004, 92)
    assert "another counter" in revising.end_of(old.license, new.license)
    assert revise(new, terms).tpm.counter.value == 94


def test_the_same_request_again_counts_on(own_vendor):
    """Otherwise the revision would open at the value of one before it, which would not end."""
    last = issue(own_vendor, OPENS)
    for value in (44, 46, 48):
        last = revise(last, OPENS, [COUNTED])
        assert last.tpm.counter.value == value


def test_an_older_request_with_the_same_counter_is_refused(own_vendor):
    last = revise(issue(own_vendor, OPENS), OPENS)
    keys = {"ek": COUNTED.endorsement_key, "srk": COUNTED.storage_root_key, "ak": COUNTED.attestation_key}
    with refused("EVIDENCE_INVALID", words="older"):
        revise(last, OPENS, [tpm_part(counter=TpmCounter(0x01880000, 39), **keys)])
    assert revise(last, OPENS, [tpm_part(counter=TpmCounter(0x01880000, 77), **keys)]).tpm.counter.value == 78


def test_a_counted_license_stays_revocable(own_vendor):
    """Or its old revision, with more of everything, would go on opening."""
    new = revise(issue(own_vendor, OPENS))
    assert new.license.grant.terms_of_use.revocable
    assert new.tpm.counter.value == 44
    uncounted = issue(own_vendor)
    assert uncounted.tpm.counter is None
    new = revise(uncounted)
    assert new.tpm.counter is None
    assert "Nothing in hardware ends revision 1" in revising.end_of(uncounted.license, new.license)
    with refused("TERM_INVALID", words="counter"):
        revise(issue(own_vendor, OPENS), TERMS, [COUNTED._replace(evidence=replace(COUNTED.evidence, counter=None))])


def test_after_a_clear_the_same_ek_has_another_srk(own_vendor):
    old = issue(own_vendor, OPENS)
    cleared = tpm_part(counter=TpmCounter(0x01880008, 101), ek=COUNTED.endorsement_key)
    new = revise(old, OPENS, [cleared])
    assert new.tpm.storage_root_key != old.tpm.storage_root_key
    assert new.tpm.counter.value == 102
    assert "cleared" in revising.end_of(old.license, new.license)


# ---- platform states --------------------------------------------------------------------------------------


def test_an_earlier_requests_platform_state_does_not_bind_a_revision(own_vendor):
    old = issue(own_vendor, WITH_PCRS)
    later = [Pcr("sha256", index, b"\x77" * 32) for index in (0, 7)]
    newer = approving.approve(own_vendor.public, own_vendor.keys, "label-reader", 2, later)
    own_vendor.place.keep_approval(*newer)
    new = revise(old, WITH_PCRS)
    assert new.license.grant.generation == 2
    assert new.license.approvals == [newer[0]]
    with refused("PLATFORM_UNAPPROVED"):  # a new request says what is there now
        revise(new, WITH_PCRS, [COUNTED])


def test_pcrs_that_the_product_line_is_not_approved_by(own_vendor):
    old = issue(own_vendor, WITH_PCRS)
    with refused("TERM_INVALID", words="approved by"):
        revise(old, TERMS + '[require]\npcrs = ["sha256:7"]\n')


def test_pcrs_that_come_with_a_revision(own_vendor):
    new = revise(issue(own_vendor), WITH_PCRS)
    assert [approval.pcrs for approval in new.license.approvals] == [PCR_VALUES]
    with refused("TERM_INVALID"):
        revise(issue(own_vendor, parts=[tpm_part(pcrs=[])]), WITH_PCRS.replace("label-reader", "other"))


# ---- the device -------------------------------------------------------------------------------------------


def test_a_request_of_another_device_is_refused(own_vendor):
    old = issue(own_vendor)
    for parts in ([tpm_part()], [token_part()], [tpm_part(srk=COUNTED.storage_root_key)]):
        with refused("WRONG_DEVICE"):
            revise(old, parts=parts)


def test_a_lost_token_may_be_replaced_beside_the_same_tpm(own_vendor):
    first, second = token_part(), token_part()
    old = issue(own_vendor, parts=[COUNTED, first])
    new = revise(old, parts=[COUNTED, second])
    assert new.license.bindings[1].key == second.evidence.key
    with refused("WRONG_DEVICE"):
        revise(new, parts=[second])  # nor may the TPM be left out
    alone = issue(own_vendor, parts=[first])
    assert len(revise(alone, parts=[first, second]).license.bindings) == 2
    with refused("WRONG_DEVICE"):
        revise(issue(own_vendor, parts=[first]), parts=[second])


# ---- the folder's records ---------------------------------------------------------------------------------


def test_the_basis_lies_beside_the_license(own_vendor):
    old = issue(own_vendor, OPENS)
    path = own_vendor.place.path / "issued" / f"{old.license.grant.license}-r1.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    basis = decode(path.read_bytes().strip(), Basis)
    assert basis == own_vendor.place.basis(old.license)
    assert parts_of(basis, old.license) == [COUNTED]
    assert basis.packages[0].wrapped_content_key == own_vendor.manifest.wrapped_content_key


def test_a_license_of_an_earlier_release_has_no_basis(own_vendor):
    old = issue(own_vendor)
    (own_vendor.place.path / "issued" / f"{old.license.grant.license}-r1.json").unlink()
    for parts, manifests in (([], []), ([COUNTED], []), ([], [own_vendor.manifest])):
        with refused("USAGE", words="earlier release"):
            revise(old, parts=parts, manifests=manifests)
    new = revise(old, parts=[COUNTED], manifests=[own_vendor.manifest])
    assert revise(new).license.grant.revision == 3  # from then on there is one


EDITS = {
    "another TPM": lambda b: replace(b, parts=[replace(b.parts[0], evidence=tpm_part().evidence)]),
    "another EK": lambda b: replace(b, parts=[replace(b.parts[0], endorsement_key=tpm_part().endorsement_key.raw)]),
    "another SRK": lambda b: evidence(b, storage_root_key=tpm_part().storage_root_key.raw),
    "another AK": lambda b: evidence(b, attestation_key=tpm_part().attestation_key.raw),
    "a token in its place": lambda b: replace(b, parts=_token_basis(token_part())),
    "one more": lambda b: replace(b, parts=[*b.parts, *_token_basis(token_part())]),
    "another root": lambda b: replace(
        b, parts=[replace(b.parts[0], endorsement=Endorsement("certificate", "CN=x", "discrete"))]
    ),
    "another license": lambda b: replace(b, license="ab" * 16),
    "another revision": lambda b: replace(b, revision=2),
    "later than it is": lambda b: replace(b, since=2),
    "another package": lambda b: replace(
        b, packages=[replace(b.packages[0], reference=replace(b.packages[0].reference, content_key="cd" * 16))]
    ),
    "an EK that is none": lambda b: replace(b, parts=[replace(b.parts[0], endorsement_key=b"x")]),
}


def evidence(basis, **changes):
    (part,) = basis.parts
    return replace(basis, parts=[replace(part, evidence=replace(part.evidence, **changes))])


def _token_basis(part):
    return [TokenBasis(part.evidence, part.endorsement)]


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_basis_binds_to_nothing_else(own_vendor, edit):
    """Who can write to the folder, without its keys, does not get the next revision for other hardware."""
    old = issue(own_vendor)
    changed = edit(own_vendor.place.basis(old.license))
    path = own_vendor.place.path / "issued" / f"{old.license.grant.license}-r1.json"
    path.write_bytes(encode(changed) + b"\n")
    with refused("DOCUMENT_MALFORMED", "EVIDENCE_INVALID"):
        revise(old)


def test_an_edited_content_key_gives_a_refusal(own_vendor, tmp_path):
    (tmp_path / "more").write_bytes(b"more")
    other = own_vendor.pack(tmp_path / "other.hwpkg", tmp_path / "more")
    old = issue(own_vendor)
    basis = own_vendor.place.basis(old.license)
    swapped = replace(basis, packages=[replace(basis.packages[0], wrapped_content_key=other.wrapped_content_key)])
    (own_vendor.place.path / "issued" / f"{old.license.grant.license}-r1.json").write_bytes(encode(swapped) + b"\n")
    with refused("PACKAGE_DAMAGED"):
        revise(old)


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 50, b"[" * 9000, b"x" * (2 << 20)])
def test_a_damaged_basis_is_said(own_vendor, content):
    old = issue(own_vendor)
    path = own_vendor.place.path / "issued" / f"{old.license.grant.license}-r1.json"
    path.write_bytes(content)
    with refused("DOCUMENT_MALFORMED", "DOCUMENT_TOO_LARGE", words=str(path)):
        revise(old)


# ---- what may be revised ----------------------------------------------------------------------------------


def test_only_the_latest_revision_is_revised(own_vendor):
    old = issue(own_vendor)
    new = revise(old)
    with pytest.raises(HwlicenseError) as caught:
        revise(old)
    assert caught.value.reason == "LICENSE_SUPERSEDED"
    assert f"{new.license.grant.license}-r2.hwlic" in caught.value.hint


def test_a_license_that_was_never_issued_here_is_refused(own_vendor, tmp_path):
    old = issue(own_vendor)
    (tmp_path / "other").mkdir()
    other = Vendor(tmp_path / "other")
    with refused("WRONG_VENDOR"):
        other.place.issued(old.raw)
    before = listing(own_vendor.place.path)
    for issued in (own_vendor.place.path / "issued").iterdir():
        issued.unlink()
    with refused("LICENSE_ABSENT"):
        own_vendor.place.issued(old.raw)
    assert own_vendor.place.latest_revision(old.license.grant.license) == 0
    assert before != listing(own_vendor.place.path)


def test_copies_of_a_folder_go_different_ways(own_vendor):
    old = issue(own_vendor)
    mine = revise(old)
    place = own_vendor.place.path / "issued" / f"{old.license.grant.license}-r2.hwlic"
    place.unlink()
    theirs = revise(old)
    assert theirs.raw != mine.raw
    with refused("LICENSE_ABSENT", words="no record"):
        own_vendor.place.issued(mine.raw)


def test_names_in_the_folder_that_mean_nothing(own_vendor):
    old = issue(own_vendor)
    for name in ("r99", "r", "rx", "r-5", "r1 (copy)", "r\u0663"):
        (own_vendor.place.path / "issued" / f"{old.license.grant.license}-{name}.txt").write_bytes(b"")
    (own_vendor.place.path / "issued" / f"{old.license.grant.license}-r1 (copy).hwlic").write_bytes(b"")
    (own_vendor.place.path / "issued" / f"{old.license.grant.license}-rx.hwlic").write_bytes(b"")
    assert own_vendor.place.latest_revision(old.license.grant.license) == 1
    revise(old)


def test_tpm_basis_keeps_the_clock():
    basis = TpmBasis(COUNTED.evidence, COUNTED.endorsement_key.raw, RECORDED, COUNTED.clock)
    assert Public.parse(basis.endorsement_key) == COUNTED.endorsement_key


def test_pcrs_of_a_tpm_that_was_enrolled_without_any(own_vendor):
    with refused("TERM_INVALID", words="the TPM was enrolled without any"):
        issue(own_vendor, WITH_PCRS, [tpm_part(pcrs=())])
