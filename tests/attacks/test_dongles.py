"""Licenses for USB dongles under attack: dongles that fail, others that look alike, answers recorded and edited."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from hwlicense.binders.usb import UsbHardware, connection, find
from hwlicense.binders.usb import dongle as speaking
from hwlicense.core import dongle as challenges
from hwlicense.core.errors import AbsentError, DamagedError, HardwareError
from hwlicense.core.secret import Secret
from hwlicense.core.tpm.pcrs import Selection
from hwlicense_simulators import Dongle
from tests.forging import edited, flipped, replace, signed_anew
from tests.pieces import Bench, DonglePiece, Kit
from tests.refusals import lay, refusal, sent, until
from tests.world import MEMBERS, TERMS, everything

WATCHED = TERMS + '[presence]\ninterval = "1s"\nanswers = 40\n'


@pytest.fixture
def bench():
    with Bench() as own:
        yield own


@pytest.fixture
def kit(bench, tmp_path):
    return Kit(bench, tmp_path / "home", [DonglePiece(bench)])


@pytest.fixture
def licensed(kit, vendor):
    """A device whose license opens, its dongle, and the license as it was sent."""
    raw = kit.license(vendor, TERMS)
    yield kit, kit.pieces[0].dongle, raw
    given_back(kit.bench)


@pytest.fixture
def hurried(monkeypatch):
    """Nobody waits long for a dongle."""
    monkeypatch.setattr(speaking, "DEADLINE", 0.1)
    monkeypatch.setattr(speaking, "PATIENCE", 0.1)
    monkeypatch.setattr(connection, "TRANSFER_TIMEOUT", 50)
    monkeypatch.setattr(connection, "_NOTICE", 0.05)


def given_back(bench):
    """The keyboard driver has each dongle again, and nobody has claimed one."""
    for plugged in bench.bus.all():
        assert plugged.driver
        assert plugged.claim is None


# ---- dongles that fail --------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "bad CRC": (lambda d: d.bad_crc(), "DONGLE_FAILED"),
    **{f"report {n} missing": (partial(Dongle.miss_sequence, number=n), "DONGLE_FAILED") for n in range(4)},
    **{f"report {n} twice": (partial(Dongle.repeat_sequence, number=n), "DONGLE_FAILED") for n in range(4)},
    "stuck 0x80": (lambda d: d.stick(), "DONGLE_FAILED"),
    "silent": (lambda d: d.never_answer(), "DONGLE_FAILED"),
    "short reports": (lambda d: d.short_reports(), "DONGLE_FAILED"),
    "hanging": (lambda d: d.hang(), "DONGLE_FAILED"),
    "EBUSY": (lambda d: d.occupy(), "DONGLE_BUSY"),
    "EACCES": (lambda d: d.deny(), "DONGLE_NO_PERMISSION"),
    "gives up a touch before anybody sees it wait": (lambda d: d.time_out_touch(), "DONGLE_UNPROGRAMMED"),
    "another secret": (lambda d: d.wrong_secret(), "DONGLE_ABSENT"),
}


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_dongle_that_fails(vendor, licensed, fault):
    kit, dongle, _ = licensed
    fail, reason = FAULTS[fault]
    fail(dongle)
    with refusal(AbsentError if reason == "DONGLE_ABSENT" else HardwareError, reason):
        kit.open(vendor)
    dongle.heal()
    assert dongle.driver_attached or fault == "hanging"  # what hangs cannot be given back; the next use does
    with kit.open(vendor) as model:
        assert everything(model) == MEMBERS


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("seed", range(4))
def test_noise(vendor, licensed, seed):
    kit, dongle, _ = licensed
    dongle.random_bytes(seed)
    with refusal(HardwareError, "DONGLE_FAILED", "DONGLE_UNPROGRAMMED", "DONGLE_UNTOUCHED"):
        kit.open(vendor)
    dongle.heal()
    kit.open(vendor).close()


def test_a_stale_answer_is_another_dongles(vendor, licensed):
    """What it answered to someone else before does not open, though CRC and sequence are right."""
    kit, dongle, _ = licensed
    with UsbHardware() as hardware:
        hardware.describe(Selection())
    dongle.answer_stale()
    with refusal(AbsentError, "DONGLE_ABSENT"):
        kit.open(vendor)


def test_an_answer_recorded_at_an_opening_is_no_proof_of_presence(vendor, kit):
    """A dongle that gives the opening's answer to whatever it is asked: replaying it buys the rest of an interval."""
    kit.license(vendor, WATCHED)
    dongle = kit.pieces[0].dongle
    with kit.open(vendor) as model:
        with UsbHardware() as hardware:  # the last answer is the opening's, not that of a first proof
            (binding,) = sent(next(kit.home.path.rglob("license.hwlic")).read_bytes()).bindings
            hardware.unwrap(binding, b"", [], None).secret.wipe()
            dongle.answer_stale()
        until(lambda: not model.standing(), 2)
        with refusal(AbsentError, "DONGLE_ABSENT"), model.session():
            pass


def test_an_answer_recorded_at_a_proof_is_no_other_proof(vendor, kit):
    kit.license(vendor, WATCHED)
    (binding,) = sent(next(kit.home.path.rglob("license.hwlic")).read_bytes()).bindings
    dongle = kit.pieces[0].dongle
    with UsbHardware() as hardware:
        hardware.present(binding, b"", 0)
        dongle.answer_stale()
        hardware.present(binding, b"", 0)  # the same question has the same answer: so each is asked once
        for number in range(1, 5):
            with refusal(AbsentError, "DONGLE_ABSENT"):
                hardware.present(binding, b"", number)


def test_each_opening_and_each_proof_asks_another_question(vendor, kit):
    """Over the bus: no license's challenge is another's, and no proof's is an opening's."""
    dongle = kit.pieces[0].dongle
    bindings = [sent(kit.issue(vendor, WATCHED)).bindings[0] for _ in range(3)]
    asked = [challenges.challenge(b.seed, b.first + n) for b in bindings for n in range(41)]
    assert len({*asked, challenges.identity_challenge()}) == 3 * 41 + 1
    for one, other in itertools.permutations(bindings, 2):
        answer = challenges.answer(Secret(bytearray(dongle.secret)), "less-than-64", challenges.challenge(one.seed, 0))
        with refusal(AbsentError, "DONGLE_ABSENT"):
            challenges.unwrap(answer, other)
        with refusal(AbsentError, "DONGLE_ABSENT"):
            challenges.check_presence(answer, one, 0)


# ---- pulled -------------------------------------------------------------------------------------------------


def test_pulled_before_an_opening(vendor, licensed):
    kit, dongle, _ = licensed
    dongle.pull()
    with refusal(AbsentError, "DONGLE_ABSENT"):
        kit.open(vendor)
    dongle.plug(port=7)
    with kit.open(vendor) as model:
        assert everything(model) == MEMBERS


@pytest.mark.usefixtures("hurried")
def test_pulled_after_any_report_of_an_opening(vendor, licensed):
    kit, dongle, _ = licensed
    before = len(dongle.transfers)
    kit.open(vendor).close()
    took = len(dongle.transfers) - before
    assert took > 30
    for reports in [*range(1, took, 3), took - 1]:
        dongle.pull_after(reports)
        if reports < took - 8:  # the last are the resets after the answer, which may be lost
            with refusal(AbsentError, "DONGLE_ABSENT"):
                kit.open(vendor)
        else:
            try:
                kit.open(vendor).close()
            except AbsentError as error:
                assert error.reason == "DONGLE_ABSENT"  # noqa: PT017  # or it opened, as the answer was there
        if not dongle.plugged:
            dongle.plug()
        dongle.heal()
    kit.open(vendor).close()


# ---- dongles that look alike --------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["the right one", "the other"])
def test_another_dongle_with_the_same_serial_number(vendor, bench, licensed, first):
    kit, dongle, _ = licensed
    fake = bench.enter(Dongle(bus=bench.bus, serial=dongle.serial))
    dongle.pull()
    with refusal(AbsentError, "DONGLE_ABSENT", words=str(dongle.serial)):
        kit.open(vendor)
    if first == "the right one":
        fake.pull()
        dongle.plug()
        fake.plug()
    else:
        dongle.plug()
    assert [one.product for one in find()] == [fake.selector[:9]] * 2
    with kit.open(vendor) as model:
        assert everything(model) == MEMBERS
    given_back(bench)


def test_several_wrong_dongles_before_the_right_one(vendor, bench, licensed):
    """Other products, other serial numbers, empty ones, ones that fail: none hides the right one."""
    kit, dongle, _ = licensed
    dongle.pull()
    others = [
        Dongle(bus=bench.bus, serial=1),
        Dongle(bus=bench.bus, serial=2, programmed=False),
        Dongle(bus=bench.bus, serial=3, product=0x0010),
        Dongle(bus=bench.bus, serial=4, vendor=0x1D50, product=0x60FC),
    ]
    for other in others:
        bench.enter(other)
    others[0].bad_crc()
    dongle.plug()
    kit.open(vendor).close()
    given_back(bench)
    dongle.pull()
    with refusal(HardwareError, "DONGLE_FAILED"):  # the first may be the right one, as far as anyone can tell
        kit.open(vendor)
    others[0].heal()
    with refusal(AbsentError, "DONGLE_ABSENT"):
        kit.open(vendor)


def test_the_same_secret_in_two_dongles_opens_with_either(vendor, bench, licensed):
    """As documented: who knows the secret can copy the dongle, whatever its serial number."""
    kit, dongle, _ = licensed
    bench.enter(dongle.copy(bus=bench.bus))
    dongle.pull()
    with kit.open(vendor) as model:
        assert everything(model) == MEMBERS


def test_an_environment_that_names_another_dongle_is_harmless(vendor, bench, licensed, monkeypatch):
    kit, dongle, _ = licensed
    other = bench.enter(Dongle(bus=bench.bus, serial=99))
    monkeypatch.setenv("HWLICENSE_USB", other.selector)
    kit.open(vendor).close()
    dongle.pull()
    with refusal(AbsentError, "DONGLE_ABSENT"):
        kit.open(vendor)


# ---- licenses whose dongle part was edited ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        (lambda b: {"check": flipped(b.check, 0)}, AbsentError, "DONGLE_ABSENT"),
        (lambda b: {"seed": flipped(b.seed, 31)}, AbsentError, "DONGLE_ABSENT"),
        (lambda b: {"first": b.first + 1}, AbsentError, "DONGLE_ABSENT"),
        (lambda _b: {"slot": 1}, HardwareError, "DONGLE_UNPROGRAMMED"),
    ],
    ids=["check", "seed", "first", "slot"],
)
def test_a_dongle_part_that_was_edited_opens_nothing(vendor, licensed, change, kind, reason):
    """By who has the vendor's document keys."""
    kit, _, raw = licensed
    good = sent(raw)
    forged = replace(good, bindings=[replace(good.bindings[0], **change(good.bindings[0]))])
    with refusal(kind, reason):
        kit.install(signed_anew(forged, vendor), vendor)
    lay(kit, forged, vendor)
    with refusal(kind, reason):
        kit.open(vendor)
    with refusal(DamagedError, "SIGNATURE_INVALID"):  # and by who has not
        kit.install(edited(raw, forged), vendor)


def test_a_dongle_part_made_for_the_attackers_own_dongle_opens_nothing(vendor, bench, licensed):
    """It answers, and is known by its check; but what it adds to the license secret is another member."""
    kit, dongle, raw = licensed
    theirs: Any = DonglePiece(bench)
    dongle.pull()  # so that the piece finds its own
    other = sent(Kit(bench, kit.home.path / "other", [theirs]).issue(vendor, TERMS))
    lay(kit, replace(sent(raw), bindings=other.bindings), vendor)
    with refusal(DamagedError, "LICENSE_DAMAGED"):
        kit.open(vendor)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: flipped(b.answers, 0),
        lambda b: bytes(len(b.answers)),
        lambda b: b.answers[8:] + b.answers[:8],
    ],
    ids=["a bit", "zeros", "another order"],
)
def test_recorded_answers_that_were_edited_prove_nothing(vendor, kit, change):
    good = sent(kit.license(vendor, WATCHED))
    forged = replace(good, bindings=[replace(good.bindings[0], answers=change(good.bindings[0]))])
    lay(kit, forged, vendor)
    with kit.open(vendor) as model:
        until(lambda: not model.standing(), 2)
        with refusal(AbsentError, "DONGLE_ABSENT"), model.session():
            pass


def test_recorded_answers_that_were_cut_open_nothing(vendor, kit):
    good = sent(kit.license(vendor, WATCHED))
    lay(kit, replace(good, bindings=[replace(good.bindings[0], answers=good.bindings[0].answers[:-1])]), vendor)
    with refusal(DamagedError, "LICENSE_DAMAGED"):
        kit.open(vendor)


# ---- touch --------------------------------------------------------------------------------------------------


@pytest.fixture
def touched(vendor, bench, tmp_path):
    piece = DonglePiece(bench, touch=True)
    kit, dongle = Kit(bench, tmp_path / "home", [piece]), piece.dongle
    dongle.touch_after(0.0)
    kit.license(vendor, TERMS)
    dongle.touch_after(60.0)
    dongle._device._touch_seconds = 0.3
    yield kit, dongle
    given_back(bench)


def test_pulled_while_it_waits_for_a_touch(vendor, touched):
    kit, dongle = touched
    said = []

    def touch(prompt):
        said.append(prompt)
        dongle.pull()

    with refusal(AbsentError, "DONGLE_ABSENT"):
        kit.open(vendor, touch=touch)
    assert len(said) == 1
    assert "Touch" in said[0]
    dongle.plug()
    dongle.touch_after(0.0)
    kit.open(vendor).close()


def test_a_touch_that_does_not_come(vendor, touched):
    kit, dongle = touched
    for _ in range(2):
        with refusal(HardwareError, "DONGLE_UNTOUCHED"):
            kit.open(vendor)
    dongle.touch_after(0.0)
    kit.open(vendor).close()
