"""Hardware that is taken away while a model is open: what is refused, what goes on, and when."""

import os
import time
from pathlib import Path

import pytest

import hwlicense
from hwlicense.binders.pkcs11 import answering, protocol
from hwlicense.core import presence as rules
from hwlicense.core.errors import AbsentError, HwlicenseError, RefusedError
from hwlicense.core.secret import Secret
from hwlicense_simulators import softhsm
from tests.forging import refused
from tests.pieces import PIN, Bench, DonglePiece, Kit, TokenPiece, TpmPiece
from tests.refusals import refusal, until
from tests.world import MEMBERS, TERMS, everything

INTERVAL, PROOFS = 1.0, 8  # seconds, and in each


def terms(need='"all"', grace="", **more):
    extra = "".join(f"{name} = {value}\n" for name, value in more.items())
    extra += f'grace = "{grace}"\n' if grace else ""
    presence = f'[presence]\ninterval = "1s"\nanswers = 60\n{extra}'
    return f'{TERMS}[require]\nbindings = {need}\n{presence}[continuity]\nsession = "1h"\n'


@pytest.fixture(autouse=True)
def proofs_come_often(monkeypatch):
    """So that a test need not wait for them; the interval stays what it is."""
    monkeypatch.setattr(rules, "PROOFS_PER_INTERVAL", PROOFS)


@pytest.fixture
def bench():
    with Bench() as own:
        yield own
        assert own.reader.open_sessions == 0
        assert not own.reader.logged_in


@pytest.fixture
def dongle(bench, vendor, tmp_path):
    """A device with a dongle that must prove its presence each second."""
    kit = Kit(bench, tmp_path / "home", [DonglePiece(bench)])
    kit.license(vendor, terms())
    return kit


@pytest.fixture
def token(bench, vendor, tmp_path):
    kit = Kit(bench, tmp_path / "home", [TokenPiece(bench)])
    kit.license(vendor, terms())
    return kit


def lost(model):
    """Until nothing may start, and keys and readers are empty."""
    took = until(lambda: not model.standing(), INTERVAL + 1.5)
    until(lambda: not any(model._keys.view), 1)
    return took


def stays(model):
    """May start all the time, for longer than an interval."""
    end = time.monotonic() + INTERVAL + 0.1
    while time.monotonic() < end:
        assert model.standing(), model.standing()
        time.sleep(0.01)


def back(model):
    until(lambda: model.standing().may_start, 10)
    with model.session():
        assert everything(model) == MEMBERS


# ---- pulled ------------------------------------------------------------------------------------------------


def test_pulled_right_after_opening(vendor, dongle):
    with dongle.open(vendor) as model:
        dongle.pieces[0].pull()
        assert lost(model) < INTERVAL + 1
        with refusal(AbsentError, "DONGLE_ABSENT"), model.session():
            pass
        with refusal(AbsentError, "DONGLE_ABSENT"):
            model.read("weights.bin")
        with refusal(AbsentError, "DONGLE_ABSENT"):
            model.open("weights.bin")
        with refusal(AbsentError, "DONGLE_ABSENT"):
            model.path("weights.bin")


@pytest.mark.parametrize("reports", [1, 9, 22, 31])
def test_pulled_in_the_middle_of_a_proof(vendor, dongle, reports):
    with dongle.open(vendor) as model:
        until(lambda: model._presence.proofs >= 1)
        dongle.pieces[0].dongle.pull_after(reports)
        lost(model)
        with refusal(AbsentError, "DONGLE_ABSENT"), model.session():
            pass
        dongle.pieces[0].plug()
        dongle.pieces[0].dongle.heal()
        back(model)


def test_a_session_goes_on_with_the_same_results_and_buffers(vendor, dongle):
    """What was read before, and what is in buffers, paths and memory, is the same after the keys are gone."""
    with dongle.open(vendor) as model:
        held, path = model.read("weights.bin"), model.path("weights.bin")
        with model.session() as session:
            assert session.continuity == 3600
            before = sum(bytes(held)), Path(path).read_bytes()
            dongle.pieces[0].pull()
            lost(model)
            for _ in range(3):
                assert (sum(bytes(held)), Path(path).read_bytes()) == before
                time.sleep(0.1)
            assert bytes(held) == MEMBERS["weights.bin"]
        with refusal(AbsentError, "DONGLE_ABSENT"), model.session():
            pass
        assert bytes(held) == MEMBERS["weights.bin"]
        dongle.pieces[0].plug()
        back(model)
        assert bytes(held) == MEMBERS["weights.bin"]


def test_a_reader_forgets_what_it_had_decrypted(vendor, dongle):
    with dongle.open(vendor) as model, model.open("weights.bin") as file:
        assert file.read(100) == MEMBERS["weights.bin"][:100]
        dongle.pieces[0].pull()
        lost(model)
        until(lambda: file._memory is None, 1)  # nor does it keep them in memory
        with refusal(AbsentError, "DONGLE_ABSENT"):
            file.read(100)
        dongle.pieces[0].plug()
        back(model)
        assert file.read(100) == MEMBERS["weights.bin"][100:200]


def test_put_into_another_port_between_two_proofs(vendor, dongle):
    with dongle.open(vendor) as model:
        until(lambda: model._presence.proofs >= 1)
        dongle.pieces[0].dongle.pull()
        dongle.pieces[0].dongle.plug(port=5)
        stays(model)
        assert everything(model) == MEMBERS


def test_another_dongle_in_its_place_proves_nothing(vendor, bench, dongle):
    other = DonglePiece(bench)
    other.pull()
    with dongle.open(vendor) as model:
        dongle.pieces[0].pull()
        other.plug()
        other.prepare(vendor)
        lost(model)
        time.sleep(0.3)  # further proofs
        with refusal(AbsentError, "DONGLE_ABSENT"), model.session():
            pass
        dongle.pieces[0].plug()
        back(model)


# ---- standing -----------------------------------------------------------------------------------------------


def test_what_standing_says(vendor, dongle):
    with dongle.open(vendor) as model:
        good = model.standing(horizon=3600)
        assert (good.may_start, good.reason, good.present, good.grace_left) == (True, None, True, 0.0)
        long = model.standing(horizon=3601)
        assert (long.may_start, long.reason, long.present) == (False, "CONTINUITY_TOO_SHORT", True)
        assert isinstance(long.refusal, RefusedError)
        assert long.refusal.hint
        dongle.pieces[0].pull()
        lost(model)
        assert model.standing(1e9).reason == "CONTINUITY_TOO_SHORT", "the dongle would not change that"
        for horizon in (0, 10, 3600):
            gone = model.standing(horizon)
            assert (gone.may_start, gone.reason, gone.present) == (False, "DONGLE_ABSENT", False)
            assert isinstance(gone.refusal, AbsentError)
            assert gone.refusal.hint
        began = time.monotonic()
        for _ in range(1000):
            model.standing()
        assert time.monotonic() - began < 1  # touches no hardware
    with pytest.raises(hwlicense.ClosedError, match="was closed"):
        model.standing()


@pytest.mark.parametrize("presence", [True, False])
def test_a_session_of_a_closed_model(vendor, bench, tmp_path, presence):
    kit = Kit(bench, tmp_path / "home", [DonglePiece(bench)])
    kit.license(vendor, terms() if presence else TERMS)
    model = kit.open(vendor)
    model.close()
    with pytest.raises(hwlicense.ClosedError, match="was closed"), model.session():
        pass


# ---- tokens -------------------------------------------------------------------------------------------------


class Typist:
    """Someone who is asked for a PIN, on whatever thread."""

    def __init__(self, *texts):
        self.texts, self.asked = list(texts), 0

    def __call__(self, _prompt):
        self.asked += 1
        return Secret(bytearray(self.texts.pop(0).encode())) if self.texts else None


def test_a_token_that_comes_back_takes_its_pin_again(vendor, token):
    typist = Typist(PIN, PIN)
    with token.open(vendor, pin=typist) as model:
        token.pieces[0].pull()
        lost(model)
        with refusal(AbsentError, "TOKEN_ABSENT"), model.session():
            pass
        token.pieces[0].token.plug("other")
        back(model)
        assert typist.asked == 2


@pytest.mark.parametrize(("texts", "reason", "left"), [([PIN, "000000"], "PIN_WRONG", 2), ([PIN], "PIN_NEEDED", 3)])
def test_a_wrong_pin_or_none_at_the_return_is_not_tried_again(vendor, token, texts, reason, left):
    typist = Typist(*texts)
    with token.open(vendor, pin=typist) as model:
        token.pieces[0].pull()
        lost(model)
        token.pieces[0].plug()
        until(lambda: model.standing().reason == reason, 5)
        time.sleep(0.3)  # longer than from one proof to the next
        assert typist.asked == 2
        assert token.pieces[0].token.tries_left == left
        with refusal(RefusedError, reason), model.session():
            pass
        assert not any(model._keys.view)
    token.open(vendor).close()  # opening it anew asks again


def test_the_last_try_is_not_made_by_the_return_of_a_token(vendor, token):
    typist = Typist(PIN, PIN)
    with token.open(vendor, pin=typist) as model:
        token.pieces[0].pull()
        lost(model)
        softhsm.write(token.pieces[0].token._tries, ["1"])
        token.pieces[0].plug()
        until(lambda: model.standing().reason == "PIN_LAST_TRY", 5)
        assert typist.asked == 1
        assert token.pieces[0].token.tries_left == 1


def test_a_token_swapped_for_another_one(vendor, bench, token):
    other = TokenPiece(bench)
    with other.hardware():
        pass
    other.token.pull()
    with token.open(vendor) as model:
        token.pieces[0].token.swap(other.token)
        lost(model)
        with refusal(AbsentError, "TOKEN_ABSENT"), model.session():
            pass
    assert other.token.tries_left == 3


def test_a_module_that_hangs_in_a_proof_is_noticed_in_time(vendor, token, monkeypatch):
    with token.open(vendor) as model:
        until(lambda: model._presence.proofs >= 1)
        monkeypatch.setitem(answering.DEADLINES, protocol.Compute, 2.0)
        token.bench.reader.hang("C_DeriveKey")
        assert lost(model) < INTERVAL + 1.2
        assert model.standing().reason == "PRESENCE_UNPROVEN"
        token.bench.reader.heal()
        back(model)


@pytest.mark.parametrize("fault", ["crash", "wrong_secret", "forged point"])
def test_a_module_that_fails_in_a_proof(vendor, token, fault):
    reader = token.bench.reader
    with token.open(vendor) as model:
        until(lambda: model._presence.proofs >= 1)
        {
            "crash": lambda: reader.crash("C_DeriveKey"),
            "wrong_secret": reader.wrong_secret,
            "forged point": lambda: reader.forge(0x181, b"\x04\x41\x04" + bytes(64)),
        }[fault]()
        lost(model)
        with refused("TOKEN_CRASHED", "TOKEN_FORGED", "TOKEN_ABSENT"), model.session():
            pass
        reader.heal()
        back(model)


def test_a_child_forked_from_an_open_model_logs_in_for_itself(vendor, token):
    """The parent's login is not the child's: with a PIN it starts; without one it is refused, and no other is asked."""
    typist = Typist(PIN)
    with token.open(vendor, pin=typist) as model:
        until(lambda: model._presence.proofs >= 1)
        for texts, status in (([PIN], 0), ([], 7), ([PIN], 7)):
            child = os.fork()
            if not child:
                code = 1
                try:
                    typist.texts = list(texts)
                    time.sleep(INTERVAL + 0.2)  # what the parent proved has lapsed
                    with model.session():
                        code = 0
                except HwlicenseError as error:
                    code = 7 if error.reason == "PIN_NEEDED" else 8
                finally:
                    model.close()
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
        with model.session():
            assert everything(model) == MEMBERS


# ---- several pieces -----------------------------------------------------------------------------------------


@pytest.fixture
def three(bench, vendor, tmp_path):
    kit = Kit(bench, tmp_path / "home", [TpmPiece(bench), DonglePiece(bench), DonglePiece(bench)])
    kit.license(vendor, terms(2))
    return kit


def test_one_of_three_may_go_and_two_may_not(vendor, three):
    with three.open(vendor) as model:
        for piece in three.pieces[::2]:
            piece.pull()
            stays(model)
            piece.plug()
            until(lambda: model.standing().present)
        three.pieces[0].pull()
        three.pieces[2].pull()
        lost(model)
        with refused("DONGLE_ABSENT", "TPM_ABSENT", "TPM_GONE"), model.session():
            pass
        three.pieces[2].plug()
        back(model)


def test_pieces_taken_in_turn_are_never_enough_alone(vendor, three):
    """One piece carried about: each proof needs two at the same time."""
    with three.open(vendor) as model:
        for piece in three.pieces[1:]:
            piece.pull()
        lost(model)
        for _ in range(3):
            three.pieces[1].plug()
            three.pieces[0].pull()
            time.sleep(0.3)
            assert not model.standing()
            three.pieces[1].pull()
            three.pieces[0].plug()
            time.sleep(0.3)
            assert not model.standing()


# ---- answers that serve once --------------------------------------------------------------------------------


@pytest.fixture
def numbered(bench, vendor, tmp_path):
    """A dongle with three recorded answers, none of which may serve twice."""
    kit = Kit(bench, tmp_path / "home", [DonglePiece(bench)])
    watched = terms(repeat="false").replace("answers = 60", "answers = 3")
    kit.license(vendor, watched)
    return kit


def test_answers_that_may_not_repeat_end_the_license(vendor, numbered):
    dongle = numbered.pieces[0].dongle
    with numbered.open(vendor) as model:
        until(lambda: model.standing().reason == "ANSWERS_EXHAUSTED", 5)
        with refusal(RefusedError, "ANSWERS_EXHAUSTED"), model.session():
            pass
        until(lambda: not any(model._keys.view), 1)
        asked = len(dongle.transfers)
        time.sleep(0.3)
        assert len(dongle.transfers) == asked  # nor is it asked any more
    for _ in range(2):
        with refusal(RefusedError, "ANSWERS_EXHAUSTED"):
            numbered.open(vendor)


def test_a_forged_account_makes_no_answer_fresh_again(vendor, numbered):
    """What cannot be believed counts as used up: the answers as the grace."""
    numbered.open(vendor).close()
    (account,) = numbered.home.path.rglob("presence")
    for content in (b"", b"{}", account.read_bytes()[:-9] + bytes(9)):
        account.write_bytes(content)
        with refusal(RefusedError, "ANSWERS_EXHAUSTED"):
            numbered.open(vendor)
