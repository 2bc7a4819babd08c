"""Policy digests, approvals and quotes against vectors whose every byte a TPM has made or accepted."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from hwlicense.core.documents import Pcr
from hwlicense.core.errors import DamagedError, Reason, UsageError
from hwlicense.core.tpm import composing, policy, quote, signatures
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.tpm.structures import Public

FOLDER = Path(__file__).parents[1] / "vectors"
POLICIES, QUOTES, APPROVALS = (
    json.loads((FOLDER / f"tpm-{kind}.json").read_text()) for kind in ("policy", "quote", "approval")
)
assert POLICIES
assert QUOTES
assert APPROVALS


def pcrs_of(vector):
    return [Pcr(pcr["bank"], pcr["index"], bytes.fromhex(pcr["value"])) for pcr in vector["pcrs"]]


def step(kind, *arguments):
    match kind:
        case "pcr":
            selection = Selection.parse(arguments[0]) if arguments[0] else Selection()
            return policy.PolicyPCR(selection, bytes.fromhex(arguments[1]))
        case "authorize":
            return policy.PolicyAuthorize(*map(bytes.fromhex, arguments))
        case "command code":
            return policy.PolicyCommandCode(*arguments)
    return policy.PolicyAuthValue()


# ---- policies ----


@pytest.mark.parametrize("vector", POLICIES, ids=lambda vector: vector["comment"])
def test_digests_are_those_of_the_tpms_trial_sessions(vector):
    assert policy.digest([step(*described) for described in vector["steps"]]).hex() == vector["digest"]


@pytest.mark.parametrize(
    ("pin", "platform", "comment"),
    [
        (False, False, "sealed object, no terms"),
        (True, False, "sealed object, PIN"),
        (False, True, "sealed object, approved platform"),
        (True, True, "sealed object, approved platform and PIN"),
    ],
)
def test_the_policy_of_a_sealed_object(pin, platform, comment):
    approval = APPROVALS[0]
    key = Public.parse(bytes.fromhex(approval["policy_key"])) if platform else None
    reference = policy.platform_reference(approval["product"], approval["generation"]) if platform else None
    expected = next(vector["digest"] for vector in POLICIES if vector["comment"] == comment)
    assert policy.digest(composing.Conditions(key, reference, pin).sealed).hex() == expected


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_references_of_different_fields_differ(one, other):
    assert (policy.reference(*one) == policy.reference(*other)) == (one == other)


def test_a_platform_reference_is_one_product_and_one_generation():
    references = {policy.platform_reference(*of) for of in (("a", 1), ("a", 2), ("b", 1), ("ab", 1))}
    assert len(references) == 4


# ---- approvals ----


@pytest.mark.parametrize("vector", APPROVALS, ids=lambda vector: vector["comment"])
def test_approvals_that_the_tpm_accepted_are_accepted(vector):
    key, digest = Public.parse(bytes.fromhex(vector["policy_key"])), bytes.fromhex(vector["policy"])
    reference, signature = bytes.fromhex(vector["reference"]), bytes.fromhex(vector["signature"])
    assert policy.approved_digest(pcrs_of(vector)) == digest
    assert policy.platform_reference(vector["product"], vector["generation"]) == reference
    signatures.check_approval(key, digest, reference, signature)
    for at in range(len(signature)):
        forged = bytearray(signature)
        forged[at] ^= 1
        with pytest.raises(DamagedError) as caught:
            signatures.check_approval(key, digest, reference, bytes(forged))
        assert caught.value.reason == Reason.SIGNATURE_INVALID
    for wrong in ((digest, bytes(32)), (bytes(32), reference), (reference, digest)):
        with pytest.raises(DamagedError, match="not by the key"):
            signatures.check_approval(key, *wrong, signature)


def test_own_approvals_are_accepted_and_have_one_size():
    key = ec.generate_private_key(ec.SECP256R1())
    for _ in range(20):  # coordinates with leading zeros are padded
        signature = signatures.sign_approval(key, b"d" * 32, b"r" * 32)
        assert len(signature) == 72
        signatures.check_approval(signatures.policy_key_public(key.public_key()), b"d" * 32, b"r" * 32, signature)


def test_a_policy_key_is_on_p256():
    with pytest.raises(UsageError, match="P-256"):
        signatures.sign_approval(ec.generate_private_key(ec.SECP384R1()), bytes(32), bytes(32))


# ---- quotes ----


def parts(vector):
    return (
        Public.parse(bytes.fromhex(vector["attestation_key"])),
        bytes.fromhex(vector["quote"]),
        bytes.fromhex(vector["statement"]),
        pcrs_of(vector),
    )


@pytest.mark.parametrize("vector", QUOTES, ids=lambda vector: vector["comment"])
def test_a_quote_by_a_tpm_is_accepted(vector):
    quoted = quote.check_quote(*parts(vector))
    assert quoted.clock > 0
    assert quoted.reset_count > 0
    assert quoted.firmware > 0


@pytest.mark.parametrize("vector", QUOTES, ids=lambda vector: vector["comment"])
def test_no_byte_of_a_quote_may_change(vector):
    key, raw, statement, pcrs = parts(vector)
    for at in range(len(raw)):
        forged = bytearray(raw)
        forged[at] ^= 1
        with pytest.raises(DamagedError) as caught:
            quote.check_quote(key, bytes(forged), statement, pcrs)
        assert caught.value.reason == Reason.QUOTE_INVALID
    for length in range(0, len(raw), 7):
        with pytest.raises(DamagedError):
            quote.check_quote(key, raw[:length], statement, pcrs)


class Signer:
    """An attestation key in software, which signs whatever it is given."""

    def __init__(self):
        self.key = ec.generate_private_key(ec.SECP256R1())
        point = self.key.public_key().public_numbers()
        template = Public.parse(bytes.fromhex(QUOTES[0]["attestation_key"]))
        coordinates = point.x.to_bytes(32, "big") + point.y.to_bytes(32, "big")
        raw = template.raw[:-68] + b"\0\x20" + coordinates[:32] + b"\0\x20" + coordinates[32:]
        self.public = Public.parse(raw)

    def quote(self, attest):
        signed = signatures.sign_approval(self.key, attest, b"")
        return len(attest).to_bytes(2, "big") + attest + signed


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda attest: b"\0" + attest[1:], "not a quote made by a TPM"),  # external data, which a key signs for anyone
        (lambda attest: attest[:4] + b"\x80\x17" + attest[6:], "not a quote made by a TPM"),  # TPM2_Certify
        (lambda attest: attest + b"\0", "after its end there is more: 1 byte"),
        (lambda attest: attest[:-1], "ends too early"),
        (lambda attest: attest[:-1] + bytes([attest[-1] ^ 1]), "PCR values are not those"),
    ],
)
def test_what_is_signed_but_no_quote_of_this_is_refused(change, why):
    signer, (_, raw, statement, pcrs) = Signer(), parts(QUOTES[0])
    attest = raw[2 : 2 + int.from_bytes(raw[:2], "big")]
    quote.check_quote(signer.public, signer.quote(attest), statement, pcrs)
    with pytest.raises(DamagedError, match=why) as caught:
        quote.check_quote(signer.public, signer.quote(change(attest)), statement, pcrs)
    assert caught.value.reason == Reason.QUOTE_INVALID


def test_a_quote_of_another_statement_other_pcrs_or_another_key_is_refused():
    key, raw, statement, pcrs = parts(QUOTES[0])
    for wrong, why in (
        ((key, raw, b"another", pcrs), "made for another document"),
        ((key, raw, statement, pcrs[:-1]), "selects other PCRs"),
        ((key, raw, statement, [Pcr("sha256", 4, b"x" * 32), *pcrs[1:]]), "PCR values are not those"),
        ((Signer().public, raw, statement, pcrs), "not by the key"),
    ):
        with pytest.raises(DamagedError, match=why):
            quote.check_quote(*wrong)


def test_only_a_restricted_key_of_a_tpm_may_quote():
    key, raw, statement, pcrs = parts(QUOTES[0])
    area = bytearray(key.raw)
    area[4:8] = (int.from_bytes(area[4:8], "big") & ~0x10000).to_bytes(4, "big")
    with pytest.raises(DamagedError, match="lacks the attribute RESTRICTED"):
        quote.check_quote(Public.parse(bytes(area)), raw, statement, pcrs)
