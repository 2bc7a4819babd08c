"""One person who counts as two, a vendor who replaces another's license, licenses that cannot be right."""

import time

import pytest
from msgspec.structs import replace

from hwlicense.cli import output
from hwlicense.core.documents import License
from hwlicense.core.envelope import seal, unverified
from hwlicense.core.errors import HwlicenseError, Reason
from hwlicense.device import selecting
from hwlicense.device.reporting import status
from hwlicense.vendor import dongles
from hwlicense.vendor.folder import DongleRecord
from hwlicense_simulators import Dongle
from tests.pieces import Bench, DonglePiece, Kit, Piece, TokenPiece
from tests.world import NOW, TERMS

ANY = TERMS + '[require]\nbindings = "any"\n'


@pytest.fixture
def bench():
    with Bench() as made:
        yield made


def reason_of(attempt):
    with pytest.raises(HwlicenseError) as caught:
        attempt()
    assert caught.value.hint
    return caught.value.reason


class SecondKey(TokenPiece):
    """Another key on a token that is a piece already."""

    def __init__(self, bench, first):
        self.reader, self.token, self.new_key, self.key = bench.reader, first.token, "p256", b""


def test_two_keys_of_one_token_are_one_piece(bench, vendor, tmp_path):
    first = TokenPiece(bench)
    device = Kit(bench, tmp_path / "home", [first, SecondKey(bench, first)])
    assert reason_of(lambda: device.issue(vendor, ANY)) == Reason.USAGE


def test_two_slots_of_one_dongle_are_one_piece(bench, own_vendor, tmp_path):
    first = DonglePiece(bench)
    second = DonglePiece.__new__(DonglePiece)
    second.__dict__ |= first.__dict__
    second.selector = lambda: f"1050:0407:{first.dongle.serial},slot=1"  # type: ignore[method-assign]
    second.prepare = lambda _vendor: None  # type: ignore[method-assign]
    with_two = Kit(bench, tmp_path / "home", [first, second])
    from hwlicense.binders.usb import Selector, find_one  # noqa: PLC0415

    with find_one(Selector.parse(second.selector())) as device:
        dongles.program(own_vendor.place, own_vendor.keys, device, 1, touch=False, mode="less-than-64", overwrite=False)
    assert reason_of(lambda: with_two.issue(own_vendor, ANY)) == Reason.USAGE


def test_another_vendors_license_of_the_same_name_is_not_replaced(bench, vendor, own_vendor, tmp_path):
    device = Kit(bench, tmp_path / "home", [DonglePiece(bench)])
    licensed = unverified(device.license(vendor, TERMS), License)[0]
    copied = replace(licensed, grant=replace(licensed.grant, vendor=own_vendor.public.fingerprint))
    forged = seal(copied, own_vendor.keys.signers)
    assert reason_of(lambda: device.install(forged, own_vendor)) == Reason.WRONG_VENDOR
    device.open(vendor).close()


@pytest.mark.parametrize(
    "change",
    [
        lambda d: {"need": 2, "wraps": [replace(d.wraps[0], members=[0, 1])]},
        lambda d: {"wraps": [replace(d.wraps[0], members=[1])]},
        lambda d: {"wraps": [replace(d.wraps[0], members=[0, 0])], "need": 2},
        lambda d: {"bindings": [replace(d.bindings[0], answers=b"odd")]},
    ],
    ids=["more than there are", "one that there is not", "one twice", "half an answer"],
)
def test_licenses_that_contradict_themselves_are_said_to(bench, vendor, tmp_path, change):
    device = Kit(bench, tmp_path / "home", [DonglePiece(bench)])
    licensed = unverified(device.license(vendor, TERMS), License)[0]
    forged = seal(replace(licensed, **change(licensed)), vendor.keys.signers)
    assert reason_of(lambda: device.install(forged, vendor)) == Reason.LICENSE_DAMAGED
    (device.home.path / "licenses" / licensed.grant.license / "license.hwlic").write_bytes(forged)
    assert reason_of(lambda: device.open(vendor)) == Reason.LICENSE_DAMAGED
    (entry,), _ = status(device.home, NOW.date())
    assert entry["state"] == "damaged: LICENSE_DAMAGED"


def test_the_largest_record_of_answers_can_be_read_again(own_vendor):
    record = DongleRecord(
        schema=1,
        dongle="00" * 16,
        product="1050:0407",
        serial="1",
        slot=2,
        touch=False,
        mode=None,
        sealed=bytes(20 * dongles.POOL_LIMIT + 2000),
        seed=bytes(32),
        answers=dongles.POOL_LIMIT,
        used=0,
    )
    own_vendor.place.keep_dongle(record)
    assert own_vendor.place.dongles() == [record]


def test_no_answers_are_spent_on_a_license_that_would_be_too_large(bench, own_vendor, tmp_path):
    pieces: list[Piece] = [DonglePiece(bench, enrolled=40) for _ in range(5)]
    device = Kit(bench, tmp_path / "home", pieces)
    terms = TERMS + '[presence]\ninterval = "1s"\nanswers = 16384\n'
    assert reason_of(lambda: device.issue(own_vendor, terms)) == Reason.TERM_INVALID
    assert [record.used for record in own_vendor.place.dongles()] == [0] * 5


def test_terminals_are_not_rewritten_through_json(capsys):
    output.emit({"label": "\x9b31m\x7f"})
    assert "\\u009b31m\\u007f" in capsys.readouterr().out


def test_an_empty_secret_is_no_pin():
    from hwlicense.core.secret import Secret  # noqa: PLC0415

    source = selecting.pin(lambda _prompt: Secret(bytearray()))
    assert source
    assert reason_of(lambda: source("PIN")) == Reason.PIN_NEEDED


def test_a_busy_dongle_of_somebody_else_delays_no_proof(bench, vendor, tmp_path):
    mine = DonglePiece(bench)
    device = Kit(bench, tmp_path / "home", [mine])
    device.license(vendor, TERMS + '[presence]\ninterval = "1s"\nanswers = 40\n')
    with Dongle(bus=bench.bus, serial=1) as other, device.open(vendor) as model:
        other.occupy()
        for _ in range(60):
            assert model.standing()
            time.sleep(0.05)
