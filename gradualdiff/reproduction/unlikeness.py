"""How unlike the participants' texts are: Jensen-Shannon distances."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradualdiff.reproduction.partition import Policy, partition
from gradualdiff.reproduction.splits import counts_by_label

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradualdiff.reproduction.partition import Partition
    from gradualdiff.reproduction.questions import Question

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Part:
    """One participant. ``answer_words``: what is to be learnt. ``share``: of its largest label."""

    participant: int
    questions: int
    answer_words: int
    labels: int
    largest_label: str | None
    share: float | None


@dataclass(frozen=True)
class Unlikeness:
    """What was dealt. Distances: 0 alike, 1 nothing in common; None with one participant.

    ``words``: of the texts. ``words_if_iid``: of the same sizes dealt by chance, since small
    samples of one text differ too. ``labels``: of the labels; None where there are none.
    """

    policy: str
    seed: int
    parts: tuple[Part, ...]
    words: float | None
    words_if_iid: float | None
    labels: float | None


def measure(dealt: Partition) -> Unlikeness:
    """Sizes and distances of a partition."""
    everything = [q for part in dealt.parts for q in part]
    sizes = [len(part) for part in dealt.parts]
    chance = partition(everything, len(sizes), Policy("iid"), dealt.seed, sizes=sizes)
    labelled = all(q.label is not None for q in everything)
    by_label = [counts_by_label(part) for part in dealt.parts]
    return Unlikeness(
        policy=str(dealt.policy),
        seed=dealt.seed,
        parts=tuple(_part(i, part) for i, part in enumerate(dealt.parts, start=1)),
        words=js_distance([words_of(part) for part in dealt.parts]),
        words_if_iid=js_distance([words_of(part) for part in chance.parts]),
        labels=js_distance(by_label) if labelled else None,
    )


def words_of(questions: Sequence[Question]) -> Counter[str]:
    """How often each word is in prompts and answers; letter case does not count."""
    return Counter(
        word for q in questions for word in _WORD.findall(f"{q.prompt} {q.answer}".casefold())
    )


def js_distance(counts: Sequence[Mapping[str, int]]) -> float | None:
    """Generalised Jensen-Shannon distance of K distributions, each with weight 1/K, in [0, 1].

    sqrt((H(mean of P_i) - mean of H(P_i)) / log2 K), H the entropy in bits. The divergence of K
    distributions that share nothing is log2 K, so 1 means nothing in common for every K; for two
    it is the usual base-2 distance. Every participant weighs the same, however much text it has.
    None for fewer than two distributions. Raises ValueError for an empty one.
    """
    if len(counts) < 2:
        return None
    totals = [sum(c.values()) for c in counts]
    if not all(totals):
        raise ValueError("a distribution without a single count")
    shares = [
        {key: n / total for key, n in c.items()} for c, total in zip(counts, totals, strict=True)
    ]
    mixed: dict[str, list[float]] = {}
    for share in shares:
        for key, p in share.items():
            mixed.setdefault(key, []).append(p / len(counts))
    mixture = _entropy([math.fsum(terms) for terms in mixed.values()])
    apart = math.fsum(_entropy(list(share.values())) for share in shares) / len(counts)
    divergence = (mixture - apart) / math.log2(len(counts))
    return math.sqrt(min(max(0.0, divergence), 1.0))  # rounding may leave -1e-17


def _entropy(shares: Sequence[float]) -> float:
    return -math.fsum(p * math.log2(p) for p in shares if p > 0)


def _part(number: int, questions: Sequence[Question]) -> Part:
    labels = counts_by_label([q for q in questions if q.label is not None])
    top = min(labels, key=lambda label: (-labels[label], label), default=None)
    return Part(
        participant=number,
        questions=len(questions),
        answer_words=sum(len(_WORD.findall(q.answer)) for q in questions),
        labels=len(labels),
        largest_label=top,
        share=labels[top] / len(questions) if top is not None else None,
    )
