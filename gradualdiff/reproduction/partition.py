"""Dealing training questions out to participants: IID, or unlike each other in a measured way.

Pure functions of questions, policy and seed: the same seed gives the same parts on every machine.
Every question goes to exactly one participant.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

from participant.data.splitting import seeded_order
from shared.errors import ConfigError, DataError
from shared.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from gradualdiff.reproduction.questions import Question

Kind = Literal["iid", "dirichlet", "by-label", "by-group"]
FORMS = "iid, dirichlet(ALPHA), by-label or by-group"
_DIRICHLET = re.compile(r"dirichlet\(([0-9.eE+-]+)\)")


@dataclass(frozen=True)
class Policy:
    """How questions are dealt. ``alpha`` only for ``dirichlet``: small is unlike, large is IID."""

    kind: Kind
    alpha: float | None = None

    def __str__(self) -> str:
        return self.kind if self.alpha is None else f"{self.kind}({self.alpha:g})"


def parse_policy(text: str) -> Policy:
    """``iid``, ``dirichlet(0.5)``, ``by-label`` or ``by-group``. Raises ConfigError."""
    plain = text.strip()
    for kind in ("iid", "by-label", "by-group"):
        if plain == kind:
            return Policy(kind)
    match = _DIRICHLET.fullmatch(plain)
    try:
        alpha = float(match[1]) if match else 0.0
    except ValueError:
        alpha = 0.0
    if not 0 < alpha < math.inf:
        raise ConfigError(
            f"partition = {text!r}: expected {FORMS}, ALPHA a number above 0; correct the policy"
        )
    return Policy("dirichlet", alpha)


@dataclass(frozen=True)
class Partition:
    """One part for each participant, each in the order the questions came."""

    policy: Policy
    seed: int
    parts: tuple[tuple[Question, ...], ...]


def partition(
    questions: Sequence[Question],
    participants: int,
    policy: Policy,
    seed: int,
    fewest: int = 1,
    sizes: Sequence[int] | None = None,
) -> Partition:
    """Deal ``questions`` out to ``participants``.

    ``iid``: a seeded shuffle, cut. ``dirichlet``: see :func:`_by_dirichlet`. ``by-label``,
    ``by-group``: whole labels or groups, the largest first, each to whom has least; their sizes
    follow from that. ``sizes``: how many each participant gets under ``iid`` and ``dirichlet``;
    None: equal, the first ones get one more where it does not divide. No participant ends with
    fewer than ``fewest`` questions (one batch): since ``iid`` and ``dirichlet`` fix the sizes
    beforehand, this is checked before dealing, and nobody is topped up from another; by labels or
    groups it is checked after.

    Raises ConfigError for counts or sizes that cannot be, DataError for too few questions, labels
    or groups, and where a question lacks the label or group that the policy needs.
    """
    if participants < 1 or fewest < 1:
        raise ConfigError(
            f"participants and the fewest questions of each: expected 1 or more, got "
            f"{participants} and {fewest}; give larger numbers"
        )
    if policy.kind in {"by-label", "by-group"}:
        if sizes is not None:
            raise ConfigError(
                f"sizes with partition {policy}: expected none, since whole "
                f"{policy.kind.removeprefix('by-')}s are dealt; leave sizes out or use iid or "
                "dirichlet"
            )
        parts = _by_value(questions, participants, policy.kind)
        _require_fewest([len(part) for part in parts], fewest, policy)
    else:
        wanted = _sizes(len(questions), participants, sizes)
        _require_fewest(wanted, fewest, policy)
        if policy.kind == "iid":
            parts = _by_chance(questions, wanted, seed)
        else:
            parts = _by_dirichlet(questions, wanted, policy.alpha or 1.0, seed)
    return Partition(policy, seed, tuple(tuple(questions[i] for i in sorted(p)) for p in parts))


def _sizes(total: int, participants: int, given: Sequence[int] | None) -> list[int]:
    if given is None:
        each, more = divmod(total, participants)
        return [each + (i < more) for i in range(participants)]
    if len(given) != participants or sum(given) != total:
        raise ConfigError(
            f"sizes: expected {participants} that sum to the {total} questions, got {len(given)} "
            f"that sum to {sum(given)}; correct the sizes"
        )
    return list(given)


def _require_fewest(sizes: Sequence[int], fewest: int, policy: Policy) -> None:
    smallest = min(sizes)
    if smallest < fewest:
        raise DataError(
            f"partition {policy}: expected at least {fewest} questions (one batch) for each of "
            f"{len(sizes)} participants, got {smallest} for one of them; give more text, or ask "
            "for fewer participants or a smaller batch"
        )


def _by_chance(questions: Sequence[Question], sizes: Sequence[int], seed: int) -> list[list[int]]:
    order = _shuffled(questions, range(len(questions)), seed)
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [order[begin:end] for begin, end in pairwise(ends)]


def _by_value(questions: Sequence[Question], participants: int, kind: Kind) -> list[list[int]]:
    values = _indices_by(questions, "group" if kind == "by-group" else "label", kind)
    if len(values) < participants:
        what = kind.removeprefix("by-")
        raise DataError(
            f"partition {kind}: expected at least as many {what}s as participants, got "
            f"{len(values)} {what}s for {participants}; ask for fewer participants"
        )
    parts: list[list[int]] = [[] for _ in range(participants)]
    for value in sorted(values, key=lambda value: (-len(values[value]), value)):
        min(parts, key=len).extend(values[value])
    return parts


def _by_dirichlet(
    questions: Sequence[Question], sizes: Sequence[int], alpha: float, seed: int
) -> list[list[int]]:
    """Hsu et al. (arXiv:1909.06335): sizes are fixed, what differs is the mixture of labels.

    Each participant draws its mixture q ~ Dirichlet(alpha p), p the labels' shares of all
    questions; alpha to infinity is IID, alpha to 0 one label each. Participants then take turns,
    one question at a time, of a label drawn from q over the labels that still have questions: in
    turn, so that not the last participant alone gets what the others left. A label's questions
    are taken in a seeded order.
    """
    labels = _indices_by(questions, "label", "dirichlet")
    names = sorted(labels)
    draws = _uniforms(derive_seed(seed, "partition", "dirichlet"))
    shares = [len(labels[name]) / len(questions) for name in names]
    # Logarithms: under a small alpha a label's share of q is smaller than any float64.
    logs = [[_log_gamma_draw(alpha * share, draws) for share in shares] for _ in sizes]
    left = [_shuffled(questions, labels[name], seed) for name in names]
    parts: list[list[int]] = [[] for _ in sizes]
    for turn in range(max(sizes)):
        for part, size, mixture in zip(parts, sizes, logs, strict=True):
            if turn < size:
                part.append(left[_draw_label(mixture, left, next(draws))].pop())
    return parts


def _draw_label(logs: Sequence[float], left: Sequence[Sequence[int]], uniform: float) -> int:
    """A label with questions left, by its share of the mixture."""
    open_labels = [i for i, questions in enumerate(left) if questions]
    largest = max(logs[i] for i in open_labels)
    weights = [math.exp(logs[i] - largest) for i in open_labels]
    target = uniform * math.fsum(weights)
    for label, weight in zip(open_labels, weights, strict=True):
        target -= weight
        if target < 0:
            return label
    return open_labels[weights.index(max(weights))]  # rounding left a hair of the last share


def _log_gamma_draw(shape: float, draws: Iterator[float]) -> float:
    """Logarithm of a Gamma(shape, 1) draw, by Marsaglia and Tsang (2000).

    A shape below 1 goes through shape + 1: G(a) = G(a + 1) U^(1 / a). Own code on raw words, as
    numpy promises to keep Philox's words but not what ``Generator.dirichlet`` makes of them.
    """
    boost = 0.0
    if shape < 1:
        boost = math.log(next(draws)) / shape
        shape += 1
    d = shape - 1 / 3
    while True:
        radius, angle = math.sqrt(-2 * math.log(next(draws))), 2 * math.pi * next(draws)
        normal = radius * math.cos(angle)
        cube = (1 + normal / math.sqrt(9 * d)) ** 3
        accept = math.log(next(draws))
        if cube > 0 and accept < normal**2 / 2 + d - d * cube + d * math.log(cube):
            return math.log(d * cube) + boost


def _uniforms(key: int) -> Iterator[float]:
    """Numbers in (0, 1), 53 bits each, from Philox's raw words."""
    words = np.random.Philox(key=key)
    while True:
        for word in words.random_raw(1024).tolist():
            yield ((word >> 11) + 0.5) * 2.0**-53


def _indices_by(questions: Sequence[Question], what: str, policy: str) -> Mapping[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        value = question.label if what == "label" else question.group
        if value is None:
            raise DataError(
                f"partition {policy}: expected a {what} with every question, got none with "
                f"question {index + 1} of {len(questions)}; name a {what} column, or use iid"
            )
        found[value].append(index)
    return found


def _shuffled(questions: Sequence[Question], indices: Sequence[int], seed: int) -> list[int]:
    return sorted(indices, key=lambda i: (seeded_order(seed, f"deal {questions[i].key}"), i))
