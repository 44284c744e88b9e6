# SPDX-License-Identifier: AGPL-3.0-or-later
"""What samples say of what was missed, against brute force."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.domain.sampling import (
    CONFIDENCE,
    WINDOW_DAYS,
    first_day,
    missed_percent_max,
    sentence,
)

DAY_US = 86_400_000_000


@pytest.mark.parametrize("clean", [1, 2, 3, 10, 59, 1000])
def test_the_bound_is_where_a_clean_sample_is_as_unlikely_as_is_said(clean: int) -> None:
    """Found by halving, with exact numbers: the largest share with which all are clean in one of twenty cases."""
    low, high = Fraction(0), Fraction(1)
    for _ in range(40):
        share = (low + high) / 2
        if (1 - share) ** clean > Fraction(1, 20):
            low = share
        else:
            high = share
    assert missed_percent_max(clean) == pytest.approx(float(100 * low), rel=1e-9)


@pytest.mark.parametrize("clean", [20, 100])
def test_as_often_as_is_said_samples_are_that_clean(clean: int) -> None:
    """With just that share missed, by drawing: in 5 % of the cases, within five deviations."""
    bound = missed_percent_max(clean)
    assert bound is not None
    rng, draws = random.Random(7), 4000
    hits = sum(all(rng.random() * 100 >= bound for _ in range(clean)) for _ in range(draws))
    likely = 1 - CONFIDENCE
    deviation = (draws * likely * (1 - likely)) ** 0.5
    assert abs(hits - draws * likely) < 5 * deviation


@given(st.integers(1, 10**12))
def test_more_samples_never_say_less(clean: int) -> None:
    bound, next_bound = missed_percent_max(clean), missed_percent_max(clean + 1)
    assert bound is not None
    assert next_bound is not None
    assert 0 < next_bound <= bound <= 95.0 + 1e-9
    if clean > 1000:  # the rule of three
        assert bound == pytest.approx(300 / clean, rel=0.01)


def test_nothing_sampled_says_nothing() -> None:
    assert missed_percent_max(0) is None
    assert sentence(0, 0) is None


@given(st.integers(1, 10**9))
def test_what_is_said_is_never_less_than_what_is_known(clean: int) -> None:
    said = sentence(clean, 0)
    assert said is not None
    number = float(said.removeprefix("95 % sure that change tracking missed under ").split(" %")[0])
    bound = missed_percent_max(clean)
    assert bound is not None
    assert bound <= number * (1 + 1e-9)
    assert number <= bound * 1.11


def test_the_sentences() -> None:
    assert sentence(1024, 0) == (
        "95 % sure that change tracking missed under 0.30 % of what it called unchanged"
        " in the last 7 days (1024 samples, all right)"
    )
    for missed, times in ((1, "once"), (2, "twice"), (3, "3 times")):
        assert sentence(1024, missed) == (
            f"change tracking missed changes {times} in the last 7 days (1024 samples were right)"
        )


@given(st.integers(0, 4 * 10**15))
def test_no_sample_of_the_window_is_too_old(now_us: int) -> None:
    began = first_day(now_us)
    days = {first_day(now_us - back * DAY_US) for back in range(WINDOW_DAYS)}
    assert max(days) == began
    # The window's first day began less than seven days ago.
    assert first_day(now_us + DAY_US) > began
    assert first_day(now_us // DAY_US * DAY_US) == began
