"""Dongles at the order desk: whom a license may be bound to, which answers it takes, and who may write over a slot."""

import os
import signal

import pytest

from hwlicense import storage
from hwlicense.binders.usb import find_one
from hwlicense.core import dongle as challenges
from hwlicense.core.documents import Request, UsbEvidence
from hwlicense.core.envelope import assemble
from hwlicense.core.errors import (
    AbsentError,
    DamagedError,
    HardwareError,
    Reason,
    RefusedError,
    StorageError,
    UsageError,
)
from hwlicense.core.schema import SCHEMA, encode
from hwlicense.core.secret import Secret
from hwlicense.core.terms import parse_terms
from hwlicense.vendor import dongles, evidence, issuing
from hwlicense_simulators import Dongle
from tests.forging import flipped, now, replace
from tests.pieces import Bench, DonglePiece, Kit
from tests.refusals import refusal
from tests.world import MEMBERS, NOW, TERMS, Vendor, everything

WATCHED = TERMS + '[presence]\ninterval = "1s"\nanswers = 10\n'
UNKNOWN = UsbEvidence("ab" * 16, "1050:0407", "7", "5.4.3", 2, touch=False)


@pytest.fixture
def bench():
    with Bench() as own:
        yield own
        for plugged in own.bus.all():
            assert plugged.driver
            assert plugged.claim is None


def program(folder, keys, *, overwrite=False, touch=False):
    with find_one() as device:
        return dongles.program(folder, keys, device, 2, touch=touch, mode="less-than-64", overwrite=overwrite)


def enroll(folder, keys, count):
    with find_one() as device:
        return dongles.enroll(folder, keys, device, 2, count, lambda challenge: device.ask(2, challenge))


def request(*found):
    return assemble(Request(SCHEMA, NOW.date(), "kit", list(found)), [])


def examine(*found):
    return evidence.examine(request(*found), evidence.Trusted(), now()).parts


def issue(vendor, parts, terms=TERMS):
    def bind(found, answers):
        return dongles.bind(vendor.place, vendor.keys, found, answers)

    made = [vendor.public, vendor.keys, parts, [vendor.manifest], parse_terms(terms), []]
    return issuing.issue(*made, today=NOW.date(), bind_dongle=bind).license


def path_of(vendor, identifier):
    return vendor.place.path / "hardware" / f"dongle-{identifier}.json"


def record(vendor, identifier):
    return vendor.place.dongle(identifier)


def change_record(vendor, identifier, **fields):
    kept = replace(record(vendor, identifier), **fields)
    path_of(vendor, identifier).write_bytes(encode(kept) + b"\n")


def span(binding):
    """The numbers of the challenges that a license takes."""
    return set(range(binding.first, binding.first + 1 + challenges.answer_count(binding)))


# ---- requests -----------------------------------------------------------------------------------------------


def test_a_dongle_that_nobody_recorded(vendor):
    with refusal(RefusedError, "DONGLE_UNKNOWN"):
        issue(vendor, examine(UNKNOWN))


def test_a_dongle_that_another_vendor_recorded(vendor, own_vendor, bench):
    bench.enter(Dongle(bus=bench.bus, programmed=False))
    made = program(own_vendor.place, own_vendor.keys)
    with refusal(RefusedError, "DONGLE_UNKNOWN"):
        issue(vendor, examine(made.evidence))


@pytest.mark.parametrize(
    "twin",
    [lambda found: found, lambda found: replace(found, serial="8", slot=1, product="1050:0010", firmware="1.0.0")],
    ids=["the same", "under another name"],
)
def test_one_dongle_named_twice(vendor, twin):
    """Else one piece would count for two."""
    with refusal(DamagedError, "EVIDENCE_INVALID"):
        examine(UNKNOWN, twin(UNKNOWN))
    with refusal(UsageError, "USAGE", words="same piece"):
        issue(vendor, [*examine(UNKNOWN), *examine(twin(UNKNOWN))])


def test_what_a_request_says_beside_the_name_counts_for_nothing(own_vendor, bench):
    """Product, serial number and slot come from the record."""
    bench.enter(Dongle(bus=bench.bus, programmed=False, serial=4711))
    made = program(own_vendor.place, own_vendor.keys)
    lying = replace(made.evidence, product="1050:0010", serial="1", slot=1, firmware="9.9.9")
    issued = issue(own_vendor, examine(lying))
    (binding,) = issued.bindings
    assert (binding.product, binding.serial, binding.slot) == ("1050:0407", "4711", 2)


@pytest.mark.parametrize("honest", [True, False])
def test_a_touch_dongle_is_refused_for_presence_whatever_the_request_says(own_vendor, bench, honest):
    """It could prove nothing at an interval: the license would end at its first one."""
    bench.enter(Dongle(bus=bench.bus, programmed=False))
    made = program(own_vendor.place, own_vendor.keys, touch=True)
    found = made.evidence if honest else replace(made.evidence, touch=False)
    with refusal(UsageError, "TERM_INVALID"):
        issue(own_vendor, examine(found), WATCHED)
    assert issue(own_vendor, examine(found)).bindings[0].touch


# ---- recorded answers ---------------------------------------------------------------------------------------


@pytest.fixture
def pool(own_vendor, bench):
    """A dongle of somebody else's, of which 40 answers are recorded."""
    bench.enter(Dongle(bus=bench.bus))
    return enroll(own_vendor.place, own_vendor.keys, 40).evidence


def test_no_answer_goes_into_two_licenses_and_none_is_left_in_the_end(own_vendor, pool):
    taken: set[int] = set()
    for _ in range(3):
        (binding,) = issue(own_vendor, examine(pool), WATCHED).bindings
        assert binding.seed == record(own_vendor, pool.dongle).seed
        assert not taken & span(binding)
        taken |= span(binding)
    assert len(taken) == 33
    with refusal(RefusedError, "ANSWERS_EXHAUSTED", words="7 recorded answers are left"):
        issue(own_vendor, examine(pool), WATCHED)
    for _ in range(7):
        taken |= span(issue(own_vendor, examine(pool)).bindings[0])
    assert len(taken) == 40
    with refusal(RefusedError, "ANSWERS_EXHAUSTED"):
        issue(own_vendor, examine(pool))


def test_an_issue_that_fails_after_it_took_answers_wastes_them(own_vendor, pool, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(issuing, "seal", lambda *_: (_ for _ in ()).throw(StorageError(Reason.STORAGE, "Full.", "x")))
        with pytest.raises(StorageError):
            issue(own_vendor, examine(pool), WATCHED)
    (binding,) = issue(own_vendor, examine(pool), WATCHED).bindings
    assert min(span(binding)) == 11


@pytest.mark.parametrize("moment", ["before the record is written", "while it is written", "after it"])
def test_an_issue_that_is_killed_gives_no_answer_twice(own_vendor, pool, monkeypatch, moment):
    """By SIGKILL: what was taken is crossed out before anything is made of it."""
    die = lambda *_a, **_o: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    target = {
        "before the record is written": (type(own_vendor.place), "keep_dongle"),
        "while it is written": (storage, "_publish"),
        "after it": (challenges, "verifier"),
    }[moment]
    child = os.fork()
    if not child:
        monkeypatch.setattr(*target, die)
        try:
            issue(own_vendor, examine(pool), WATCHED)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (binding,) = issue(own_vendor, examine(pool), WATCHED).bindings
    assert min(span(binding)) == (11 if moment == "after it" else 0)


def test_a_record_that_cannot_be_written_gives_no_answer(own_vendor, pool, monkeypatch):
    def fail(*_arguments, **_options):
        raise StorageError(Reason.STORAGE, "The disk is full.", "Make room.")

    monkeypatch.setattr(storage, "atomic_write", fail)
    with pytest.raises(StorageError):
        issue(own_vendor, examine(pool), WATCHED)


def test_enrolling_again_gives_other_challenges(own_vendor, bench, pool):
    before = record(own_vendor, pool.dongle)
    assert bench.bus.all()
    again = enroll(own_vendor.place, own_vendor.keys, 5)
    assert again.evidence.dongle == pool.dongle
    assert again.record.seed != before.seed
    assert issue(own_vendor, examine(pool)).bindings[0].seed == again.record.seed


def test_enrolling_a_dongle_that_was_programmed_here_loses_no_access_code(own_vendor, bench):
    """Its answers are known; a record of some of them must not take the place of its secret and access code."""
    dongle = bench.enter(Dongle(bus=bench.bus, programmed=False))
    made = program(own_vendor.place, own_vendor.keys)
    again = enroll(own_vendor.place, own_vendor.keys, 3)
    assert (again.evidence, again.record) == (made.evidence, made.record)
    assert record(own_vendor, made.evidence.dongle) == made.record
    before = dongle.secret
    program(own_vendor.place, own_vendor.keys, overwrite=True)
    assert dongle.secret != before


def test_enrolling_that_is_cut_off_leaves_the_former_record(own_vendor, bench, pool):
    before = record(own_vendor, pool.dongle)
    (plugged,) = bench.bus.all()
    plugged.gadget.faults.left = 300
    with refusal(AbsentError, "DONGLE_ABSENT"):
        enroll(own_vendor.place, own_vendor.keys, 40)
    assert record(own_vendor, pool.dongle) == before


# ---- records that were edited -------------------------------------------------------------------------------


@pytest.fixture(params=["programmed", "enrolled"])
def recorded(request, own_vendor, bench):
    bench.enter(Dongle(bus=bench.bus, programmed=request.param == "enrolled"))
    if request.param == "programmed":
        return program(own_vendor.place, own_vendor.keys).evidence
    return enroll(own_vendor.place, own_vendor.keys, 20).evidence


@pytest.mark.parametrize(
    "edit",
    [
        lambda r: {"sealed": flipped(r.sealed, len(r.sealed) - 1)},
        lambda r: {"sealed": flipped(r.sealed, 0)},
        lambda _r: {"sealed": b""},
        lambda r: {"sealed": r.sealed[:-1]},
        lambda _r: {"dongle": "ab" * 16},
        lambda r: {"seed": bytes(32) if r.seed is None else None},
        lambda r: {"mode": "fixed-64" if r.mode is None else None},
        lambda r: {"answers": r.answers + 1} if r.mode is None else {"mode": None, "seed": bytes(32), "answers": 1},
        lambda _r: {"schema": 2},
    ],
    ids=["end", "start", "empty", "cut", "name", "seed", "mode", "count", "schema"],
)
def test_a_record_that_was_edited_is_refused(own_vendor, recorded, edit):
    change_record(own_vendor, recorded.dongle, **edit(record(own_vendor, recorded.dongle)))
    with refusal(DamagedError, "DOCUMENT_MALFORMED", "SCHEMA_UNSUPPORTED"):
        issue(own_vendor, examine(recorded))


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 10000, b"\xff" * 100, b'{"schema":1}'])
def test_what_is_no_record_is_refused(own_vendor, recorded, content):
    path_of(own_vendor, recorded.dongle).write_bytes(content)
    with refusal(DamagedError, "DOCUMENT_MALFORMED"):
        issue(own_vendor, examine(recorded))


def test_a_record_of_another_vendor_is_refused(own_vendor, recorded, tmp_path):
    """Copied into the folder: it is sealed to the other's keys."""
    (tmp_path / "theirs").mkdir()
    theirs = Vendor(tmp_path / "theirs")
    path_of(theirs, recorded.dongle).write_bytes(path_of(own_vendor, recorded.dongle).read_bytes())
    with refusal(DamagedError, "DOCUMENT_MALFORMED"):
        issue(theirs, examine(recorded))


def test_a_record_under_another_dongles_name_is_refused(own_vendor, bench):
    """Else a license would be bound to another dongle than the request's."""
    first = bench.enter(Dongle(bus=bench.bus, programmed=False, serial=1))
    one = program(own_vendor.place, own_vendor.keys).evidence
    first.pull()
    bench.enter(Dongle(bus=bench.bus, programmed=False, serial=2))
    two = program(own_vendor.place, own_vendor.keys).evidence
    path_of(own_vendor, one.dongle).write_bytes(path_of(own_vendor, two.dongle).read_bytes())
    with refusal(DamagedError, "DOCUMENT_MALFORMED"):
        issue(own_vendor, examine(one))
    first.plug()


def test_a_record_holds_no_secret_in_the_clear(own_vendor, bench):
    dongle = bench.enter(Dongle(bus=bench.bus, programmed=False))
    made = program(own_vendor.place, own_vendor.keys)
    for path in own_vendor.place.path.rglob("*"):
        if path.is_file():
            for secret in (dongle.secret, dongle.access_code):
                assert secret not in path.read_bytes()
                assert secret.hex().encode() not in path.read_bytes()
    assert path_of(own_vendor, made.record.dongle).stat().st_mode & 0o777 == 0o600


# ---- slots --------------------------------------------------------------------------------------------------


def test_a_slot_in_use_is_not_written_over_by_chance(own_vendor, bench):
    dongle = bench.enter(Dongle(bus=bench.bus))
    before = dongle.secret
    with refusal(UsageError, "SLOT_IN_USE"):
        program(own_vendor.place, own_vendor.keys)
    assert dongle.secret == before
    assert own_vendor.place.dongles() == []
    program(own_vendor.place, own_vendor.keys, overwrite=True)
    assert dongle.secret != before


def test_the_access_code_keeps_others_from_writing(own_vendor, bench, tmp_path):
    dongle = bench.enter(Dongle(bus=bench.bus, programmed=False))
    program(own_vendor.place, own_vendor.keys)
    before = dongle.secret
    assert any(dongle.access_code)
    (tmp_path / "theirs").mkdir()
    theirs = Vendor(tmp_path / "theirs")
    for _ in range(2):
        with refusal(HardwareError, "DONGLE_PROTECTED"):
            program(theirs.place, theirs.keys, overwrite=True)
    assert dongle.secret == before
    program(own_vendor.place, own_vendor.keys, overwrite=True)
    assert dongle.secret != before
    assert any(dongle.access_code)


def test_a_dongle_that_changed_its_product_id_is_programmed_again(own_vendor, bench):
    """As YubiKeys do when interfaces are switched on or off: the access code is that of the serial number."""
    dongle = bench.enter(Dongle(bus=bench.bus, programmed=False))
    program(own_vendor.place, own_vendor.keys)
    before = dongle.secret
    dongle.pull()
    dongle._gadget.product = 0x0403
    dongle.plug()
    program(own_vendor.place, own_vendor.keys, overwrite=True)
    assert dongle.secret != before


def test_programming_that_is_cut_off_anywhere_leaves_the_folder_able_to_go_on(own_vendor, bench):
    """After any report. The dongle has the old code or the new one, and both are recorded."""
    dongle = bench.enter(Dongle(bus=bench.bus, programmed=False))
    program(own_vendor.place, own_vendor.keys)
    before = len(dongle.transfers)
    made = program(own_vendor.place, own_vendor.keys, overwrite=True)
    took = len(dongle.transfers) - before
    ends = set()
    for reports in range(1, took):
        kept = {record.dongle: record for record in own_vendor.place.dongles()}
        before, name = dongle.secret, next(n for n, r in kept.items() if r == latest(own_vendor, dongle))
        for other in set(kept) - {name}:  # codes of former tries would be tried, too, in any order
            path_of(own_vendor, other).unlink()
        dongle.pull_after(reports)
        try:
            program(own_vendor.place, own_vendor.keys, overwrite=True)
        except AbsentError:
            ends.add("written" if dongle.secret != before else "not written")
        if not dongle.plugged:
            dongle.plug()
        dongle.heal()
        between = dongle.secret
        made = program(own_vendor.place, own_vendor.keys, overwrite=True)
        assert dongle.secret != between
    assert ends == {"written", "not written"}
    issue(own_vendor, examine(made.evidence))


def latest(vendor, dongle):
    """The record of what is in the dongle now."""
    with Secret(bytearray(dongle.secret)) as secret:
        answer = challenges.answer(secret, "less-than-64", challenges.identity_challenge())
    return record(vendor, challenges.identifier(answer))


def test_a_dongle_that_was_programmed_anew_opens_old_licenses_no_more(own_vendor, bench, tmp_path):
    piece = DonglePiece(bench)
    kit = Kit(bench, tmp_path / "home", [piece])
    kit.license(own_vendor, TERMS)
    kit.open(own_vendor).close()
    program(own_vendor.place, own_vendor.keys, overwrite=True)
    with refusal(AbsentError, "DONGLE_ABSENT"):
        kit.open(own_vendor)
    kit.license(own_vendor, TERMS)
    with kit.open(own_vendor) as model:
        assert everything(model) == MEMBERS
