"""Licenses for several pieces of hardware under attack: fewer pieces, others, and parts exchanged by stolen keys."""

import itertools
from functools import partial

import pytest

from hwlicense.core.documents import BINDING_LIMIT, SecretWrap
from hwlicense.core.errors import AbsentError, DamagedError, HardwareError, HwlicenseError, RefusedError, UsageError
from hwlicense.core.keys import unwrap_license_secret, wrap_license_secret
from hwlicense.core.secret import Secret
from hwlicense.core.terms import parse_terms
from hwlicense.device import selecting
from hwlicense.device.installing import install
from hwlicense.vendor import dongles, evidence, issuing
from tests.forging import now, replace, signed_anew
from tests.pieces import Bench, DonglePiece, Kit, Piece, TokenPiece, TpmPiece
from tests.refusals import lay, refusal, sent
from tests.world import MEMBERS, TERMS, everything


def terms(need):
    return f"{TERMS}[require]\nbindings = {need}\n"


@pytest.fixture(scope="module")
def bench():
    with Bench() as own:
        yield own


@pytest.fixture(scope="module")
def three(bench, vendor, tmp_path_factory):
    """Two of three: a TPM, a token, a dongle. And the license as it was sent."""
    kit = Kit(bench, tmp_path_factory.mktemp("three"), [TpmPiece(bench), TokenPiece(bench), DonglePiece(bench)])
    return kit, kit.license(vendor, terms(2))


@pytest.fixture
def good(vendor, three):
    kit, raw = three
    yield kit, sent(raw)
    for piece in kit.pieces:
        plug(piece)
    lay(kit, sent(raw), vendor)
    with kit.open(vendor) as model:
        assert everything(model) == MEMBERS
    assert kit.bench.reader.open_sessions == 0


away: set[Piece] = set()


def pull(piece):
    piece.pull()
    away.add(piece)


def plug(piece):
    if piece in away:
        piece.plug()
        away.remove(piece)


# ---- fewer pieces, others -----------------------------------------------------------------------------------


@pytest.mark.parametrize("left", range(3))
def test_one_piece_of_two_that_are_needed(vendor, good, left):
    kit, _ = good
    for place, piece in enumerate(kit.pieces):
        if place != left:
            pull(piece)
    with refusal(AbsentError, "TPM_ABSENT", "TOKEN_ABSENT", "DONGLE_ABSENT", words="takes 2 of 3 pieces"):
        kit.open(vendor)


def test_one_right_piece_and_wrong_ones(vendor, bench, good, tmp_path):
    """Another TPM, another token with the same label, another dongle: each is here, and none counts."""
    kit, _ = good
    others = Kit(bench, tmp_path / "others", [TpmPiece(bench), TokenPiece(bench)])
    others.request(vendor)
    pull(kit.pieces[0])
    pull(kit.pieces[1])
    with refusal(RefusedError, "WRONG_DEVICE", words="takes 2 of 3 pieces"):
        kit.open(vendor, tpm=others.tcti)
    plug(kit.pieces[1])
    kit.open(vendor, tpm=others.tcti).close()
    pull(kit.pieces[2])
    with refusal(RefusedError, "WRONG_DEVICE"):
        kit.open(vendor, tpm=others.tcti)
    others.pieces[0].pull()
    others.pieces[1].pull()


def test_a_module_that_lies_leaves_two_others_enough(vendor, bench, good):
    kit, _ = good
    bench.reader.wrong_secret()
    try:
        kit.open(vendor).close()
        pull(kit.pieces[0])
        with refusal(HardwareError, "TOKEN_FORGED", words="takes 2 of 3 pieces"):
            kit.open(vendor)
    finally:
        bench.reader.heal()


def test_hardware_that_cannot_be_used_here_is_no_obstacle_where_the_rest_suffices(vendor, good, tmp_path):
    """No module is configured, no TPM is here: dongle and token, or TPM and dongle, do."""
    kit, licensed = good
    kit.open(vendor, token=None).close()
    kit.open(vendor, tpm="device:/nonexistent").close()
    with refusal(UsageError, "TOKEN_UNCONFIGURED", words="takes 2 of 3"):
        kit.open(vendor, token=None, tpm="device:/nonexistent")
    elsewhere = Kit(kit.bench, tmp_path / "home", kit.pieces)
    missing: list[HwlicenseError] = []
    elsewhere.home.trust(vendor.public)
    connect = selecting.hardware(elsewhere.home, elsewhere.tcti)
    install(elsewhere.home, signed_anew(licensed, vendor), connect, missing.append)
    assert [error.reason for error in missing] == ["TOKEN_UNCONFIGURED"]
    elsewhere.open(vendor, token=None).close()


# ---- parts exchanged, by who has the vendor's document keys -------------------------------------------------


def subsets(licensed):
    return {tuple(wrap.members): wrap.wrapped for wrap in licensed.wraps}


@pytest.mark.parametrize("left", list(itertools.combinations(range(3), 2)), ids=str)
def test_wraps_exchanged_between_subsets_open_nothing(vendor, good, left):
    kit, licensed = good
    (gone,) = set(range(3)) - set(left)
    wraps, other = subsets(licensed), next(subset for subset in subsets(licensed) if subset != left)
    exchanged = wraps | {left: wraps[other], other: wraps[left]}
    lay(kit, replace(licensed, wraps=[SecretWrap(list(k), v) for k, v in exchanged.items()]), vendor)
    pull(kit.pieces[gone])
    with refusal(DamagedError, "LICENSE_DAMAGED"):
        kit.open(vendor)


@pytest.mark.parametrize("left", list(itertools.combinations(range(3), 2)), ids=str)
def test_members_exchanged_within_a_wrap_open_nothing(vendor, good, left):
    kit, licensed = good
    (gone,) = set(range(3)) - set(left)
    turned = [SecretWrap(list(reversed(wrap.members)), wrap.wrapped) for wrap in licensed.wraps]
    lay(kit, replace(licensed, wraps=turned), vendor)
    pull(kit.pieces[gone])
    with refusal(DamagedError, "LICENSE_DAMAGED"):
        kit.open(vendor)


@pytest.mark.parametrize("need", [1, 3, 2**40])
def test_a_number_of_pieces_that_its_wraps_deny(vendor, good, need):
    kit, licensed = good
    forged = replace(licensed, need=need)
    with refusal(DamagedError, "LICENSE_DAMAGED"):
        kit.install(signed_anew(forged, vendor), vendor)
    lay(kit, forged, vendor)
    with refusal(DamagedError, "LICENSE_DAMAGED"):
        kit.open(vendor)


@pytest.mark.parametrize("left", range(3))
def test_fewer_pieces_than_the_license_was_made_for_open_no_wrap(vendor, good, left):
    """`need` and wraps say one piece; but each wrap takes the secrets of two."""
    kit, licensed = good
    single = [SecretWrap([place], wrap.wrapped) for place, wrap in enumerate(licensed.wraps)]
    lay(kit, replace(licensed, need=1, wraps=single), vendor)
    for place, piece in enumerate(kit.pieces):
        if place != left:
            pull(piece)
    with refusal(DamagedError, "LICENSE_DAMAGED"):
        kit.open(vendor)


@pytest.mark.parametrize("order", [order for order in itertools.permutations(range(3)) if order != (0, 1, 2)], ids=str)
def test_a_binding_moved_to_another_place_opens_nothing(vendor, good, order):
    """Its member secret is right, and at the wrong place in the key."""
    kit, licensed = good
    lay(kit, replace(licensed, bindings=[licensed.bindings[place] for place in order]), vendor)
    for gone in range(3):
        pull(kit.pieces[gone])
        with refusal(DamagedError, "LICENSE_DAMAGED"):
            kit.open(vendor)
        plug(kit.pieces[gone])


@pytest.mark.parametrize("twice", range(3))
def test_a_piece_that_is_named_twice_does_not_count_for_two(vendor, good, twice):
    """In place of each other one, or added to them: the wraps take two different secrets."""
    kit, licensed = good
    for place, piece in enumerate(kit.pieces):
        if place != twice:
            pull(piece)
    one = licensed.bindings[twice]
    for other in set(range(3)) - {twice}:
        bindings = list(licensed.bindings)
        bindings[other] = one
        lay(kit, replace(licensed, bindings=bindings), vendor)
        with refusal(DamagedError, "LICENSE_DAMAGED"):
            kit.open(vendor)
    lay(kit, replace(licensed, bindings=[*licensed.bindings, one]), vendor)
    with refusal(DamagedError, "LICENSE_DAMAGED"):
        kit.open(vendor)


def test_wraps_for_places_that_are_not_there(vendor, good):
    kit, licensed = good
    for members in ([0, 7], [255, 256], [0, 2**53 - 1]):
        wraps = [SecretWrap(members, wrap.wrapped) for wrap in licensed.wraps]
        lay(kit, replace(licensed, wraps=wraps), vendor)
        with refusal(DamagedError, "LICENSE_DAMAGED"):
            kit.open(vendor)


def test_a_place_that_is_named_twice_in_a_wrap(vendor, good):
    kit, licensed = good
    wraps = [SecretWrap([0, 0], licensed.wraps[0].wrapped), *licensed.wraps]
    with refusal(DamagedError, "LICENSE_DAMAGED"):
        kit.install(signed_anew(replace(licensed, wraps=wraps), vendor), vendor)


def test_no_smaller_set_of_secrets_opens_a_wrap():
    """Without any hardware: all subsets of wrong size or order, of four members of which three are needed."""
    members = [Secret.random() for _ in range(4)]
    secret = Secret.random()
    wraps = wrap_license_secret(secret, members, 3)
    for size in range(5):
        for chosen in itertools.combinations(range(4), size):
            given = {place: members[place] for place in chosen}
            if size >= 3:
                assert unwrap_license_secret(wraps, given) == secret
            else:
                with refusal(DamagedError, "LICENSE_DAMAGED"):
                    unwrap_license_secret(wraps, given)
                cut = [replace(wrap, members=list(chosen)) for wrap in wraps] if chosen else []
                with refusal(DamagedError, "LICENSE_DAMAGED"):
                    unwrap_license_secret(cut, given)


# ---- how many -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nine(bench):
    return [DonglePiece(bench) for _ in range(BINDING_LIMIT + 1)]


@pytest.mark.parametrize("need", [1, 4, 8])
def test_eight_pieces(vendor, bench, nine, tmp_path, need):
    kit = Kit(bench, tmp_path / "home", nine[:8])
    licensed = sent(kit.license(vendor, terms(need)))
    assert len(licensed.bindings) == 8
    for piece in nine[need:8]:
        piece.pull()
    try:
        with kit.open(vendor) as model:
            assert everything(model) == MEMBERS
        nine[0].pull()
        try:
            with refusal(AbsentError, "DONGLE_ABSENT"):
                kit.open(vendor)
        finally:
            nine[0].plug()
    finally:
        for piece in nine[need:8]:
            piece.plug()


def test_nine_pieces_are_too_many(vendor, bench, nine, tmp_path):
    with refusal(UsageError, "USAGE"):
        Kit(bench, tmp_path / "home", nine).request(vendor)
    kit = Kit(bench, tmp_path / "home", nine[:8])
    licensed = sent(kit.issue(vendor, terms(8)))
    ninth = sent(Kit(bench, tmp_path / "home", nine[8:]).issue(vendor, TERMS)).bindings
    forged = replace(licensed, bindings=[*licensed.bindings, *ninth])
    with refusal(DamagedError, "DOCUMENT_MALFORMED"):
        kit.install(signed_anew(forged, vendor), vendor)


def test_requests_that_add_up_to_nine_are_too_many(vendor, bench, nine, tmp_path):
    raws = [Kit(bench, tmp_path / "home", some).request(vendor) for some in (nine[:5], nine[5:])]
    parts = [part for raw in raws for part in evidence.examine(raw, evidence.Trusted(), now()).parts]
    made = [vendor.public, vendor.keys, parts, [vendor.manifest], parse_terms(terms(1)), []]
    with refusal(UsageError, "USAGE"):
        issuing.issue(*made, today=now().date(), bind_dongle=partial(dongles.bind, vendor.place, vendor.keys))


@pytest.mark.parametrize("need", ["0", "-1", "9", "true", "1.0", '"some"', '"2"', "[1]"])
def test_numbers_of_pieces_that_no_terms_may_ask_for(need):
    with refusal(UsageError, "TERM_INVALID"):
        parse_terms(terms(need))


def test_more_pieces_than_the_requests_name(vendor, bench, nine, tmp_path):
    kit = Kit(bench, tmp_path / "home", nine[:2])
    with refusal(UsageError, "TERM_INVALID"):
        kit.issue(vendor, terms(3))
