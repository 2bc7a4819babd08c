"""Requests by who has no token, or another: only attested and recorded keys are believed, and only keys of some use."""

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from hwlicense.core.documents import Request, TokenEvidence
from hwlicense.core.envelope import assemble, unverified
from hwlicense.core.errors import DamagedError, HardwareError, RefusedError
from hwlicense.core.schema import SCHEMA
from hwlicense.core.secret import Secret
from hwlicense.core.terms import parse_terms
from hwlicense.core.token import public_key, unwrap
from hwlicense.core.uri import TokenUri
from hwlicense.vendor import evidence, issuing
from tests.forging import flipped, now, replace, signed_anew
from tests.pieces import PIN, Bench, Kit, TokenPiece
from tests.refusals import Authority, lay, nobody, refusal, sent
from tests.world import MEMBERS, NOW, TERMS, everything


def der(key):
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


class Pretender:
    """A key in software that says it is a token."""

    def __init__(self):
        self.private = ec.generate_private_key(ec.SECP256R1())
        self.public = self.private.public_key()

    def request(self, *certificates: bytes, **changes) -> bytes:
        found = TokenEvidence("pkcs11:token=a%20token", der(self.public), "ecdh", pin=True, certificates=[])
        found = replace(found, certificates=list(certificates), **changes)
        return assemble(Request(SCHEMA, NOW.date(), "a device", [found]), [])


def examine(raw, roots=(), tokens=()):
    return evidence.examine(raw, evidence.Trusted(token_roots=[a.root for a in roots], tokens=tokens), now())


def issue(vendor, parts):
    return issuing.issue(vendor.public, vendor.keys, parts, [vendor.manifest], parse_terms(TERMS), [], today=NOW.date())


@pytest.fixture(scope="module")
def maker():
    return Authority("maker")


# ---- attestations -------------------------------------------------------------------------------------------


def chain(maker, public):
    """As YubiKey PIV has it: the maker's root, a CA of the device, and the key's certificate."""
    device = Authority("device", maker, path_length=0)
    return device.certify(public), device.certificate


@pytest.mark.parametrize("mixed", [False, True], ids=["in order", "among others"])
def test_what_an_honest_attestation_is(maker, mixed):
    """The control: it is believed, whatever lies beside it."""
    token = Pretender()
    certificates = list(chain(maker, token.public))
    if mixed:
        certificates = [Authority("other").certificate, *reversed(certificates), maker.certificate]
    (part,) = examine(token.request(*certificates), [Authority("first"), maker]).parts
    assert part.endorsement.basis == "certificate"
    assert part.endorsement.root == "CN=maker"
    (part,) = examine(token.request(maker.certify(token.public)), [maker]).parts
    assert part.endorsement.root == "CN=maker"


def flipped_signature(maker, public):
    good = maker.certify(public)
    return [flipped(good, len(good) - 3)]


def under_an_attested_key(maker, public):
    """The attested key of a real token signs a certificate for a key in software."""
    attested = Pretender()
    between = Authority("token key", key=attested.private)
    return [between.certify(public), maker.certify(attested.public, "token key")]


def by_a_ca_of_the_devices_ca(maker, public):
    """The device's CA may make certificates of keys, and no CAs."""
    device = Authority("device", maker, path_length=0)
    lower = Authority("lower", device)
    return [lower.certify(public), lower.certificate, device.certificate]


DISHONEST = {
    "none": lambda _maker, _public: [],
    "of another maker": lambda _maker, public: [Authority("other").certify(public)],
    "of another maker with the same name": lambda _maker, public: [Authority("maker").certify(public)],
    "with the other maker's root beside it": lambda _maker, public: [
        (other := Authority("maker")).certify(public),
        other.certificate,
    ],
    "for another key": lambda maker, _public: [maker.certify(Pretender().public)],
    "by the key itself": lambda _maker, public: [Authority("token key").certify(public)],
    "expired": lambda maker, public: [maker.certify(public, days=(-20, -1))],
    "not yet valid": lambda maker, public: [maker.certify(public, days=(1, 20))],
    "a CA's": lambda maker, public: [maker.certify(public, ca=True)],
    "a CA's that may sign": lambda maker, public: [maker.certify(public, ca=True, signs=True)],
    "with another signature": flipped_signature,
    "under an attested key": under_an_attested_key,
    "under a CA that may sign no certificates": lambda maker, public: [
        (lower := Authority("lower", maker, signs=False)).certify(public),
        lower.certificate,
    ],
    "under a CA that is called none": lambda maker, public: [
        (lower := Authority("lower", maker, ca=False)).certify(public),
        lower.certificate,
    ],
    "under a CA that does not say so": lambda maker, public: [
        (lower := Authority("lower", maker, ca=None)).certify(public),
        lower.certificate,
    ],
    "under a CA that has expired": lambda maker, public: [
        (lower := Authority("lower", maker, days=(-20, -1))).certify(public),
        lower.certificate,
    ],
    "under a CA below the last": by_a_ca_of_the_devices_ca,
    "with a CA missing": lambda maker, public: list(chain(maker, public))[:1],
    "cut": lambda maker, public: [maker.certify(public)[:-1]],
    "lengthened": lambda maker, public: [maker.certify(public) + b"\0"],
}


@pytest.mark.parametrize("kind", DISHONEST)
def test_a_key_that_no_token_is_known_to_hold(maker, kind):
    token = Pretender()
    with refusal(RefusedError, "TOKEN_UNTRUSTED"):
        examine(token.request(*DISHONEST[kind](maker, token.public)), [maker])


def test_an_expired_root_attests_nothing():
    old, token = Authority("old", days=(-20, -1)), Pretender()
    with refusal(RefusedError, "TOKEN_UNTRUSTED"):
        examine(token.request(old.certify(token.public)), [old])


def test_without_a_root_no_attestation_counts(maker):
    token = Pretender()
    with refusal(RefusedError, "TOKEN_UNTRUSTED"):
        examine(token.request(maker.certify(token.public), maker.certificate))


def test_no_byte_of_an_attestation_may_differ(maker):
    """A flipped bit where the key stands makes it one for another key; elsewhere the signature fails.

    Outside of what is signed, some bits say nothing: those that a BIT STRING leaves unused.
    """
    token = Pretender()
    good = maker.certify(token.public)
    signed = x509.load_der_x509_certificate(good).tbs_certificate_bytes
    start = good.index(signed)
    for place in range(start, start + len(signed)):
        with refusal(RefusedError, "TOKEN_UNTRUSTED"):
            examine(token.request(flipped(good, place, 1 << place % 8)), [maker])


@pytest.mark.parametrize("given", [bytes(32), b"", bytes(31), b"\xff" * 32])
def test_a_recorded_fingerprint_is_of_this_key_and_whole(given):
    token = Pretender()
    tokens = {given, evidence.fingerprint(der(token.public))[:-1], evidence.fingerprint(der(Pretender().public))}
    with refusal(RefusedError, "TOKEN_UNTRUSTED"):
        examine(token.request(), tokens=tokens)
    (part,) = examine(token.request(), tokens={evidence.fingerprint(der(token.public))}).parts
    assert part.endorsement.basis == "recorded"


def test_a_trusted_key_beside_a_key_in_software(maker):
    """One good token in the request does not carry another one along."""
    good, bad = Pretender(), Pretender()
    honest = unverified(good.request(maker.certify(good.public)), Request)[0]
    smuggled = replace(honest.hardware[0], key=der(bad.public))
    with refusal(RefusedError, "TOKEN_UNTRUSTED"):
        examine(assemble(replace(honest, hardware=[*honest.hardware, smuggled]), []), [maker])
    with refusal(DamagedError, "EVIDENCE_INVALID"):
        examine(assemble(replace(honest, hardware=honest.hardware * 2), []), [maker])


def test_a_copied_request_gives_a_license_that_opens_on_the_genuine_token_alone(vendor, maker):
    """Who sends another's attested request gets a license for the other's token."""
    token = Pretender()
    raw = token.request(maker.certify(token.public), uri="pkcs11:token=mine;serial=1")
    (binding,) = issue(vendor, examine(raw, [maker]).parts).license.bindings
    ephemeral = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), binding.encapsulated)
    right = Secret(bytearray(token.private.exchange(ec.ECDH(), ephemeral)))
    unwrap(right, binding.key, binding.encapsulated, binding.check)
    wrong = Secret(bytearray(Pretender().private.exchange(ec.ECDH(), ephemeral)))
    with refusal(HardwareError, "TOKEN_FORGED"):
        unwrap(wrong, binding.key, binding.encapsulated, binding.check)


# ---- keys ---------------------------------------------------------------------------------------------------


def compressed():
    """A P-256 key with another encoding of its point: a second spelling of one key."""
    point = Pretender().public.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    return bytes.fromhex("3039301306072a8648ce3d020106082a8648ce3d030107032200") + point


def last_bit_flipped(raw):
    return raw[:-1] + bytes([raw[-1] ^ 1])


WEAK = {
    "P-384": lambda: der(ec.generate_private_key(ec.SECP384R1()).public_key()),
    "secp256k1": lambda: der(ec.generate_private_key(ec.SECP256K1()).public_key()),
    "RSA-1024": lambda: der(rsa.generate_private_key(65537, 1024).public_key()),  # noqa: S505
    "RSA-1536": lambda: der(rsa.generate_private_key(65537, 1536).public_key()),  # noqa: S505
    "Ed25519": lambda: der(ed25519.Ed25519PrivateKey.generate().public_key()),
    "X25519": lambda: der(x25519.X25519PrivateKey.generate().public_key()),
    "DSA": lambda: der(dsa.generate_private_key(1024).public_key()),  # noqa: S505
    "compressed point": compressed,
    "nothing": lambda: b"",
    "no key": lambda: bytes(91),
    "a byte more": lambda: der(Pretender().public) + b"\0",
    "a point that is not on the curve": lambda: last_bit_flipped(der(Pretender().public)),
    "the point at infinity": lambda: der(Pretender().public)[:-65] + bytes(65),
}


@pytest.mark.parametrize("mechanism", ["ecdh", "rsa-oaep-sha256"])
@pytest.mark.parametrize("kind", WEAK)
def test_a_key_of_no_use_is_refused_even_if_it_was_recorded(kind, mechanism):
    key = WEAK[kind]()
    with refusal(DamagedError, "EVIDENCE_INVALID"):
        examine(Pretender().request(key=key, mechanism=mechanism), tokens={evidence.fingerprint(key)})


def numbers(exponent, modulus=None):
    """An RSA key with these numbers, by hand: cryptography would not make it."""
    good = rsa.generate_private_key(65537, 2048).public_key()
    known = good.public_numbers().n if modulus is None else modulus
    parts = [number.to_bytes(number.bit_length() // 8 + 1, "big") for number in (known, exponent)]
    content = b"".join(b"\x02" + length(part) + part for part in parts)
    inner = b"\x00" + b"\x30" + length(content) + content
    algorithm = bytes.fromhex("300d06092a864886f70d0101010500")
    whole = algorithm + b"\x03" + length(inner) + inner
    return b"\x30" + length(whole) + whole


def length(content):
    size = len(content)
    if size < 0x80:
        return bytes([size])
    raw = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([0x80 | len(raw)]) + raw


@pytest.mark.parametrize("exponent", [0, 1, 2, 65536, (1 << 2048) + 1, (1 << 2300) + 1])
def test_an_rsa_key_with_an_exponent_of_no_use_is_refused(exponent):
    key = numbers(exponent)
    with refusal(DamagedError, "EVIDENCE_INVALID"):
        examine(Pretender().request(key=key, mechanism="rsa-oaep-sha256"), tokens={evidence.fingerprint(key)})


def test_an_rsa_key_that_cannot_encrypt_gives_no_license(vendor):
    """An even modulus passes for a number; whoever issues is told in our words."""
    key = numbers(65537, 1 << 2047)
    with refusal(DamagedError, "EVIDENCE_INVALID"):
        raw = Pretender().request(key=key, mechanism="rsa-oaep-sha256")
        issue(vendor, examine(raw, tokens={evidence.fingerprint(key)}).parts)


def test_an_odd_but_sound_exponent_is_let_through(vendor):
    """The control: 3 and 17 are fit for OAEP."""
    for exponent in (3, 17):
        key = numbers(exponent)
        public_key(key)
        raw = Pretender().request(key=key, mechanism="rsa-oaep-sha256")
        issue(vendor, examine(raw, tokens={evidence.fingerprint(key)}).parts)


@pytest.mark.parametrize(
    ("rsa_key", "mechanism"), [(True, "ecdh"), (False, "rsa-oaep-sha256"), (False, "rsa-oaep-sha1")]
)
def test_a_mechanism_that_does_not_go_with_the_key(vendor, rsa_key, mechanism):
    key = der(rsa.generate_private_key(65537, 2048).public_key()) if rsa_key else der(Pretender().public)
    with refusal(DamagedError, "EVIDENCE_INVALID"):
        raw = Pretender().request(key=key, mechanism=mechanism)
        issue(vendor, examine(raw, tokens={evidence.fingerprint(key)}).parts)


# ---- licenses whose token part was edited -------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench():
    with Bench() as own:
        yield own


@pytest.fixture(scope="module")
def licensed(bench, vendor, tmp_path_factory):
    kit = Kit(bench, tmp_path_factory.mktemp("licensed"), [TokenPiece(bench)])
    return kit, kit.license(vendor, TERMS)


def point():
    return Pretender().public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


CONTRADICTIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "RSA for ECDH": lambda _b: {"key": der(rsa.generate_private_key(65537, 2048).public_key())},
    "OAEP for P-256": lambda _b: {"mechanism": "rsa-oaep-sha256"},
    "P-384": lambda _b: {"key": WEAK["P-384"]()},
    "RSA-1024": lambda _b: {"key": WEAK["RSA-1024"](), "mechanism": "rsa-oaep-sha256", "encapsulated": bytes(128)},
    "a short point": lambda b: {"encapsulated": b.encapsulated[:-1]},
    "a long point": lambda b: {"encapsulated": b.encapsulated + b"\0"},
    "a compressed point": lambda b: {"encapsulated": b"\2" + b.encapsulated[1:33]},
    "no point": lambda _b: {"encapsulated": b""},
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_token_part_that_contradicts_itself_is_not_shown_to_the_module(vendor, bench, licensed, kind):
    kit, raw = licensed
    good = sent(raw)
    forged = replace(good, bindings=[replace(good.bindings[0], **CONTRADICTIONS[kind](good.bindings[0]))])
    bench.reader.forget()
    with refusal(DamagedError, "LICENSE_DAMAGED"):
        kit.install(signed_anew(forged, vendor), vendor)
    lay(kit, forged, vendor)
    with refusal(DamagedError, "LICENSE_DAMAGED"):
        kit.open(vendor, pin=nobody)
    assert bench.reader.calls == []


@pytest.mark.parametrize(
    "change",
    [
        lambda _b: {"encapsulated": point()},
        lambda b: {"encapsulated": flipped(b.encapsulated, 64)},
        lambda _b: {"encapsulated": bytes(65)},
        lambda _b: {"encapsulated": b"\4" + bytes(64)},
        lambda _b: {"check": bytes(16)},
        lambda b: {"check": flipped(b.check, 15, 0x80)},
    ],
    ids=["another point", "off the curve", "zeros", "origin", "no check", "another check"],
)
def test_a_token_part_that_was_edited_opens_nothing(vendor, bench, licensed, change):
    """By who has the vendor's document keys. A point off the curve gives nothing of the token's key away."""
    kit, raw = licensed
    good = sent(raw)
    lay(kit, replace(good, bindings=[replace(good.bindings[0], **change(good.bindings[0]))]), vendor)
    with refusal(HardwareError, "TOKEN_FORGED", "TOKEN_FAILED", "TOKEN_UNSUPPORTED"):
        kit.open(vendor)
    assert bench.reader.open_sessions == 0
    lay(kit, good, vendor)
    with kit.open(vendor) as model:
        assert everything(model) == MEMBERS


def test_a_login_that_the_license_denies_is_needed_all_the_same(vendor, bench, licensed):
    """`pin` in a license sorts; it is the token that asks."""
    kit, raw = licensed
    good = sent(raw)
    lay(kit, replace(good, bindings=[replace(good.bindings[0], pin=False)]), vendor)
    with refusal(RefusedError, "PIN_NEEDED"):
        kit.open(vendor, pin=None)
    kit.open(vendor).close()
    lay(kit, good, vendor)
    assert bench.reader.open_sessions == 0


# ---- the whole way ------------------------------------------------------------------------------------------


def test_certificates_on_a_token_are_picked_up_and_attest_its_key(vendor, bench, maker, tmp_path):
    """Written by OpenSC's tool, as the maker of a token would at the factory."""
    piece = TokenPiece(bench, label="attested")
    kit = Kit(bench, tmp_path / "home", [piece])
    first = unverified(kit.request(vendor), Request)[0].hardware[0]
    with refusal(RefusedError, "TOKEN_UNTRUSTED"):
        examine(assemble(Request(SCHEMA, NOW.date(), "kit", [first]), []), [maker])
    identifier = TokenUri.parse_hint(first.uri).id
    for place, certificate in enumerate(chain(maker, public_key(first.key))):
        (tmp_path / "certificate").write_bytes(certificate)
        tool = ["pkcs11-tool", "--module", bench.reader.module, "--token-label", piece.token.label, "--login"]
        tool += ["--pin", PIN, "--write-object", tmp_path / "certificate", "--type", "cert"]
        tool += ["--id", identifier.hex() if place == 0 else "f9"]
        subprocess.run(tool, check=True, capture_output=True)
    raw = kit.request(vendor)
    assert len(unverified(raw, Request)[0].hardware[0].certificates) == 2
    with refusal(RefusedError, "TOKEN_UNTRUSTED"):
        examine(raw, [Authority("maker")])
    issued = issue(vendor, examine(raw, [maker]).parts)
    (binding,) = issued.license.bindings
    assert (binding.endorsement.basis, binding.endorsement.root) == ("certificate", "CN=maker")
    kit.install(issued.raw, vendor)
    with kit.open(vendor) as model:
        assert everything(model) == MEMBERS
