"""Norm clipping by hand, its edges, and what it can never do."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.round.clipping import scales

NORM = st.one_of(st.just(0.0), st.floats(1e-45, 1e30))  # what a delta of fp32 values can have


def test_a_norm_above_the_bound_is_scaled_to_it():
    """Median 2, bound 3 x 2 = 6: 24 is scaled by 6 / 24, and 6 itself not at all."""
    norms = {"e": 24.0, "a": 1.0, "b": 2.0, "c": 2.0, "d": 6.0}
    assert scales(3.0, norms) == {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 0.25}
    assert list(scales(3.0, norms)) == ["a", "b", "c", "d", "e"]


def test_an_even_number_has_the_mean_of_the_two_in_the_middle():
    """1, 2, 4, 100: median 3, so 100 is scaled to 1 x 3."""
    assert scales(1.0, {"a": 1.0, "b": 2.0, "c": 4.0, "d": 100.0})["d"] == 0.03


@pytest.mark.parametrize(
    "norms",
    [
        {},
        {"a": 5.0},
        {"a": 1.0, "b": 1e9},  # nobody can say which one is unusual
        {"a": 0.0, "b": 0.0, "c": 7.0},  # most did not move: a factor of 0 would silence the other
        {"a": 0.0, "b": 0.0, "c": 0.0},
        {"a": 0.0, "b": 1.0, "c": 1.0},
    ],
)
def test_where_no_norm_is_usual_nothing_is_clipped(norms):
    assert scales(1.0, norms) == dict.fromkeys(norms, 1.0)


def test_off_is_off():
    assert scales("off", {"a": 1.0, "b": 1.0, "c": 1e9}) == {"a": 1.0, "b": 1.0, "c": 1.0}


@given(st.floats(1, 1e6), st.dictionaries(st.text("abcdef", min_size=1), NORM, min_size=3))
def test_nothing_exceeds_the_bound_and_nothing_below_it_is_touched(limit, norms):
    """Every factor is above 0 and at most 1, as the record demands; clipped: on the bound."""
    bound = limit * statistics.median(norms.values())
    for label, scale in scales(limit, norms).items():
        assert 0 < scale <= 1
        if norms[label] <= bound or bound == 0:
            assert scale == 1
        else:
            assert math.isclose(scale * norms[label], bound, rel_tol=1e-12)
