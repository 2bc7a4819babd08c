"""Terms: what is not enforced is not issued."""

import datetime

import pytest

from hwlicense.core.documents import Grant, PackageReference
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
        '[require]\nbindings = "any"',
        '[presence]\ninterval = "10s"',
        '[continuity]\nsession = "8h"',
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
    ["colour = 1", "[validity]\nuntil = 2027-12-31", "[limits]\nopenings = 3", "[require]\npcr = []", "[presence]"],
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
