"""Durations and rates as people read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwlicense.core.durations import of_rate, spelled, waiting
from hwlicense.core.limits import Rate
from hwlicense.core.terms import parse_terms
from tests.world import TERMS


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.01, "0.1 s"), (0.7, "0.7 s"), (9.81, "9.9 s"), (10, "10 s"), (10.01, "11 s"), (59.5, "1 min"),
        (60, "1 min"), (125, "2 min 5 s"), (3600, "1 h"), (3601, "1 h 1 min"), (3661, "1 h 2 min"), (86399, "1 d"),
        (90000, "1 d 1 h"), (5000 * 86400.0, "5,000 d"),
    ],
)  # fmt: skip
def test_waits(seconds, text):
    assert waiting(seconds) == text


def test_what_terms_say_is_spelled_whole():
    assert spelled(86400 + 3600 + 60 + 1) == "1 d 1 h 1 min 1 s"
    assert spelled(28800) == "8 h"


@pytest.mark.parametrize("text", ["60/minute", "1/second", "100/hour", "1000/day", "5/week", "5/90s", "9/2d", "7/90m"])
def test_rates_are_shown_as_they_are_written(text):
    (rate,) = parse_terms(f"{TERMS}[limits]\nrates = ['{text}']").granted_use.limits.rates
    assert of_rate(rate) == text


@given(st.integers(1, 2**53 - 1), st.integers(1, 366 * 86400))
def test_any_rate_that_is_shown_can_be_written(count, seconds):
    rate = Rate(count, seconds)
    assert parse_terms(f"{TERMS}[limits]\nrates = ['{of_rate(rate)}']").granted_use.limits.rates == [rate]
