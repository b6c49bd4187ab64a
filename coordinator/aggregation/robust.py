"""Rules that withstand a bad delta: coordinate-wise median and trimmed mean, multi-Krum.

As in ``aggregation``, the bytes depend on nothing but the deltas: fp64, no BLAS, no order of
arrival, no number of threads. Of one tensor a slice of all deltas is in memory at a time, never K
deltas and not even K whole tensors where those are large.

Every delta has one vote, so the shares of the mean play no part here.
"""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from shared.tensors.arithmetic import blocks, squared_norm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from shared.config import AggregationSection
    from shared.protocol.manifest import Manifest, TensorSpec
    from shared.tensors.delta_file import DeltaFile

ROOM: Final = 2**22  # fp64 values of all deltas in memory at a time, a thread: 32 MiB


@dataclass(frozen=True)
class Votes:
    """A round's deltas in name order: open files, and what their values are multiplied by."""

    files: Sequence[DeltaFile]
    scales: Sequence[float]

    def slices(self, spec: TensorSpec) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        """One tensor, slice by slice: where it begins and ends, and one row of values a delta.

        The rows are overwritten once the next slice is asked for. Where one slice is not the whole
        tensor each delta is decoded once a slice: that costs time, K whole tensors cost memory.
        """
        size = max(1, min(spec.elements, ROOM // len(self.files)))
        room = np.empty((len(self.files), size), np.float64)
        for at in blocks(spec.elements, size):
            rows = room[:, : at.stop - at.start]
            for row, file, scale in zip(rows, self.files, self.scales, strict=True):
                np.copyto(row, file.read(spec).reshape(-1)[at])
                if scale != 1:
                    np.multiply(row, scale, out=row)
            yield at, rows


def kept(section: AggregationSection, count: int) -> slice | None:
    """Which of ``count`` sorted values are averaged; None where the rule is not by coordinate.

    The median of an even number is the mean of the two in the middle.
    """
    if section.rule == "median":
        return slice((count - 1) // 2, count // 2 + 1)
    if section.rule == "trimmed-mean":
        return slice(section.assumed_bad, count - section.assumed_bad)
    return None


def by_coordinate(spec: TensorSpec, votes: Votes, keep: slice, result: NDArray[np.float64]) -> None:
    """For each coordinate of a tensor the mean of its sorted values ``keep``, into ``result``.

    Trimmed mean and median of Yin et al. (arXiv:1803.01498). With at most f bad deltas of K >= 2f +
    1 it lies within the range of the good ones' values, whatever the bad ones are.
    """
    for at, rows in votes.slices(spec):
        np.add(rows, 0.0, out=rows)  # -0.0 becomes 0.0: sorting knows no order between the two
        rows.sort(axis=0)
        chosen, total = rows[keep], result[at]
        np.copyto(total, chosen[0])
        for row in chosen[1:]:
            np.add(total, row, out=total)
        np.divide(total, len(chosen), out=total)


def multi_krum(
    manifest: Manifest, votes: Votes, labels: Sequence[str], bad: int, threads: int
) -> dict[str, str]:
    """Whom multi-Krum leaves out, and why (Blanchard et al., arXiv:1703.02757).

    A delta's score is the sum of its squared distances to the K - f - 2 nearest others. The f with
    the largest scores are left out, so m = K - f are averaged: as many as are good by assumption.
    A bad one among them has then a score of no more than some good one's. Of equal scores the
    later label is left out. ``labels``: the names of the votes. Needs K >= 2 f + 3.
    """
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
