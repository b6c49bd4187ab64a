"""Who holds which text: three sides by question, and shards of the training side by policy.

Nothing depends on the order in which questions come: every choice goes by a sha256 of seed and
question. Only Dirichlet's shares are numpy's draws, which another numpy may draw otherwise.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shared.errors import ConfigError, DataError
from shared.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from cli.reproduction.presets import ReproduceSection
    from cli.reproduction.questions import Question

TRAIN, DEV = 0.7, 0.1  # test has the rest
_WORD = re.compile(r"\w+")


class Sides(NamedTuple):
    """Questions of the three sides, each in the seed's order."""

    train: list[Question]
    dev: list[Question]
    test: list[Question]


def draw(questions: Sequence[Question], section: ReproduceSection) -> list[Question]:
    """The questions of the wanted fields, as many as wanted, in the seed's order.

    Raises DataError for a field that is not there, or too few.
    """
    wanted = questions
    if section.fields is not None and any(question.label for question in questions):
        known = {question.label for question in questions}
        unknown = sorted(set(section.fields) - known)
        if unknown:
            raise DataError(
                f"reproduce.fields: expected some of {', '.join(sorted(known))}, got {unknown[0]!r}"
            )
        wanted = [question for question in questions if question.label in section.fields]
    if section.examples is not None and len(wanted) < section.examples:
        raise DataError(
            f"reproduce.examples: expected at least {section.examples} questions, got "
            f"{len(wanted)}; lower it or give more text"
        )
    return _shuffled(wanted, section.split_seed, "draw")[: section.examples]


def split(questions: Sequence[Question], seed: int, least: int) -> Sides:
    """70 % to train on, 10 % to choose on, the rest to test on.

    ``least``: examples that training needs, so that nobody is left without. Raises DataError for
    fewer, or where a side would be empty.
    """
    order = _shuffled(questions, seed, "split")
    first = math.floor(TRAIN * len(order))
    second = first + math.floor(DEV * len(order))
    sides = Sides(order[:first], order[first:second], order[second:])
    if len(sides.train) < least or not sides.dev:
        raise DataError(
            f"text: expected at least {max(math.ceil(least / TRAIN), 10)} questions, got "
            f"{len(order)}: 70 % are trained on ({least} needed: one for each participant and "
            "batch), 10 % choose the learning rate, 20 % are held out; give more text or lower "
            "reproduce.participants"
        )
    return sides


def deal(
    questions: Sequence[Question], section: ReproduceSection, seed: int, alpha: float | None = None
) -> list[list[Question]]:
    """The training side dealt out to the participants. ``alpha``: Dirichlet, whatever the preset.

    Nobody is left without: whoever has fewer than a batch gets one question after the other from
    whoever has most. Raises ConfigError where the text has no labels or groups to go by.
    """
    policy = "dirichlet" if alpha is not None else section.partition
    order = _shuffled(questions, seed, "deal")
    count = section.participants
    match policy:
        case "iid":
            shards = [order[start::count] for start in range(count)]
        case "dirichlet":
            shards = _dirichlet(order, count, alpha or section.alpha or 1.0, seed)
        case "by-label":
            shards = _whole(order, count, "label", policy)
        case "by-group":
            shards = _whole(order, count, "group", policy)
    return _topped_up(shards, min(section.batch_sizes))


def distance(texts: Sequence[Iterable[Hashable]]) -> float:
    """Jensen-Shannon distance of several texts' unigram distributions, each of equal weight.

    The square root of H(mean of P_i) - mean of H(P_i), in bits, divided by its largest value
    log2(K) (Lin 1991, IEEE Trans. Inf. Theory 37(1)): 0 for equal texts, 1 where no two share a
    word.
    """
    counts = [Counter(text) for text in texts]
    shares = [
        {unit: count / counter.total() for unit, count in counter.items()} for counter in counts
    ]
    mean: defaultdict[Hashable, float] = defaultdict(float)
    for share in shares:
        for unit, part in share.items():
            mean[unit] += part / len(shares)
    divergence = _entropy(mean.values()) - math.fsum(
        map(_entropy, (s.values() for s in shares))
    ) / len(shares)
    return math.sqrt(max(divergence, 0.0) / math.log2(len(shares))) if len(shares) > 1 else 0.0


def words(questions: Iterable[Question]) -> list[str]:
    """The words of prompts and answers, without case."""
    return [
        word for one in questions for word in _WORD.findall(f"{one.prompt} {one.answer}".casefold())
    ]


def _entropy(shares: Iterable[float]) -> float:
    return -math.fsum(share * math.log2(share) for share in shares if share)


def _shuffled(questions: Sequence[Question], seed: int, purpose: str) -> list[Question]:
    return sorted(questions, key=lambda one: (derive_seed(seed, purpose, one.key), one.key))


def _dirichlet(order: list[Question], count: int, alpha: float, seed: int) -> list[list[Question]]:
    """Each label's questions by shares from Dirichlet(alpha) (Hsu et al., arXiv:1909.06335)."""
    _require(order, "label", "dirichlet")
    shards: list[list[Question]] = [[] for _ in range(count)]
    for label in sorted({one.label for one in order}):
        mine = [one for one in order if one.label == label]
        draws = np.random.Generator(np.random.Philox(key=derive_seed(seed, "dirichlet", label)))
        ends = np.rint(np.cumsum(draws.dirichlet([alpha] * count)) * len(mine)).astype(int)
        begin = 0
        for shard, end in zip(shards, [*ends[:-1], len(mine)], strict=True):
            shard.extend(mine[begin:end])
            begin = max(begin, int(end))
    return shards


def _whole(order: list[Question], count: int, column: str, policy: str) -> list[list[Question]]:
    """Whole labels or groups, the largest first, each to whom has least."""
    _require(order, column, policy)
    sizes = Counter(getattr(one, column) for one in order)
    shards: list[list[Question]] = [[] for _ in range(count)]
    for value, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        least = min(shards, key=len)
        least += [one for one in order if getattr(one, column) == value]
    return shards


def _require(order: Sequence[Question], column: str, policy: str) -> None:
    if any(not getattr(one, column) for one in order):
        raise ConfigError(
            f'reproduce.partition = "{policy}": expected a {column} for each question, found some '
            f'without; give the text a column {column}, or use partition = "iid"'
        )


def _topped_up(shards: list[list[Question]], least: int) -> list[list[Question]]:
    while len(smallest := min(shards, key=len)) < least:
        smallest.append(max(shards, key=len).pop())
    return shards
