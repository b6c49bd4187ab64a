"""Train, dev and test share nothing; subsets are drawn by a seed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradualdiff.reproduction.questions import Question
from gradualdiff.reproduction.splits import split, subset
from shared.errors import ConfigError, DataError


def questions(count: int, labels: str = "a") -> list[Question]:
    """Question i with label i modulo the labels."""
    return [Question(f"What is {i}?", f"number {i}", labels[i % len(labels)]) for i in range(count)]


@settings(deadline=None)
@given(count=st.integers(10, 200), seed=st.integers(0, 2**63 - 1))
def test_every_question_is_on_exactly_one_side(count, seed):
    """70/10/20, whatever the seed; a second row of one question is on no side."""
    rows = [*questions(count), Question("what is 3", "three")]
    made = split(rows, seed)
    sides = [q.key for side in (made.train, made.dev, made.test) for q in side]
    assert Counter(sides) == Counter({q.key for q in rows})
    assert (len(made.dev), len(made.test)) == (count // 10, count // 5)
    assert (made.duplicates, made.seed) == (1, seed)


def test_the_seed_alone_decides():
    """The order of the rows does not; another seed is another split."""
    rows = questions(50)
    assert split(rows, 1) == split(rows[::-1], 1)
    assert set(split(rows, 1).test) != set(split(rows, 2).test)


def test_the_split_of_today_is_the_split_of_tomorrow():
    """Golden: recorded seeds are worth nothing if their meaning changes."""
    made = split(questions(10), 1)
    assert [q.prompt for q in (*made.dev, *made.test)] == [f"What is {i}?" for i in (1, 9, 2)]


def test_too_few_questions_are_refused_by_the_rule():
    """Nine rows, and ten rows of nine questions."""
    for rows in (questions(9), [*questions(9), Question("WHAT IS 3?", "x")]):
        with pytest.raises(DataError, match=r"70/10/20 split: expected at least 10 .* got 9"):
            split(rows, 1)


def test_a_subset_keeps_the_shares_of_its_labels():
    """Largest remainder: 50, 30 and 20 of 100 are 4, 2 (2.1) and 1 (1.4) of 7."""
    rows = questions(100, "aaaaabbbcc")
    drawn = subset(rows, 7, 1)
    assert Counter(q.label for q in drawn) == {"a": 4, "b": 2, "c": 1}
    assert drawn == [q for q in rows if q in drawn]
    assert drawn == subset(rows, 7, 1)
    assert drawn != subset(rows, 7, 2)


def test_chosen_labels_may_share_equally():
    """The first by name gets the odd one."""
    drawn = subset(questions(100, "aaaaabbbcc"), 9, 1, labels={"c", "a"}, share="equal")
    assert Counter(q.label for q in drawn) == {"a": 5, "c": 4}


def test_questions_without_labels_have_subsets_too():
    """They are one stratum."""
    rows = [Question(f"What is {i}?", "x") for i in range(20)]
    assert len(subset(rows, 5, 1)) == 5


def test_a_drawn_set_is_split_like_any_other():
    """One seed for both: what is drawn first is not what is tested on."""
    rows = questions(1000)
    drawn = subset(rows, 100, 1)
    places = [i for i, q in enumerate(drawn) if q in split(drawn, 1).test]
    assert len(places) == 20
    whole_test = set(split(rows, 1).test)
    assert 5 < len(whole_test & set(drawn)) < 40


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"count": 0}, ConfigError, "1 or more"),
        ({"count": 101}, DataError, "got 100 in all"),
        ({"count": 90, "share": "equal"}, DataError, "20 of 30 of c"),
        ({"count": 5, "labels": {"a", "x"}}, ConfigError, "got x; choose of: a, b, c"),
        ({"count": 25, "labels": {"c"}}, DataError, "got 20 in all"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, error, says):
    """The rule and the counts are named."""
    with pytest.raises(error, match=says):
        subset(questions(100, "aaaaabbbcc"), seed=1, **arguments)
