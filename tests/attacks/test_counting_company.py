"""A counted license that takes a token and a dongle besides: what is missing of them costs no open."""

from contextlib import contextmanager

import pytest

from hwlicense.binders.tpm import TpmHardware
from hwlicense.core.secret import Secret
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.device.counters import Counters
from hwlicense.device.enrolling import enroll
from hwlicense.device.home import Home
from tests.forging import refused
from tests.pieces import Bench, DonglePiece, Kit, TokenPiece, TpmPiece
from tests.refusals import sent
from tests.world import NOW, TERMS

COUNTED = TERMS + "[limits]\nopens = 2\n"


class CountedPiece(TpmPiece):
    home: Home

    @contextmanager
    def hardware(self):
        with TpmHardware(self.tpm.tcti, Counters(self.home)) as hardware:
            yield hardware


@pytest.fixture
def counted(vendor, tmp_path):
    with Bench() as bench:
        tpm, token, dongle = CountedPiece(bench), TokenPiece(bench), DonglePiece(bench)
        own = Kit(bench, tmp_path / "home", [tpm, token, dongle])
        tpm.home = own.home
        for piece in own.pieces:
            piece.prepare(vendor)
        with tpm.hardware() as one, token.hardware() as two, dongle.hardware() as three:
            request = enroll([one, two, three], Selection(), "kit", NOW.date(), counted=True)
        raw = own.issue(vendor, COUNTED, request)
        own.install(raw, vendor)
        yield own, raw


def opens(kit, raw):
    licensed = sent(raw)
    binding = licensed.bindings[0]
    with kit.connect("tpm") as hardware:
        return hardware.use(binding, kit.home.held(licensed, binding)).opens


def wrong(_prompt, **_options):
    return Secret(bytearray(b"000000"))


def test_a_missing_piece_or_a_wrong_pin_costs_no_open(vendor, counted):
    """Holds: the TPM is asked last, as what it counts is not given back."""
    kit, raw = counted
    _, token, dongle = kit.pieces
    dongle.pull()
    with refused("DONGLE_ABSENT"):
        kit.open(vendor)
    dongle.plug()
    token.pull()
    with refused("TOKEN_ABSENT"):
        kit.open(vendor)
    token.plug()
    with refused("PIN_WRONG"):
        kit.open(vendor, pin=wrong)
    assert opens(kit, raw) == 0
    kit.open(vendor).close()
    kit.open(vendor).close()
    assert opens(kit, raw) == 2
    with refused("OPENS_EXHAUSTED"):
        kit.open(vendor)
