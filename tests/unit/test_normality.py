"""The Shapiro-Wilk statistic against published figures and SciPy's."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import shapiro

from hwlicense.core.normality import shapiro_wilk

WEIGHTS = [148, 154, 158, 160, 161, 162, 166, 170, 182, 195, 236]  # Shapiro and Wilk 1965: pounds of eleven men


def test_the_example_of_the_paper():
    assert shapiro_wilk(WEIGHTS) == pytest.approx(0.78881, abs=5e-6)
    assert shapiro_wilk(WEIGHTS[::-1]) == shapiro_wilk(WEIGHTS)


@pytest.mark.parametrize("number", [3, 4, 5, 6, 7, 11, 12, 20, 50, 100, 500, 4096])
def test_it_is_scipys(number):
    generator = random.Random(number)
    draws = (generator.gauss, generator.random, lambda: generator.expovariate(1), lambda: generator.paretovariate(1))
    for draw in draws:
        values = [draw() for _ in range(number)]
        assert shapiro_wilk(values) == pytest.approx(shapiro(values).statistic, abs=1e-8)


@given(st.lists(st.floats(0, 2.0**127, width=32), min_size=3, max_size=50))
def test_it_is_between_nothing_and_one_whatever_the_scale(values):
    assert 0 <= shapiro_wilk(values) <= 1 + 1e-9


def test_what_is_all_the_same_is_not_natural():
    assert shapiro_wilk([2.0] * 20) == 0
    assert shapiro_wilk([0.0] * 19 + [1e-45]) < 0.5
