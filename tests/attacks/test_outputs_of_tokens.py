"""Recordings under licenses that are bound to tokens, dongles and combinations: who certifies, and who cannot."""

from contextlib import contextmanager

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from hwlicense.binders.pkcs11 import TokenHardware
from hwlicense.core.chain import (
    NOTHING,
    Chain,
    Closing,
    End,
    Output,
    Start,
    TokenCertificate,
    certified_bytes,
    parse,
)
from hwlicense.core.documents import License, TokenBinding
from hwlicense.core.envelope import pre_authentication_encoding, seal, unverified
from hwlicense.core.errors import HardwareError, HwlicenseError
from hwlicense.core.schema import encode
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.uri import TokenUri
from hwlicense.device.log_files import SUFFIX
from hwlicense.device.recording import now
from hwlicense.vendor import logs
from tests.pieces import Bench, DonglePiece, Kit, TokenPiece, TpmPiece, pin
from tests.unit.test_pkcs11_binder import make_key
from tests.world import TERMS, write

PRESENT = TERMS + '[presence]\ninterval = "1h"\ngrace = "0s"\n'


@pytest.fixture
def bench():
    with Bench() as bench:
        yield bench


class Scene:
    def __init__(self, bench, vendor, folder, *pieces, terms=TERMS):
        self.kit, self.vendor, self.folder = Kit(bench, folder / "home", list(pieces)), vendor, folder
        self.license = write(folder / "license.hwlic", self.kit.license(vendor, terms))
        self.asked: list[str] = []

    def pin(self, prompt):
        self.asked.append(str(prompt))
        return "123456"

    def record(self):
        with self.kit.open(self.vendor, pin=self.pin) as model, model.outputs(self.folder / "log") as outputs:
            outputs.append({"alert": 1})

    def check(self):
        known = logs.licenses([self.license], self.vendor.public)
        return logs.check(sorted((self.folder / "log").glob(f"*{SUFFIX}")), known)


@pytest.mark.parametrize("terms", [TERMS, PRESENT], ids=["bound", "present"])
def test_a_token_certifies_and_asks_for_its_pin_once_a_recording_at_the_most(bench, own_vendor, tmp_path, terms):
    scene = Scene(bench, own_vendor, tmp_path, TokenPiece(bench), terms=terms)
    scene.record()
    checked = scene.check()
    assert checked.faults == []
    assert [(each.hardware, each.ended) for each in checked.recordings] == [("token", True)]
    assert len(scene.asked) == (2 if terms == TERMS else 1)


def test_an_rsa_key_certifies_nothing(bench, own_vendor, tmp_path):
    scene = Scene(bench, own_vendor, tmp_path, TokenPiece(bench, "rsa2048"))
    with pytest.raises(HardwareError) as caught:
        scene.record()
    assert caught.value.reason == "CERTIFYING_UNSUPPORTED"
    assert "RSA" in caught.value.what
    assert caught.value.hint


def test_a_key_that_may_not_sign_certifies_nothing(bench, own_vendor, tmp_path):
    piece = TokenPiece(bench)
    make_key(bench.reader, token=piece.token)  # as releases made it before keys were to sign
    piece.key = b"there is one"
    scene = Scene(bench, own_vendor, tmp_path, piece)
    with pytest.raises(HardwareError) as caught:
        scene.record()
    assert caught.value.reason == "CERTIFYING_UNSUPPORTED"
    assert "CKA_SIGN" in caught.value.what


def test_a_dongle_certifies_nothing_and_the_model_works_all_the_same(bench, own_vendor, tmp_path):
    scene = Scene(bench, own_vendor, tmp_path, DonglePiece(bench))
    with scene.kit.open(own_vendor) as model:
        with pytest.raises(HardwareError) as caught:
            model.outputs(tmp_path / "log")
        assert caught.value.reason == "CERTIFYING_UNSUPPORTED"
        assert "dongles" in caught.value.what
        assert model.read("labels/names.txt")
    assert not (tmp_path / "log").exists() or list((tmp_path / "log").iterdir()) == []


def test_of_several_the_tpm_certifies_and_a_token_where_it_is_away(bench, own_vendor, tmp_path):
    tpm, token = TpmPiece(bench), TokenPiece(bench)
    terms = TERMS + "[require]\nbindings = 'any'\n"
    scene = Scene(bench, own_vendor, tmp_path, DonglePiece(bench), token, tpm, terms=terms)
    scene.record()
    tpm.pull()
    scene.record()
    tpm.plug()
    checked = scene.check()
    assert checked.faults == []
    assert [each.hardware for each in checked.recordings] == ["TPM", "token"]


def test_a_token_that_is_pulled_leaves_an_end_that_says_so(bench, own_vendor, tmp_path):
    token = TokenPiece(bench)
    scene = Scene(bench, own_vendor, tmp_path, token)
    with scene.kit.open(own_vendor) as model:
        outputs = model.outputs(tmp_path / "log")
        outputs.append(1)
        token.pull()
        with pytest.raises(HwlicenseError) as caught:
            outputs.close()
        token.plug()
    (fault,) = scene.check().faults
    assert fault.severity == "cut"
    assert str(caught.value.reason) in fault.what


# ---- certificates that are not of what they stand under


def start_of(path) -> Start:
    start = parse(path.read_bytes().split(b"\n")[0])
    assert isinstance(start, Start)
    return start


def end_of(path) -> End:
    end = parse(path.read_bytes().split(b"\n")[-2])
    assert isinstance(end, End)
    return end


def made(path, certify, certify_end=None, **changes):
    """A recording in the place of one that is there: all that needs no hardware is right."""
    start = start_of(path)
    chain = Chain(start.previous)
    said = msgspec.structs.replace(start.statement, key=chain.key, **changes)
    chain.begin(said, certify(said), *now())
    chain.add(Output, *now(), json=b"1")
    chain.end((certify_end or certify)(chain.closing()), None, *now())
    path.write_bytes(b"".join(link.line + b"\n" for link in chain.take()))


@contextmanager
def certifying(scene, piece, *, key=b""):
    """What the piece's token signs, for who has it and its PIN."""
    (bound,) = unverified(scene.license.read_bytes(), License)[0].bindings
    assert isinstance(bound, TokenBinding)
    binding = msgspec.structs.replace(bound, uri=piece.token.uri.partition("?")[0], key=key or bound.key)
    with TokenHardware([str(piece.reader.module)], TokenUri.parse(piece.token.uri)) as hardware:
        yield lambda said: hardware.certify(binding, Selection(), certified_bytes(said), pin)


def recorded(scene, number=1):
    for _ in range(number):
        scene.record()
    return max((scene.folder / "log").glob(f"*{SUFFIX}"))


def shows(scene, words, count=None):
    found = [fault for fault in scene.check().faults if words in fault.what]
    assert found, scene.check().faults
    assert {fault.severity for fault in found} == {"forged"}
    assert count in (None, len(found))


NOT_OVER_THIS = "The token's signature is not over what the recording says."
NOT_BOUND = "It is certified by a token that the license is not bound to."


@pytest.fixture
def piece(bench):
    return TokenPiece(bench)


@pytest.fixture
def scene(bench, own_vendor, tmp_path, piece):
    return Scene(bench, own_vendor, tmp_path, piece)


def test_whoever_has_token_and_pin_may_have_a_recording_certified(scene, piece):
    """The control of those below: what is made here verifies, once the hardware certifies it."""
    path = recorded(scene)
    with certifying(scene, piece) as certify:
        made(path, certify)
    assert scene.check().faults == []


def test_another_token_certifies_nothing(bench, scene):
    path, other = recorded(scene), TokenPiece(bench, label="another")
    with other.hardware():
        pass
    with certifying(scene, other, key=other.key) as certify:
        made(path, certify)
        shows(scene, NOT_BOUND, 2)
        key = start_of(path).certificate.key
        mine = unverified(scene.license.read_bytes(), License)[0].bindings[0].key
        assert mine != key
        made(path, lambda said: msgspec.structs.replace(certify(said), key=mine))  # under the key of the right one
        shows(scene, NOT_OVER_THIS, 2)


def test_a_certificate_under_another_license_of_the_same_token_is_none(scene, bench, own_vendor, tmp_path, piece):
    path = recorded(scene)
    other = Scene(bench, own_vendor, tmp_path / "other", piece)
    theirs = recorded(other)
    assert scene.check().faults == other.check().faults == []
    taken = start_of(theirs).certificate
    assert isinstance(taken, TokenCertificate)
    assert taken.key == start_of(path).certificate.key
    made(path, lambda _said: taken)
    shows(scene, NOT_OVER_THIS, 2)
    lines = theirs.read_bytes().split(b"\n")
    said = msgspec.structs.replace(start_of(theirs).statement, license=start_of(path).statement.license)
    lines[0] = encode(msgspec.structs.replace(start_of(theirs), statement=said))
    path.write_bytes(b"\n".join(lines))
    shows(scene, NOT_OVER_THIS)


def test_certificates_of_earlier_recordings_serve_once(scene):
    first = recorded(scene)
    start, end = start_of(first).certificate, end_of(first).certificate
    second = recorded(scene)
    assert scene.check().faults == []
    whole = second.read_bytes()
    made(second, lambda _said: start, lambda _closing: end)
    shows(scene, NOT_OVER_THIS, 2)
    second.write_bytes(whole)
    made(second, lambda _said: start_of(second).certificate, lambda _closing: end_of(second).certificate)
    shows(scene, NOT_OVER_THIS, 2)


def test_a_certificate_of_another_kind_of_statement_is_none(scene, piece):
    """The end's for the start, the start's for the end, and what the key signed as any other document."""
    path = recorded(scene)
    whole = path.read_bytes()
    with certifying(scene, piece) as certify:
        said, closing = start_of(path).statement, Closing(1, NOTHING, NOTHING, 2)
        made(path, lambda _said: certify(closing), lambda _closing: certify(said))
        shows(scene, NOT_OVER_THIS, 2)
    path.write_bytes(whole)
    (bound,) = unverified(scene.license.read_bytes(), License)[0].bindings
    assert isinstance(bound, TokenBinding)
    with TokenHardware([str(piece.reader.module)], TokenUri.parse(piece.token.uri)) as hardware:
        for kind in ("", "application/vnd.hwlicense.closing+json", "application/vnd.hwlicense.request+json"):

            def certify_otherwise(said, kind=kind):
                message = pre_authentication_encoding(kind, encode(said)) if kind else encode(said)
                return hardware.certify(bound, Selection(), message, pin)

            with certifying(scene, piece) as certify:
                made(path, certify_otherwise, certify)
            shows(scene, NOT_OVER_THIS, 1)


def test_a_key_of_the_token_that_is_for_something_else_certifies_nothing(scene, piece):
    """Another P-256 key of the same token, and an RSA key that unwraps: neither is the one in the license."""
    path = recorded(scene)
    make_key(piece.reader, capabilities="MechanismFlag.DERIVE | MechanismFlag.SIGN", token=piece.token)
    uri = piece.token.uri.replace("?", ";object=made?", 1)
    with TokenHardware([str(piece.reader.module)], TokenUri.parse(uri)) as hardware:
        hardware.enroll(pin, None, "made")
        other = hardware.describe(Selection()).key
    with certifying(scene, piece, key=other) as certify:
        made(path, certify)
    shows(scene, NOT_BOUND, 2)


def test_an_rsa_key_of_the_license_certifies_nothing_even_by_a_signature_of_its_own(bench, own_vendor, tmp_path):
    """The license is bound to a key that unwraps, whose holder signs with it by other means."""
    scene = Scene(bench, own_vendor, tmp_path, TokenPiece(bench))
    path = recorded(scene)
    key = rsa.generate_private_key(65537, 2048)
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    document = unverified(scene.license.read_bytes(), License)[0]
    bound = msgspec.structs.replace(document.bindings[0], key=public, mechanism="rsa-oaep-sha1")
    unwrapping = msgspec.structs.replace(document, bindings=[bound])
    scene.license.write_bytes(seal(unwrapping, own_vendor.keys.signers))
    for signed in (
        lambda message: key.sign(message, padding.PKCS1v15(), hashes.SHA256())[:80],
        lambda _message: b"",
    ):
        made(path, lambda said, signed=signed: TokenCertificate(public, signed(certified_bytes(said))))
        shows(scene, "The hardware's certificate is wrong", 2)
