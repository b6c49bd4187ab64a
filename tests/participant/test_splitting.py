"""Train and held-out: by whole groups, by seed, whatever the order of the file."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from participant.data.examples import Example
from participant.data.splitting import split_examples

groups = st.lists(st.integers(0, 12), min_size=1, max_size=60)
fractions = st.floats(0, 0.99)


def example(i: int, group: int, digest: str | None = None) -> Example:
    return Example((), str(i), str(group), digest or f"d{i}")


@settings(max_examples=100, deadline=None)
@given(groups, fractions, st.integers(0, 2**63 - 1), st.randoms(use_true_random=False))
def test_no_group_is_on_both_sides_and_order_in_the_file_does_not_matter(
    of: list[int], fraction: float, seed: int, random: Any
) -> None:
    examples = [example(i, group) for i, group in enumerate(of)]
    split = split_examples(examples, fraction, None, seed)
    train, held = {e.group for e in split.train}, {e.group for e in split.held_out}
    assert train.isdisjoint(held)
    assert len(split.train) + len(split.held_out) == len(examples)
    assert train
    assert bool(held) == (fraction > 0 and len(set(of)) > 1)
    assert len(split.held_out) >= fraction * len(examples) or len(train) == 1
    shuffled = random.sample(examples, len(examples))
    again = split_examples(shuffled, fraction, None, seed)
    assert again.held_out == split.held_out
    assert set(again.train) == set(split.train)


@settings(max_examples=50, deadline=None)
@given(groups, fractions, st.integers(1, 5))
def test_a_limit_keeps_the_first_of_the_held_out_and_trains_on_none_of_the_rest(
    of: list[int], fraction: float, limit: int
) -> None:
    examples = [example(i, group) for i, group in enumerate(of)]
    whole = split_examples(examples, fraction, None, 1)
    limited = split_examples(examples, fraction, limit, 1)
    assert limited.held_out == whole.held_out[:limit]
    assert limited.train == whole.train


def test_the_seed_decides_which_groups_are_held_out() -> None:
    examples = [example(i, i) for i in range(50)]
    held = {split_examples(examples, 0.2, None, seed).held_out for seed in range(5)}
    assert len(held) == 5
    assert all(len(side) == 10 for side in held)


def test_the_split_of_a_known_table_stays_what_it_was() -> None:
    """A golden split: another order would silently train on what was held out before."""
    examples = [example(i, i // 2) for i in range(12)]
    split = split_examples(examples, 0.5, None, 1)
    assert [e.answer for e in split.held_out] == ["6", "7", "2", "5", "4", "3"]
