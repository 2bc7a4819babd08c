"""What a device's owner may send instead of an honest request."""

import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from tpm2_pytss import ESYS_TR

from hwlicense.binders.tpm import installing
from hwlicense.binders.tpm import keys as tpm_keys
from hwlicense.binders.tpm.connection import Connection
from hwlicense.core.documents import EndorsementKey, Pcr, Request
from hwlicense.core.envelope import Signature, assemble, statement, unverified
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.tpm.quote import quote_data
from hwlicense.core.tpm.structures import ATTESTATION_TEMPLATE, Attributes, Public
from hwlicense.device.enrolling import enroll
from hwlicense.device.home import Home
from hwlicense.vendor import evidence
from hwlicense_simulators import CertificateAuthority, Tpm
from tests.forging import (
    TLS_SERVER,
    Maker,
    SoftwareKey,
    edited,
    flipped,
    now,
    refused,
    rejoined,
    replace,
    software_request,
    software_storage_key,
)
from tests.world import MEMBERS, PCRS, TERMS, Device, Vendor, everything, licensed


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return CertificateAuthority(tmp_path_factory.mktemp("maker") / "authority")


@pytest.fixture(scope="module")
def tpm(authority):
    with Tpm(authority=authority) as tpm:
        yield tpm


@pytest.fixture(scope="module")
def honest(tpm, tmp_path_factory):
    """One honest request, for all that is forged without a TPM."""
    return Device(Home(tmp_path_factory.mktemp("device")), tpm).request()


@pytest.fixture(scope="module")
def roots(tpm):
    return evidence.read_roots(tpm.ek_root.read_bytes(), "virtual")


@pytest.fixture
def examine(roots):
    return lambda raw, chosen=None, recorded=(): evidence.examine(
        raw, evidence.Trusted(roots if chosen is None else chosen, recorded), now()
    )


def hardware_of(raw):
    return unverified(raw, Request)[0].hardware[0]


def test_the_forger_is_as_good_as_the_checks_that_need_no_tpm(honest, examine):
    assert examine(honest).tpm.endorsement.root_class == "virtual"
    assert examine(software_request(honest)).tpm.endorsement.root_class == "virtual"


# ---- endorsement ------------------------------------------------------------------------------------------


def test_certificates_of_the_right_maker_for_the_wrong_purpose(honest, examine, authority):
    ek = Public.parse(hardware_of(honest).endorsement_keys[0].public)
    maker, other = Maker(authority.folder), ec.generate_private_key(ec.SECP256R1()).public_key()

    def examined(certificate):
        key = EndorsementKey(ek.raw, certificate)
        return examine(software_request(honest, endorsement_keys=[key])).tpm.endorsement

    assert examined(maker.certify(ek.key())).basis == "certificate"
    for wrong, words in (
        (maker.certify(ek.key(), days=(-20, -10)), "not valid"),
        (maker.certify(ek.key(), days=(10, 20)), "not valid"),
        (maker.certify(ek.key(), ca=True), "CA"),
        (maker.certify(ek.key(), usages=(TLS_SERVER,)), "not for an EK"),
        (maker.certify(other), "another key"),
        (maker.issuer.public_bytes(Encoding.DER), "another key"),
        (None, "no certificate"),
        (b"", "parsing"),
        (maker.certify(ek.key())[:-1], "parsing"),
    ):
        with refused("EK_UNTRUSTED", words=words):
            examined(wrong)


def test_no_byte_of_a_certificate_may_differ(honest, examine, authority):
    """Nor does any damage to it end in anything but a refusal, where it touches what is signed or the signature."""
    ek = Public.parse(hardware_of(honest).endorsement_keys[0].public)
    certificate = Maker(authority.folder).certify(ek.key())
    for place in range(len(certificate)):
        key = EndorsementKey(ek.raw, flipped(certificate, place, 1 << place % 8))
        request = software_request(honest, endorsement_keys=[key])
        if _says_the_same(key.certificate, certificate):  # in the count of a signature's unused bits
            continue
        with refused("EK_UNTRUSTED"):
            examine(request)


def _says_the_same(changed, original):
    try:
        one, other = x509.load_der_x509_certificate(changed), x509.load_der_x509_certificate(original)
    except (ValueError, x509.InvalidVersion, Warning):
        return False
    return (one.tbs_certificate_bytes, one.signature) == (other.tbs_certificate_bytes, other.signature)


def test_an_unknown_maker_is_not_trusted(honest, examine, tmp_path):
    stranger = CertificateAuthority(tmp_path / "stranger")
    with refused("EK_UNTRUSTED"):
        examine(honest, evidence.read_roots(stranger.root.read_bytes(), "discrete"))
    with refused("EK_UNTRUSTED"):
        examine(honest, [])


def test_an_expired_root_is_not_trusted(honest, roots):
    after = roots[0].certificate.not_valid_after_utc + datetime.timedelta(1)
    with refused("EK_UNTRUSTED"):
        evidence.examine(honest, evidence.Trusted(roots), after)


def test_an_intermediate_must_be_given_too(hwlicense_tpms, tmp_path, examine):
    maker = CertificateAuthority(tmp_path / "maker", intermediate=True)
    request = Device(Home(tmp_path / "home"), hwlicense_tpms(authority=maker)).request()
    with refused("EK_UNTRUSTED"):
        examine(request, evidence.read_roots(maker.root.read_bytes(), "firmware"))
    both = maker.root.read_bytes() + maker.issuer.read_bytes()
    assert examine(request, evidence.read_roots(both, "firmware")).tpm.endorsement.root_class == "firmware"


def test_an_ek_without_certificate_counts_only_if_it_was_recorded(
    hwlicense_tpms, tmp_path, examine, honest, own_vendor
):
    device = Device(Home(tmp_path / "home"), hwlicense_tpms(ek_certificates=False))
    request = device.request()
    name = Public.parse(hardware_of(request).endorsement_keys[0].public).name
    other = Public.parse(hardware_of(honest).endorsement_keys[0].public).name
    for recorded in ((), (other,), (name[:-1],), (b"",)):
        with refused("EK_UNTRUSTED"):
            examine(request, recorded=recorded)
    issued = own_vendor.issue(request, device.tpm, roots=[], recorded=(name,))
    assert issued.license.bindings[0].endorsement.basis == "recorded"
    device.install(issued.raw, own_vendor)
    with device.open(own_vendor) as model:
        assert everything(model) == MEMBERS


# ---- keys of other TPMs, and of none ----------------------------------------------------------------------


@pytest.fixture
def two(hwlicense_tpms, tmp_path):
    return [Device(Home(tmp_path / name), hwlicense_tpms()) for name in "ab"]


@pytest.mark.parametrize("of", ["abb", "aba", "aab"])
def test_ek_srk_and_ak_of_different_tpms_open_nowhere(two, own_vendor, of):
    """Whoever owns both TPMs gets a license that none of them takes in."""
    requests = {name: device.request() for name, device in zip("ab", two, strict=True)}
    parts = [hardware_of(requests[name]) for name in of]
    mixed = replace(
        parts[0],
        storage_root_key=parts[1].storage_root_key,
        attestation_key=parts[2].attestation_key,
        pcrs=parts[2].pcrs,
    )
    request = replace(unverified(requests["a"], Request)[0], hardware=[mixed])
    with two["ab".index(of[2])].connect() as hardware:
        proof = hardware.prove(mixed, statement(request))
    raw = assemble(request, [Signature(Public.parse(mixed.attestation_key).name.hex(), proof)])
    issued = own_vendor.issue(raw, two[0].tpm)
    for device in two:
        with refused("WRONG_DEVICE"):
            device.install(issued.raw, own_vendor)
        with refused("LICENSE_ABSENT"):
            device.open(own_vendor)


def test_a_storage_key_made_in_software_opens_nowhere(two, own_vendor):
    device = two[0]
    made = software_storage_key()
    issued = own_vendor.issue(software_request(device.request(), storage_root_key=made.public.raw), device.tpm)
    with refused("WRONG_DEVICE"):
        device.install(issued.raw, own_vendor)
    # The share for it is out of reach: the public area loads under the right Name, but only a whole key is activated
    binding = issued.license.bindings[0]
    connection = Connection(device.tpm.tcti)
    with refused("TPM_AUTHORIZATION", "TPM_FAILED"), connection.work() as work:
        srk, _, _ = tpm_keys.storage_root_key(work)
        area = tpm_keys.tpm_public(made.public)
        software = work.call("load_external", area, None, ESYS_TR.NULL)
        assert bytes(work.call("tr_get_name", software)) == binding.storage_root_key
        ek = tpm_keys.endorsement_key(work, binding.endorsement_key, len(binding.storage_credential.secret))
        installing._share(work, srk, software, *ek, binding.storage_credential)
    connection.close()


def test_an_attestation_key_in_software_that_quotes_the_approved_state_opens_nowhere(two, own_vendor):
    good, bad = two
    licensed(own_vendor, good)
    bad.tpm.reboot(firmware=b"somebody's own")
    with refused("PLATFORM_UNAPPROVED"):
        own_vendor.issue(bad.request(), bad.tpm)
    claimed = software_request(bad.request(), pcrs=hardware_of(good.request()).pcrs)
    issued = own_vendor.issue(claimed, bad.tpm)  # the values are those of the product line
    with refused("WRONG_DEVICE"):
        bad.install(issued.raw, own_vendor)
    with refused("LICENSE_ABSENT"):
        bad.open(own_vendor)


@pytest.mark.parametrize(
    "change",
    [
        {"attributes": ATTESTATION_TEMPLATE.attributes & ~Attributes.RESTRICTED},
        {"attributes": ATTESTATION_TEMPLATE.attributes & ~Attributes.FIXED_TPM},
        {"attributes": ATTESTATION_TEMPLATE.attributes & ~Attributes.SENSITIVE_DATA_ORIGIN},
        {"attributes": ATTESTATION_TEMPLATE.attributes | Attributes.DECRYPT},
    ],
    ids=["not restricted", "not fixed", "imported", "decrypts"],
)
def test_an_attestation_key_that_signs_anything_is_refused(honest, examine, change):
    with refused("EVIDENCE_INVALID"):
        examine(software_request(honest, SoftwareKey(**change)))


@pytest.mark.parametrize("lacking", ["FIXED_TPM", "FIXED_PARENT", "SENSITIVE_DATA_ORIGIN", "RESTRICTED", "DECRYPT"])
def test_a_storage_key_that_can_leave_its_tpm_is_refused(honest, examine, lacking):
    srk = Public.parse(hardware_of(honest).storage_root_key)
    weak = SoftwareKey(srk, attributes=srk.attributes & ~Attributes[lacking]).public
    with refused("EVIDENCE_INVALID"):
        examine(software_request(honest, storage_root_key=weak.raw))


# ---- requests edited or replayed --------------------------------------------------------------------------

PCR_4 = Pcr("sha256", 4, bytes(range(32)))
EDITS = {
    "schema": lambda r, _: (replace(r, schema=2), "SCHEMA_UNSUPPORTED"),
    "created": lambda r, _: (replace(r, created=datetime.date(2030, 1, 1)), "QUOTE_INVALID"),
    "device": lambda r, _: (replace(r, device="other"), "QUOTE_INVALID"),
    "manufacturer": lambda r, _: (_with(r, manufacturer="Other"), "QUOTE_INVALID"),
    "firmware": lambda r, _: (_with(r, firmware="9.9"), "QUOTE_INVALID"),
    "endorsement key": lambda r, h: (_with(r, endorsement_keys=h.endorsement_keys[:1]), "QUOTE_INVALID"),
    "certificate": lambda r, h: (
        _with(r, endorsement_keys=[replace(k, certificate=None) for k in h.endorsement_keys]),
        "QUOTE_INVALID",
    ),
    "storage key": lambda r, _: (_with(r, storage_root_key=software_storage_key().public.raw), "QUOTE_INVALID"),
    "attestation key": lambda r, _: (_with(r, attestation_key=SoftwareKey().public.raw), "QUOTE_INVALID"),
    "keys swapped": lambda r, h: (_with(r, storage_root_key=h.attestation_key), "EVIDENCE_INVALID"),
    "PCR value": lambda r, h: (_with(r, pcrs=[h.pcrs[0], replace(h.pcrs[1], value=bytes(range(32)))]), "QUOTE_INVALID"),
    "PCR left out": lambda r, h: (_with(r, pcrs=h.pcrs[:1]), "QUOTE_INVALID"),
    "PCR added": lambda r, h: (_with(r, pcrs=[*h.pcrs, PCR_4]), "QUOTE_INVALID"),
    "PCRs out of order": lambda r, h: (_with(r, pcrs=h.pcrs[::-1]), "QUOTE_INVALID"),
    "two TPMs": lambda r, h: (replace(r, hardware=[h, h]), "EVIDENCE_INVALID"),
    "no TPM": lambda r, _: (replace(r, hardware=[]), "DOCUMENT_MALFORMED"),
    "no EK": lambda r, _: (_with(r, endorsement_keys=[]), "DOCUMENT_MALFORMED"),
}


def _with(request, **changes):
    return replace(request, hardware=[replace(request.hardware[0], **changes)])


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_request_edited_after_enrolment_is_refused(honest, examine, edit):
    request = unverified(honest, Request)[0]
    changed, reason = edit(request, request.hardware[0])
    with refused(reason):
        examine(edited(honest, changed))


def test_a_request_without_its_quote_is_refused(honest, examine):
    with refused("QUOTE_INVALID"):
        examine(rejoined(honest, signatures=[]))


def test_a_quote_of_another_time_is_refused(device, examine):
    """Neither does an old quote serve a new request, nor a new quote the old values. A whole old request does say again
    what it said; what comes of it opens in that old state only, and only if the vendor approves it.
    """
    old = device.request()
    device.tpm.reboot(firmware=b"firmware 2")
    new = device.request()
    roots = evidence.read_roots(device.tpm.ek_root.read_bytes(), "virtual")
    assert examine(new, roots)
    quote = unverified(old, Request)[1].signatures
    with refused("QUOTE_INVALID"):
        examine(assemble(unverified(new, Request)[0], quote), roots)
    claimed = _with(unverified(new, Request)[0], pcrs=hardware_of(old).pcrs)
    with refused("QUOTE_INVALID"):
        examine(assemble(claimed, unverified(new, Request)[1].signatures), roots)


@pytest.mark.parametrize("kind", ["other PCRs", "other values", "no PCR", "not a quote", "not by a TPM", "other data"])
def test_a_quote_of_something_else_is_refused(honest, examine, kind):
    key = SoftwareKey()
    request = _with(unverified(honest, Request)[0], attestation_key=key.public.raw)
    pcrs, data = request.hardware[0].pcrs, quote_data(statement(request))
    quote = {
        "other PCRs": lambda: key.quote(data, pcrs, [PCR_4]),
        "no PCR": lambda: key.quote(data, [], []),
        "other data": lambda: key.quote(bytes(32), pcrs),
        "other values": lambda: key.quote(data, [replace(pcr, value=bytes(range(32))) for pcr in pcrs], pcrs),
        "not a quote": lambda: key.quote(data, pcrs, start=b"\xffTCG\x80\x17"),  # TPM2_Certify's
        "not by a TPM": lambda: key.quote(data, pcrs, start=b"\xffTCH\x80\x18"),
    }[kind]()
    with refused("QUOTE_INVALID"):
        examine(assemble(request, [Signature(key.public.name.hex(), quote)]))


# ---- PCRs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pcr", [Pcr("sha256", 14, bytes(32)), Pcr("sha256", 17, b"\xff" * 32)], ids=["zero", "ones"])
def test_a_pcr_that_nothing_was_measured_into_is_refused(honest, examine, tmp_path, tpm, pcr):
    with refused("PCR_UNUSABLE"):
        Device(Home(tmp_path), tpm).request(Selection.parse(f"sha256:{pcr.index}"))
    with refused("PCR_UNUSABLE"):
        examine(software_request(honest, pcrs=[pcr]))


@pytest.mark.parametrize("index", [16, 21, 22, 23])
def test_a_pcr_that_can_be_reset_is_refused(honest, examine, index):
    with refused("PCR_UNUSABLE"):
        Selection.parse(f"sha256:{index}")
    with refused("PCR_UNUSABLE"):
        examine(software_request(honest, pcrs=[Pcr("sha256", index, bytes(range(32)))]))


def test_a_bank_that_the_tpm_lacks_is_refused(tmp_path, tpm):
    with refused("PCR_UNUSABLE"):
        Device(Home(tmp_path), tpm).request(Selection.parse("sha384:7"))


def test_values_of_the_wrong_bank_or_twice_are_refused(honest, examine):
    for pcrs in ([Pcr("sha384", 7, bytes(range(32)))], [Pcr("sha256", 7, bytes(range(48)))]):
        with refused("PCR_UNUSABLE"):
            examine(software_request(honest, pcrs=pcrs))
    with refused("EVIDENCE_INVALID"):
        examine(software_request(honest, pcrs=[PCR_4, PCR_4]))


def test_terms_that_ask_for_pcrs_which_the_request_lacks_are_refused(honest, own_vendor, tpm):
    for pcrs in ("sha256:4", "sha256:0,4,7", "sha384:7"):
        with refused("PCR_UNUSABLE"):
            own_vendor.issue(honest, tpm, f'{TERMS}[require]\npcrs = ["{pcrs}"]\n')


# ---- more than one ----------------------------------------------------------------------------------------


def test_two_requests_of_one_device_give_two_licenses_that_open(device, own_vendor):
    first, second = device.request(), device.request()
    for request in (first, second):
        device.install(own_vendor.issue(request, device.tpm).raw, own_vendor)
    assert len(list((device.home.path / "licenses").iterdir())) == 2
    with device.open(own_vendor) as model:
        assert everything(model) == MEMBERS


def test_a_label_too_long_for_a_request_is_refused_before_it_is_written(device):
    for label in ("x" * 201, "\udcff"):
        with device.connect() as hardware, refused("USAGE"):
            enroll([hardware], PCRS, label, now().date())


def test_another_vendors_package_is_not_licensed(honest, own_vendor, tmp_path, tpm):
    (tmp_path / "other").mkdir()
    other = Vendor(tmp_path / "other")
    own_vendor.manifest = other.manifest
    with refused("WRONG_VENDOR"):
        own_vendor.issue(honest, tpm)


def test_x509_is_what_the_forger_says(authority):
    """The forged certificates are refused for what they say, not because they are malformed."""
    maker = Maker(authority.folder)
    made = x509.load_der_x509_certificate(maker.certify(ec.generate_private_key(ec.SECP256R1()).public_key()))
    made.verify_directly_issued_by(maker.issuer)
