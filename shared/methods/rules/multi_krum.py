"""multi-krum: the mean of the deltas that lie nearest to each other (arXiv:1703.02757).

A delta's score is the sum of its squared distances to the K - f - 2 nearest others. The f with the
largest scores are left out, so m = K - f are averaged: as many as are good by assumption. A bad one
among them has then a score of no more than some good one's. Of equal scores the later label is left
out. Blanchard et al. ask for K >= 2 f + 3.
"""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from shared.methods.rules import Rule
from shared.tensors.arithmetic import blocks, squared_norm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from shared.config import AggregationSection
    from shared.methods.votes import Votes
    from shared.protocol.manifest import Manifest, TensorSpec


class MultiKrum(Rule):
    """f is ``assumed_bad``."""

    taken = "the mean of those participants' deltas that multi-Krum takes"
    weighted_mean = False
    one_vote = True
    assumes_bad = True

    def least(self, section: AggregationSection, /) -> int:
        """Each score is of at least one distance, and there are more good deltas than bad ones."""
        return 2 * section.assumed_bad + 3

    def least_in_words(self, section: AggregationSection, /) -> str:
        """2 f + 3."""
        return f"2 x {section.assumed_bad} + 3"

    def left_out(
        self,
        section: AggregationSection,
        manifest: Manifest,
        votes: Votes,
        labels: Sequence[str],
        threads: int,
        /,
    ) -> dict[str, str]:
        """Those with the largest scores."""
        bad = section.assumed_bad
        scores = krum_scores(len(labels), _distances(manifest, votes, threads), bad)
        ranked = sorted(range(len(labels)), key=lambda i: (scores[i], labels[i]))
        taken = len(labels) - bad
        bound = scores[ranked[taken - 1]]
        return {
            labels[i]: f"multi-krum: its score {scores[i]:.9g} is not among the {taken} "
            f"smallest of {len(labels)}; the largest of those is {bound:.9g}"
            for i in sorted(ranked[taken:])
        }


def krum_scores(count: int, distances: Mapping[tuple[int, int], float], bad: int) -> list[float]:
    """Each delta's score from the squared distances of all pairs (i, j), i < j."""
    scores = []
    for i in range(count):
        others = sorted(distances[min(i, j), max(i, j)] for j in range(count) if j != i)
        scores.append(math.fsum(others[: count - bad - 2]))
    return scores


def _distances(manifest: Manifest, votes: Votes, threads: int) -> dict[tuple[int, int], float]:
    """Squared distances between whole deltas; what is summed over tensors is summed exactly."""
    pairs = list(itertools.combinations(range(len(votes.files)), 2))

    def of_tensor(spec: TensorSpec) -> list[list[float]]:
        found: list[list[float]] = [[] for _ in pairs]
        for _, rows in votes.slices(spec):
            for sums, (i, j) in zip(found, pairs, strict=True):
                sums.append(_squared_distance(rows[i], rows[j]))
        for file in votes.files:
            file.release(spec)
        return found

    totals: list[list[float]] = [[] for _ in pairs]
    with ThreadPoolExecutor(threads, "distances") as pool:
        for found in pool.map(of_tensor, manifest.tensors):
            for total, sums in zip(totals, found, strict=True):
                total.extend(sums)
    return {pair: math.fsum(total) for pair, total in zip(pairs, totals, strict=True)}


def _squared_distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Never from norms and a product: what two near deltas differ in would be rounded away."""
    return math.fsum(squared_norm(one[at] - other[at]) for at in blocks(one.size))


MODE = MultiKrum()
