"""Terms: what is not enforced is not issued."""

import datetime

import pytest

from hwlicense.core.documents import Grant, PackageReference, Presence
from hwlicense.core.errors import HwlicenseError, Reason
from hwlicense.core.terms import check_validity, parse_terms

BASE = 'licensee = "Acme Robotics"\nproduct = "label-reader"\n'


def refusal(text):
    with pytest.raises(HwlicenseError) as caught:
        parse_terms(text)
    assert caught.value.hint or "longer" in caught.value.what
    return caught.value.reason


def test_what_this_release_enforces():
    terms = parse_terms(
        BASE
        + "[validity]\nnot_before = 2026-12-01\nnot_after = 2027-12-31\n"
        + '[require]\npcrs = ["sha256:7,4"]\nbindings = "all"\n'
    )
    assert terms.validity.not_after == datetime.date(2027, 12, 31)
    assert str(terms.selection) == "sha256:4,7"
    assert parse_terms(BASE).require.pcrs == []


@pytest.mark.parametrize(
    "term",
    [
        "[validity]\ndays_from_first_use = 30",
        "[limits]\nopens = 1000",
        "[limits]\ninferences = 1",
        '[limits]\nrates = ["100/hour"]',
        "[limits]\npowered_on_hours = 1",
        "[limits]\ninstances = 2",
        "[require]\nanchor = true",
        "[features]\nx = 1",
        "[features]",
        "[monitor]\nx = 1",
        "[guard]\nx = 1",
    ],
)
def test_a_term_that_is_not_enforced_is_an_error(term):
    assert refusal(BASE + term + "\n") == Reason.TERM_UNSUPPORTED


@pytest.mark.parametrize(
    "term",
    [
        "colour = 1",
        "[validity]\nuntil = 2027-12-31",
        "[limits]\nopenings = 3",
        "[require]\npcr = []",
        '[presence]\ninterval = "1s"\nx = 1',
    ],
)
def test_an_unknown_term_is_an_error(term):
    assert refusal(BASE + term + "\n") in {Reason.TERM_UNKNOWN, Reason.TERM_UNSUPPORTED}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "licensee = 3\nproduct = 'x'\n",
        "licensee = ''\nproduct = 'x'\n",
        "product = 'x'\n",
        BASE + "validity = 3\n",
        BASE + "limits = 3\n",
        BASE + "[presence]\n",
        BASE + "[presence]\ninterval = 10\n",
        BASE + "[presence]\ninterval = '0s'\n",
        BASE + "[presence]\ninterval = '10'\n",
        BASE + "[presence]\ninterval = '10 s'\n",
        BASE + "[presence]\ninterval = '-1s'\n",
        BASE + "[presence]\ninterval = '2d'\n",
        BASE + "[presence]\ninterval = '10s'\ngrace = '32d'\n",
        BASE + "[presence]\ninterval = '10s'\nregain = '1d'\n",
        BASE + "[presence]\ninterval = '10s'\nanswers = 0\n",
        BASE + "[presence]\ninterval = '10s'\nanswers = 16385\n",
        BASE + "[continuity]\nsession = '0h'\n",
        BASE + "[continuity]\n",
        BASE + "[require]\nbindings = 'both'\n",
        BASE + "[require]\nbindings = 0\n",
        BASE + "[require]\nbindings = 9\n",
        BASE + "[require]\nbindings = true\n",
        BASE + "[validity]\nnot_after = '2027'\n",
        BASE + "[validity]\nnot_after = 2027-12-31T00:00:00Z\n",
        BASE + "[validity]\nnot_before = 2027-12-31\nnot_after = 2027-12-30\n",
        BASE + "[require]\npcrs = 'sha256:7'\n",
        BASE + BASE,
        "\0",
        "a = " + "[" * 30_000,
        "#" * 100_000,
    ],
)
def test_bad_terms(text):
    assert refusal(text) in {Reason.TERM_INVALID, Reason.TERM_UNKNOWN}


def test_presence_and_continuity_are_granted_in_seconds():
    table = "[presence]\ninterval = '10s'\ngrace = '5m'\nregain = '30d'\nrepeat = false\n[continuity]\nsession = '8h'\n"
    terms = parse_terms(BASE + table)
    assert terms.granted_presence == Presence(interval=10, grace=300, regain=30 * 86400, repeat=False)
    assert terms.granted_continuity == 8 * 3600
    assert parse_terms(BASE).granted_presence is None
    assert parse_terms(BASE).granted_continuity is None


@pytest.mark.parametrize(("bindings", "count", "need"), [('"all"', 3, 3), ('"any"', 3, 1), ("2", 3, 2), ("8", 8, 8)])
def test_how_many_bindings_it_takes(bindings, count, need):
    assert parse_terms(BASE + f"[require]\nbindings = {bindings}\n").require.need(count) == need


def test_more_bindings_than_there_are():
    with pytest.raises(HwlicenseError) as caught:
        parse_terms(BASE + "[require]\nbindings = 3\n").require.need(2)
    assert caught.value.reason == Reason.TERM_INVALID


@pytest.mark.parametrize("pcrs", ["sha1:7", "sha256:24", "sha256:7,7", "sha256", "sha256:x", ""])
def test_pcrs_that_select_nothing(pcrs):
    assert refusal(BASE + f'[require]\npcrs = ["{pcrs}"]\n') == Reason.USAGE


@pytest.mark.parametrize("index", [16, 21, 22, 23])
def test_pcrs_that_bind_to_nothing(index):
    assert refusal(BASE + f'[require]\npcrs = ["sha256:{index}"]\n') == Reason.PCR_UNUSABLE


def test_both_days_are_included():
    first, last = datetime.date(2026, 12, 1), datetime.date(2027, 12, 31)
    package = PackageReference("a", "1", "33" * 16)
    grant = Grant("11" * 16, 1, "22" * 32, "Acme", "p", 1, [package], first, first, last, [])
    for day in (first, last):
        check_validity(grant, day)
    one = datetime.timedelta(days=1)
    for day, reason in ((first - one, Reason.LICENSE_NOT_YET_VALID), (last + one, Reason.LICENSE_EXPIRED)):
        with pytest.raises(HwlicenseError) as caught:
            check_validity(grant, day)
        assert caught.value.reason == reason
