"""Envelopes, against securesystemslib's DSSE and ML-DSA (TAP 21)."""

import base64
import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from securesystemslib.dsse import Envelope as OracleEnvelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

from hwlicense.core.documents import Approval, License, Pcr, VendorPublic
from hwlicense.core.envelope import disassemble, keyid, seal, unverified, verified
from hwlicense.core.errors import DamagedError, Reason, RefusedError
from hwlicense.core.schema import SCHEMA
from hwlicense.vendor import signing

APPROVAL = Approval(SCHEMA, "ab" * 32, "label-reader", 1, [Pcr("sha256", 7, b"\1" * 32)], b"\2" * 32, b"\3" * 72)


def made(classical="ed25519"):
    keys = signing.generate(classical)
    public = signing.public_part("Acme", keys)
    return public, signing.assembled(keys, public)


@pytest.fixture(scope="module", params=signing.CLASSICAL_KINDS)
def vendor(request):
    return made(request.param)


def refusal(raw, public, kind=Approval):
    with pytest.raises((DamagedError, RefusedError)) as caught:
        verified(raw, kind, public)
    return caught.value.reason


def test_round_trip(vendor):
    public, keys = vendor
    assert verified(seal(APPROVAL, keys.signers), Approval, public) == APPROVAL


def oracle_key(public: bytes, identifier: str):
    key = load_der_public_key(public)
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    if isinstance(key, ed25519.Ed25519PublicKey):
        return SSlibKey(identifier, "ed25519", "ed25519", {"public": key.public_bytes_raw().hex()})
    if isinstance(key, mldsa.MLDSA65PublicKey):
        return SSlibKey.from_crypto(key, identifier)
    return SSlibKey(identifier, "ecdsa", "ecdsa-sha2-nistp256", {"public": pem})


def test_securesystemslib_verifies_what_we_sign(vendor):
    public, keys = vendor
    envelope = OracleEnvelope.from_dict(json.loads(seal(APPROVAL, keys.signers)))
    oracle_keys = [oracle_key(each, keyid(each)) for each in (public.classical, public.ml_dsa_65)]
    assert len(envelope.verify(oracle_keys, 2)) == 2
    envelope.payload += b" "
    with pytest.raises(VerificationError):
        envelope.verify(oracle_keys, 2)


def test_we_verify_what_securesystemslib_signs():
    classical, ml_dsa, policy = (
        ed25519.Ed25519PrivateKey.generate(),
        mldsa.MLDSA65PrivateKey.generate(),
        ec.generate_private_key(ec.SECP256R1()),
    )
    public = VendorPublic(SCHEMA, "Acme", *(signing.public_bytes(k.public_key()) for k in (classical, ml_dsa, policy)))
    envelope = OracleEnvelope.from_dict(json.loads(seal(APPROVAL, [])))
    for key, spki in ((classical, public.classical), (ml_dsa, public.ml_dsa_65)):
        envelope.sign(CryptoSigner(key, oracle_key(spki, keyid(spki))))
    compact = json.dumps(envelope.to_dict(), separators=(",", ":")).encode() + b"\n"
    assert verified(compact, Approval, public) == APPROVAL


def test_both_signatures_are_required(vendor):
    public, keys = vendor
    for only in keys.signers:
        assert refusal(seal(APPROVAL, [only]), public) == Reason.SIGNATURE_MISSING
    assert refusal(seal(APPROVAL, []), public) == Reason.WRONG_VENDOR


def test_one_key_cannot_sign_for_the_other(vendor):
    public, keys = vendor
    twice = VendorPublic(SCHEMA, "Acme", public.ml_dsa_65, public.ml_dsa_65, public.policy)
    with pytest.raises(DamagedError):
        verified(seal(APPROVAL, keys.signers), Approval, twice)


def test_another_vendor_is_named_as_such(vendor):
    assert refusal(seal(APPROVAL, vendor[1].signers), made()[0]) == Reason.WRONG_VENDOR


def test_a_document_of_one_type_is_none_of_another(vendor):
    public, keys = vendor
    raw = seal(APPROVAL, keys.signers)
    assert refusal(raw, public, License) == Reason.DOCUMENT_MALFORMED
    retyped = raw.replace(b"approval+json", b"license+json")
    assert refusal(retyped, public, License) == Reason.SIGNATURE_INVALID


def test_every_changed_byte_is_refused(vendor):
    public, keys = vendor
    raw = seal(APPROVAL, keys.signers)
    for at in range(len(raw)):
        refusal(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :], public)


def test_truncated_extended_and_empty(vendor):
    public, keys = vendor
    raw = seal(APPROVAL, keys.signers)
    for changed in (b"", raw[:-1], raw[: len(raw) // 2], raw + b"\n", raw + raw, b"\0" * 100, b"[" * 200_000):
        assert refusal(changed, public) == Reason.DOCUMENT_MALFORMED


def test_duplicate_keys_and_odd_spellings_are_refused(vendor):
    raw = seal(APPROVAL, vendor[1].signers)
    envelope = json.loads(raw)
    payload = base64.b64decode(envelope["payload"])
    for changed in (
        raw.replace(b'{"payload"', b'{"payload":"","payload"', 1),
        raw.replace(b'"payloadType"', b' "payloadType"', 1),
        raw.replace(b'{"payload"', b'{"extra":1,"payload"', 1),
    ):
        with pytest.raises(DamagedError) as caught:
            disassemble(changed)
        assert caught.value.reason == Reason.DOCUMENT_MALFORMED
    for inner in (
        payload.replace(b'"product"', b'"product":"x","product"', 1),
        payload.replace(b":1,", b":1 ,", 1),
        payload.replace(b'"schema":1', b'"schema":true', 1),
        payload.replace(b"label-reader", b"label\\u002dreader", 1),
    ):
        assert inner != payload
        envelope["payload"] = base64.b64encode(inner).decode()
        with pytest.raises(DamagedError) as caught:
            unverified(json.dumps(envelope, separators=(",", ":")).encode() + b"\n", Approval)
        assert caught.value.reason == Reason.DOCUMENT_MALFORMED


def test_a_repeated_signature_is_refused(vendor):
    first, second = vendor[1].signers
    with pytest.raises(DamagedError, match="two signatures"):
        disassemble(seal(APPROVAL, [first, second, first]))


def test_a_newer_schema_is_named(vendor):
    public, keys = vendor
    newer = Approval(2, "ab" * 32, "label-reader", 1, APPROVAL.pcrs, b"\2" * 32, b"")
    assert refusal(seal(newer, keys.signers), public) == Reason.SCHEMA_UNSUPPORTED


def test_size_is_checked_before_parsing(vendor):
    assert refusal(b" " * (100 << 20), vendor[0]) == Reason.DOCUMENT_TOO_LARGE
