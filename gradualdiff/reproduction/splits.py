"""Train, dev and test by question, and smaller sets drawn from large ones.

Pure functions of the questions and a seed. The order is by sha256 of seed and normalised question,
so that it does not depend on the order of the file, on a platform or on a library's version.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from participant.data.splitting import seeded_order
from shared.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from gradualdiff.reproduction.questions import Question

# Per cent of the distinct questions; the rest is to train on.
DEV, TEST = 10, 20
# The fewest that leave a question for dev.
FEWEST = 100 // DEV

Share = Literal["proportional", "equal"]


@dataclass(frozen=True)
class Split:
    """Three parts that share no question, each in the seed's order.

    ``duplicates``: rows left out because an earlier row asks the same question.
    """

    train: tuple[Question, ...]
    dev: tuple[Question, ...]
    test: tuple[Question, ...]
    seed: int
    duplicates: int


def deduplicate(questions: Sequence[Question]) -> list[Question]:
    """The first row of each normalised question, in their order."""
    first: dict[str, Question] = {}
    for question in questions:
        first.setdefault(question.key, question)
    return list(first.values())


def split(questions: Sequence[Question], seed: int) -> Split:
    """70 % train, 10 % dev and 20 % test of the distinct questions; dev and test rounded down.

    Raises DataError for fewer than 10 distinct questions: dev would be empty.
    """
    distinct = deduplicate(questions)
    if len(distinct) < FEWEST:
        raise DataError(
            f"the 70/10/20 split: expected at least {FEWEST} distinct questions, so that train, "
            f"dev and test have one each, got {len(distinct)}; give more text"
        )
    order = _shuffled(distinct, seed, "split")
    dev, test = len(order) * DEV // 100, len(order) * TEST // 100
    return Split(
        train=tuple(order[dev + test :]),
        dev=tuple(order[:dev]),
        test=tuple(order[dev : dev + test]),
        seed=seed,
        duplicates=len(questions) - len(distinct),
    )


def subset(
    questions: Sequence[Question],
    count: int,
    seed: int,
    labels: Collection[str] | None = None,
    share: Share = "proportional",
) -> list[Question]:
    """``count`` distinct questions, in the order they came.

    ``labels``: only of these. ``share``: of each label as many as its part of all
    (``proportional``, largest remainder), or of each the same number (``equal``; the first labels
    by name get one more where it does not divide). Raises ConfigError for a count below 1 or a
    label that no question has, DataError where there are too few.
    """
    if count < 1:
        raise ConfigError(f"a subset: expected 1 or more questions, got {count}; ask for more")
    strata: dict[str, list[Question]] = defaultdict(list)
    distinct = deduplicate(questions)
    for question in distinct:
        if labels is None or question.label in labels:
            strata[question.label or ""].append(question)
    missing = sorted(set(labels or ()) - set(strata))
    if missing:
        known = sorted({q.label for q in distinct if q.label})
        raise ConfigError(
            f"labels: expected labels of these questions, got {', '.join(missing)}; choose of: "
            f"{', '.join(known) or 'none, since no question has a label'}"
        )
    sizes = {label: len(of_label) for label, of_label in strata.items()}
    wanted = (_equal if share == "equal" else _proportional)(sizes, count)
    short = {label: n for label, n in sorted(wanted.items()) if n > sizes[label]}
    if short or sum(wanted.values()) < count:
        said = ", ".join(
            f"{sizes[label]} of {n} of {label or 'no label'}" for label, n in short.items()
        )
        raise DataError(
            f"a subset of {count} questions: expected as many distinct ones, got "
            f"{said or f'{sum(sizes.values())} in all'}; ask for fewer, or give more text"
        )
    chosen: set[str] = set()
    for label, n in wanted.items():
        chosen |= {q.key for q in _shuffled(strata[label], seed, "subset")[:n]}
    return [q for q in distinct if q.key in chosen]


def _shuffled(questions: Sequence[Question], seed: int, purpose: str) -> list[Question]:
    # With its purpose, as a set drawn and split by one seed must not put what was drawn in front.
    return sorted(questions, key=lambda q: seeded_order(seed, f"{purpose} {q.key}"))


def _proportional(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Largest remainder; never more than there are."""
    total = sum(sizes.values())
    if total < count:
        return dict(sizes)
    wanted = {label: count * n // total for label, n in sizes.items()}
    by_remainder = sorted(sizes, key=lambda label: (-(count * sizes[label] % total), label))
    for label in by_remainder[: count - sum(wanted.values())]:
        wanted[label] += 1
    return wanted


def _equal(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    each, more = divmod(count, len(sizes)) if sizes else (0, 0)
    return {label: each + (i < more) for i, label in enumerate(sorted(sizes))}


def counts_by_label(questions: Sequence[Question]) -> Counter[str]:
    """How many questions of each label; those without one under ``""``."""
    return Counter(q.label or "" for q in questions)
