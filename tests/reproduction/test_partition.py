"""Dealing questions out, and how unlike the parts are."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradualdiff.reproduction.partition import Policy, parse_policy, partition
from gradualdiff.reproduction.questions import Question
from gradualdiff.reproduction.splits import split, subset
from gradualdiff.reproduction.unlikeness import Part, js_distance, measure, words_of
from gradualdiff.reproduction.wordnet import load_questions
from shared.errors import ConfigError, DataError

IID, BY_LABEL, BY_GROUP = Policy("iid"), Policy("by-label"), Policy("by-group")


def questions(count: int, labels: int = 4) -> list[Question]:
    """Question i: label i modulo ``labels``, group i // 5."""
    return [
        Question(f"What is {i}?", f"it is number {i}", f"l{i % labels}", f"g{i // 5}")
        for i in range(count)
    ]


policies = st.one_of(
    st.sampled_from([IID, BY_LABEL, BY_GROUP]),
    st.floats(1e-4, 1e4).map(lambda alpha: Policy("dirichlet", alpha)),
)


@settings(deadline=None)
@given(
    policy=policies,
    count=st.integers(20, 80),
    participants=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_every_question_is_at_exactly_one_participant(policy, count, participants, seed):
    """None is lost, none is doubled, nobody goes without, and dev and test are at nobody's."""
    made = split(questions(count), seed)
    dealt = partition(made.train, participants, policy, seed)
    keys = [q.key for part in dealt.parts for q in part]
    assert Counter(keys) == Counter(q.key for q in made.train)
    assert len(dealt.parts) == participants
    assert all(dealt.parts)
    assert not set(keys) & {q.key for q in (*made.dev, *made.test)}
    if policy.kind in {"iid", "dirichlet"}:
        sizes = [len(part) for part in dealt.parts]
        assert max(sizes) - min(sizes) <= 1
    assert dealt == partition(made.train, participants, policy, seed)


@pytest.mark.parametrize("policy", [IID, Policy("dirichlet", 0.5)])
def test_another_seed_deals_otherwise(policy):
    """Where chance decides at all."""
    first, second = (partition(questions(60), 3, policy, seed).parts for seed in (1, 2))
    assert first != second


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (IID, [0, 1, 5, 6, 7, 11]),
        (Policy("dirichlet", 0.1), [1, 2, 6, 8, 9, 10]),
        (Policy("dirichlet", 100), [2, 3, 4, 6, 8, 10]),
    ],
)
def test_the_parts_of_today_are_the_parts_of_tomorrow(policy, expected):
    """Golden: which numbers of 12 the first of two participants has."""
    first = partition(questions(12), 2, policy, 1).parts[0]
    assert [int(q.prompt.split()[-1].strip("?")) for q in first] == expected


def test_whole_labels_and_groups_stay_together():
    """Largest first, each to whom has least: 30, 20, 10 and 10 of two participants."""
    rows_ = [
        Question(f"{v} {i}", "x", v, v)
        for v, n in zip("abcd", (30, 20, 10, 10), strict=True)
        for i in range(n)
    ]
    for policy in (BY_LABEL, BY_GROUP):
        parts = partition(rows_, 2, policy, 1).parts
        assert [sorted({q.label for q in part}) for part in parts] == [["a", "d"], ["b", "c"]]


@pytest.mark.parametrize("policy", [IID, Policy("dirichlet", 0.3)])
def test_sizes_may_be_given(policy):
    """Unlike mixtures and unlike sizes are two things."""
    dealt = partition(questions(20), 3, policy, 1, sizes=[2, 6, 12])
    assert [len(part) for part in dealt.parts] == [2, 6, 12]


def test_a_small_alpha_makes_labels_unlike_and_a_large_one_does_not():
    """Mean over seeds, as one draw may be anything."""

    def distance(policy):
        return statistics.mean(
            measure(partition(questions(400), 4, policy, seed)).labels for seed in range(5)
        )

    tiny, small, large = (distance(Policy("dirichlet", a)) for a in (1e-6, 0.5, 1e6))
    assert tiny > small + 0.05 > 2 * large
    assert abs(large - distance(IID)) < 0.1


def test_shares_follow_the_dirichlet_law():
    """The first question's label over many seeds: its mean is the prior, 1:3."""
    rows_ = [Question(str(i), "x", "rare" if i % 4 == 0 else "common") for i in range(40)]
    firsts = Counter()
    variance = []
    for seed in range(300):
        part = partition(rows_, 2, Policy("dirichlet", 2.0), seed, sizes=[8, 32]).parts[0]
        share = sum(q.label == "rare" for q in part) / 8
        firsts["rare"] += share
        variance.append(share)
    assert abs(firsts["rare"] / 300 - 0.25) < 0.04
    # Beta(0.5, 1.5): variance 1/16; beside it the draw of 8 by that share, 1/8 (3/16 - 1/16).
    assert abs(statistics.pvariance(variance) - (1 / 16 + 1 / 64)) < 0.02


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("iid", IID),
        (" by-group ", BY_GROUP),
        ("by-label", BY_LABEL),
        ("dirichlet(0.1)", Policy("dirichlet", 0.1)),
        ("dirichlet(1e-3)", Policy("dirichlet", 0.001)),
    ],
)
def test_policies_are_read_and_written(text, policy):
    """What is recorded can be read back."""
    assert parse_policy(text) == policy
    assert parse_policy(str(policy)) == policy


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dirichlet",
        "dirichlet(0)",
        "dirichlet(-1)",
        "dirichlet(e)",
        "dirichlet(1e999)",
        "random",
    ],
)
def test_another_policy_is_refused(text):
    """With the forms that there are."""
    with pytest.raises(ConfigError, match="expected iid, dirichlet"):
        parse_policy(text)


@pytest.mark.parametrize(
    ("policy", "arguments", "error", "says"),
    [
        (IID, {"participants": 0}, ConfigError, "1 or more"),
        (IID, {"fewest": 6}, DataError, r"at least 6 .*\(one batch\) for each of 4 .* got 5"),
        (Policy("dirichlet", 1), {"fewest": 6}, DataError, "got 5"),
        (BY_LABEL, {"fewest": 6}, DataError, "got 5"),
        (BY_LABEL, {"participants": 5}, DataError, "got 4 labels for 5"),
        (BY_GROUP, {"participants": 6}, DataError, "got 4 groups for 6"),
        (BY_GROUP, {"sizes": [5, 5, 5, 5]}, ConfigError, "whole groups are dealt"),
        (IID, {"sizes": [5, 5, 5, 4]}, ConfigError, "sum to 19"),
        (IID, {"sizes": [20]}, ConfigError, "expected 4"),
    ],
)
def test_what_cannot_be_dealt_is_refused(policy, arguments, error, says):
    """The rule and the counts are named."""
    with pytest.raises(error, match=says):
        partition(questions(20), **{"participants": 4, "policy": policy, "seed": 1, **arguments})


@pytest.mark.parametrize("policy", [BY_LABEL, BY_GROUP, Policy("dirichlet", 1)])
def test_a_policy_by_labels_needs_labels(policy):
    """Without them nothing is dealt by chance instead."""
    what = "group" if policy == BY_GROUP else "label"
    with pytest.raises(DataError, match=f"expected a {what} with every question"):
        partition([Question("q", "a")], 1, policy, 1)


def test_the_distance_of_texts_that_share_nothing_is_1_and_of_equal_ones_0():
    """For two, for three, and for parts of very different size."""
    assert js_distance([{"a": 1}, {"b": 7}]) == 1
    assert js_distance([{"a": 1}, {"b": 7}, {"c": 2, "d": 1}]) == pytest.approx(1, abs=1e-12)
    assert js_distance([{"a": 1, "b": 2}, {"a": 30, "b": 60}]) == pytest.approx(0, abs=1e-7)
    assert js_distance([{"a": 1}]) is None
    with pytest.raises(ValueError, match="without a single count"):
        js_distance([{"a": 1}, {}])


def test_the_distance_by_hand():
    """P = (1, 0), Q = (1/2, 1/2): H(3/4, 1/4) - 1/2 = 0.81128 - 0.5 bits, its root 0.55792."""
    assert js_distance([{"a": 1}, {"a": 1, "b": 1}]) == pytest.approx(0.5579230452841438)
    # Two alike and one apart: H(2/3, 1/3) / log2 3.
    expected = math.sqrt((math.log2(3) - 2 / 3) / math.log2(3))
    assert js_distance([{"a": 1}, {"a": 5}, {"b": 1}]) == pytest.approx(expected)


def test_words_are_counted_without_case_and_punctuation():
    """In prompts and answers alike."""
    assert words_of([Question("What is it?", "It is.")]) == {"what": 1, "is": 2, "it": 2}


def test_a_measure_says_who_has_what():
    """Sizes, answer words and the largest label of each; distances of words and labels."""
    rows_ = [Question(f"{v} {i}", f"{v}{v} {v}x", v) for v in "ab" for i in range(2)]
    found = measure(partition(rows_, 2, BY_LABEL, 1))
    assert found.parts == (Part(1, 2, 4, 1, "a", 1.0), Part(2, 2, 4, 1, "b", 1.0))
    assert found.labels == 1
    assert found.words_if_iid < found.words < 1
    assert (found.policy, found.seed) == ("by-label", 1)
    unlabelled = measure(partition([Question("q", "a b"), Question("r", "c")], 2, IID, 1))
    assert unlabelled.labels is None
    assert [p.largest_label for p in unlabelled.parts] == [None, None]


FIELDS = [f"noun.{name}" for name in ("animal", "artifact", "food", "person", "plant")]
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "non-iid.md"


def test_the_table_in_the_docs_is_what_wordnet_gives():
    """Each row of the page's table, from the real files."""
    train = split(subset(load_questions().questions, 1000, 1, FIELDS, "equal"), 1).train
    found = []
    for name in ("iid", "dirichlet(100)", "dirichlet(1)", "dirichlet(0.1)", "by-label"):
        told = measure(partition(train, 5, parse_policy(name), 1))
        sizes = sorted(part.questions for part in told.parts)
        size = f"{sizes[0]} each" if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"
        numbers = " | ".join(f"{n:.3f}" for n in (told.words, told.words_if_iid, told.labels))
        found.append(f"| `{name}` | {numbers} | {size} |")
    page = PAGE.read_text()
    assert [row for row in found if row not in page] == []


def test_alike_is_zero_and_not_minus_zero():
    assert str(js_distance([{"a": 3}, {"a": 5}])) == "0.0"
