"""Terms that say something in vain: what can never be meant is refused, what may be meant is pointed out."""

from __future__ import annotations

import datetime

import pytest

from hwlicense.core.errors import Reason, UsageError
from hwlicense.core.oddities import oddities
from hwlicense.core.terms import parse_terms
from tests.world import TERMS

MONITOR = "[monitor]\nthrottled = '10/minute'\n[monitor.regularity]\naction = 'throttle'\n"
REGULAR = "[monitor.regularity]\ncalls = 100\naction = 'deny'\n"
DISTANT = "[monitor.distances]\nfeatures = 4\naction = 'deny'\n"
TODAY = datetime.date(2026, 6, 1)


def odd(text: str) -> list[str]:
    return oddities(parse_terms(TERMS + text), TODAY)


@pytest.mark.parametrize(
    ("rates", "vain"),
    [
        (("10/minute", "100000/hour"), "100000/hour"),
        (("1/second", "100000/day"), "100000/day"),
        (("10/minute", "601/hour"), "601/hour"),
        (("10/minute", "600/hour"), "600/hour"),
        (("10/7s", "20/10s"), "20/10s"),
    ],
)
def test_a_longer_rate_that_shorter_ones_never_fill(rates, vain):
    for given in (rates, rates[::-1]):
        with pytest.raises(UsageError) as error:
            odd(f"[limits]\nrates = {list(given)}")
        assert error.value.reason == Reason.TERM_INVALID
        assert f"{vain!r} never limits anything" in error.value.what
    assert not odd("[limits]\nrates = ['10/minute', '599/hour']")
    assert not odd("[limits]\nrates = ['10/7s', '19/10s']")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[validity]\nnot_after = 2026-05-31", "ends before it is issued (2026-05-31)"),
        ("[validity]\nnot_after = 2026-07-01\ndays_from_first_use = 30", "days_from_first_use (30) never ends before"),
        (
            "[validity]\nnot_before = 2026-06-11\nnot_after = 2026-06-20\ndays_from_first_use = 9",
            "days_from_first_use (9) never ends before",
        ),
        ("[limits]\ninferences = 5\nrates = ['10/hour']", "'10/hour' never limits anything beside limits.inferences"),
        ("[limits]\ninferences = 10\nrates = ['10/hour']", "'10/hour' never limits anything beside limits.inferences"),
        ("[limits]\nopens = 5\ninstances = 10", "limits.instances = 10 are never reached by limits.opens = 5"),
        ("[limits]\nrates = []", "limits.rates is empty: no time frame limits use."),
        ("[features]", "features is empty: the application finds none."),
        ("[require]\npcrs = []", "require.pcrs is empty: the license opens in any state of the platform."),
        (MONITOR + "[limits]\nrates = ['5/minute']", "monitor.throttled: '10/minute' never limits anything beside"),
        (
            MONITOR + "[limits]\nrates = ['9/hour']",
            "monitor.throttled: '10/minute' never limits anything beside '9/hour'",
        ),
        (REGULAR + "[limits]\ninferences = 99", "monitor.regularity.calls = 100 are never reached by limits.inf"),
        (DISTANT + "[limits]\ninferences = 99", "monitor.distances.queries = 100 are never reached by limits.inf"),
        ("[continuity]\nsession = '3h'\n[limits]\npowered_on_hours = 2", "continuity.session ('3h') is longer than"),
        (
            "[continuity]\nsession = '4d'\n[validity]\ndays_from_first_use = 2",
            "continuity.session ('4d') is longer than",
        ),
        (
            "[continuity]\nsession = '3d'\n[validity]\nnot_after = 2026-06-02",
            "continuity.session ('3d') is longer than",
        ),
    ],
)
def test_what_may_be_meant_is_pointed_out(text, words):
    (found,) = odd(text)
    assert words in found
    assert found.endswith(".")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[validity]\nnot_after = 2026-06-01",
        "[validity]\nnot_after = 2026-07-02\ndays_from_first_use = 30",
        "[validity]\nnot_before = 2026-06-11\nnot_after = 2026-06-21\ndays_from_first_use = 9",
        "[limits]\ninferences = 11\nrates = ['10/hour']",
        "[limits]\nopens = 10\ninstances = 10",
        "[limits]\nopens = 10\ninferences = 1",
        MONITOR + "[limits]\nrates = ['11/minute']",
        MONITOR + "[limits]\nrates = ['9/second']",
        REGULAR + "[limits]\ninferences = 100",
        DISTANT + "[limits]\ninferences = 100",
        "[continuity]\nsession = '2h'\n[limits]\npowered_on_hours = 2",
        "[continuity]\nsession = '3d'\n[validity]\ndays_from_first_use = 2",
        "[continuity]\nsession = '2d'\n[validity]\nnot_after = 2026-06-02",
    ],
)
def test_what_is_not_odd(text):
    assert odd(text) == []


def test_days_that_never_begin_are_refused():
    with pytest.raises(UsageError) as error:
        odd("[validity]\nnot_after = 2026-05-31\ndays_from_first_use = 30")
    assert error.value.reason == Reason.TERM_INVALID
    assert "leave days_from_first_use out" in error.value.hint
