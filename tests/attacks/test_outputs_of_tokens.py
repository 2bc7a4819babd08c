"""Recordings under licenses that are bound to tokens, dongles and combinations: who certifies, and who cannot."""

import pytest

from hwlicense.core.errors import HardwareError, HwlicenseError
from hwlicense.device.log_files import SUFFIX
from hwlicense.vendor import logs
from tests.pieces import Bench, DonglePiece, Kit, TokenPiece, TpmPiece
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
