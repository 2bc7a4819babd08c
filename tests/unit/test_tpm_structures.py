"""PCR selections and public areas: vectors made by a TPM, strictness, and what each kind of key must be."""

import contextlib
import hashlib
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from hwlicense.core.documents import Pcr
from hwlicense.core.errors import DamagedError, HwlicenseError, Reason, RefusedError, UsageError
from hwlicense.core.tpm import structures
from hwlicense.core.tpm.pcrs import Selection, values_digest
from hwlicense.core.tpm.structures import Attributes, Public
from hwlicense.core.tpm.wire import Algorithm, Reader, sized

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "tpm-public.json").read_text())
RAW = [bytes.fromhex(vector["public"]) for vector in VECTORS]
CHECKS = {
    "storage root key": structures.check_storage_root_key,
    "attestation key": structures.check_attestation_key,
    "endorsement key": structures.check_endorsement_key,
}
assert len(VECTORS) == 7


# ---- PCR selections ----


@pytest.mark.parametrize(
    ("entries", "canonical", "marshalled"),
    [
        (["sha256:7"], "sha256:7", "00000001000b03800000"),
        (["sha256:7,4"], "sha256:4,7", "00000001000b03900000"),
        (["sha384:7", "sha256:0,15"], "sha256:0,15+sha384:7", "00000002000b03018000000c03800000"),
        (["sha384:7+sha256:0", "sha256:15"], "sha256:0,15+sha384:7", "00000002000b03018000000c03800000"),
        ([" sha256: 4, 7 "], "sha256:4,7", "00000001000b03900000"),
        ([], "", "00000000"),
    ],
)
def test_a_selection_has_one_canonical_form(entries, canonical, marshalled):
    selection = Selection.parse(*entries)
    assert (str(selection), selection.marshal().hex()) == (canonical, marshalled)
    if entries:
        assert Selection.parse(canonical) == selection


@pytest.mark.parametrize(
    "entry",
    [
        *(
            "",
            "sha256",
            "sha256:",
            "sha1:7",
            "sha512:7",
            "SHA256:7",
            "sha256:24",
            "sha256:-1",
            "sha256:007",
            "sha256:7,",
        ),
        *("sha256:7,", "sha256:7,7", "sha256:1-4", "sha256:7;8", "sha256:7+sha256:7", "+", "sha256:\u0667"),
    ],
)
def test_what_is_no_selection_is_a_usage_error(entry):
    with pytest.raises(UsageError):
        Selection.parse(entry)


@pytest.mark.parametrize("index", [16, 21, 22, 23])
def test_pcrs_that_can_be_reset_or_do_not_end_sessions_are_refused(index):
    with pytest.raises(RefusedError, match=f"PCR {index} cannot bind") as caught:
        Selection.parse(f"sha256:{index}")
    assert caught.value.reason == Reason.PCR_UNUSABLE


def test_values_enter_the_digest_in_the_tpms_order_whatever_order_they_come_in():
    a, b, c = Pcr("sha256", 4, b"a" * 32), Pcr("sha256", 7, b"b" * 32), Pcr("sha384", 0, b"c" * 48)
    assert values_digest([c, b, a]) == hashlib.sha256(b"a" * 32 + b"b" * 32 + b"c" * 48).digest()
    assert values_digest([a], Algorithm.SHA384) == hashlib.sha384(b"a" * 32).digest()


@pytest.mark.parametrize("value", [bytes(32), b"\xff" * 32, b"a" * 31, b"a" * 48])
def test_a_pcr_that_was_never_extended_is_refused_by_name(value):
    with pytest.raises(RefusedError, match=r"PCR 9 \(sha256\)") as caught:
        values_digest([Pcr("sha256", 7, b"a" * 32), Pcr("sha256", 9, value)])
    assert caught.value.reason == Reason.PCR_UNUSABLE


# ---- public areas ----


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["comment"])
def test_vectors_parse_marshal_back_and_have_the_tpms_name(vector):
    public = Public.parse(bytes.fromhex(vector["public"]))
    assert (public.raw.hex(), public.name.hex()) == (vector["public"], vector["name"])
    assert isinstance(public.key(), (rsa.RSAPublicKey, ec.EllipticCurvePublicKey))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["comment"])
def test_each_key_is_accepted_for_its_own_use_alone(vector):
    public = Public.parse(bytes.fromhex(vector["public"]))
    for use, check in CHECKS.items():
        # High-range endorsement keys have user authorisation, too: nothing in them tells the hierarchy. The
        # credential does, which the TPM's certified key opens for the right names alone.
        if use == vector["use"] or (use == "storage root key" and "high range" in vector["comment"]):
            check(public)
            continue
        with pytest.raises(DamagedError, match=f"The {use} (lacks|has)") as caught:
            check(public)
        assert caught.value.reason == Reason.EVIDENCE_INVALID


@pytest.mark.parametrize(
    ("use", "attribute"),
    [
        (use, attribute)
        for use in CHECKS
        for attribute in ("FIXED_TPM", "FIXED_PARENT", "SENSITIVE_DATA_ORIGIN", "RESTRICTED")
    ]
    + [("storage root key", "DECRYPT"), ("storage root key", "USER_WITH_AUTH"), ("storage root key", "SIGN")]
    + [("attestation key", "SIGN"), ("attestation key", "DECRYPT"), ("endorsement key", "ADMIN_WITH_POLICY")],
)
def test_a_wrong_attribute_is_named(use, attribute):
    raw = next(bytearray.fromhex(vector["public"]) for vector in VECTORS if vector["use"] == use)
    raw[4:8] = (int.from_bytes(raw[4:8], "big") ^ Attributes[attribute]).to_bytes(4, "big")
    with pytest.raises(DamagedError, match=f"{use} (lacks|has) the attribute {attribute}") as caught:
        CHECKS[use](Public.parse(bytes(raw)))
    assert caught.value.reason == Reason.EVIDENCE_INVALID


@pytest.mark.parametrize("raw", RAW)
def test_no_prefix_and_no_extension_of_a_public_area_is_one(raw):
    for end in range(len(raw)):
        with pytest.raises(DamagedError):
            Public.parse(raw[:end])
    with pytest.raises(DamagedError, match="after its end there is more: 1 byte"):
        Public.parse(raw + b"\0")


@given(st.sampled_from(RAW), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4))
def test_whatever_parses_marshals_to_the_same_bytes(raw, changes):
    area = bytearray(raw)
    for at, value in changes:
        area[at % len(area)] = value
    try:
        public = Public.parse(bytes(area))
    except DamagedError:
        return
    assert public.raw == bytes(area)
    with contextlib.suppress(DamagedError):
        public.key()


@given(st.binary(max_size=400))
def test_noise_is_damaged_and_nothing_else(noise):
    with pytest.raises(DamagedError):
        Public.parse(noise, Reason.LICENSE_DAMAGED)


def test_a_point_off_the_curve_and_an_even_modulus_are_no_keys():
    curve = bytearray(RAW[0])
    curve[-1] ^= 1
    modulus = bytearray(next(raw for raw in RAW if raw[1] == 1))
    modulus[-1] ^= 1
    for raw in (curve, modulus):
        with pytest.raises(DamagedError, match="valid public key"):
            Public.parse(bytes(raw)).key()


def test_a_sealed_object_has_no_password_and_only_without_a_pin_no_lockout():
    plain = structures.sealed_public(b"p" * 32, b"d" * 32, pin=False)
    pinned = structures.sealed_public(b"p" * 32, b"d" * 32, pin=True)
    assert plain.attributes == Attributes.ADMIN_WITH_POLICY | Attributes.NO_DA
    assert pinned.attributes == Attributes.ADMIN_WITH_POLICY
    assert Public.parse(plain.raw) == plain


@given(st.binary(max_size=64))
def test_a_reader_gives_back_what_was_sized_and_nothing_more(content):
    reader = Reader(sized(content), "test")
    assert reader.sized() == content
    reader.end()
    with pytest.raises(HwlicenseError, match="it ends too early"):
        Reader(sized(content), "test").take(len(content) + 3)


def test_a_size_beyond_the_limit_is_refused_before_it_is_read():
    with pytest.raises(DamagedError, match="65535 bytes where 512 are allowed"):
        Reader(b"\xff\xff", "test").sized()
