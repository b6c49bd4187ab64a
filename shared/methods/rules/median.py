"""median: of each coordinate the median (Yin et al., arXiv:1803.01498).

With at most f bad deltas of K >= 2 f + 1 it lies within the range of the good ones' values,
whatever the bad ones are. The median of an even number is the mean of the two in the middle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.methods.rules import Rule
from shared.tensors.arithmetic import mean_of_sorted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shared.config import AggregationSection


class Median(Rule):
    """The value in the middle."""

    taken = "the median of the participants' deltas, value by value"
    weighted_mean = False
    one_vote = True
    by_coordinate = True

    def least(self, _section: AggregationSection, /) -> int:
        """Of two values nobody can say which one is bad."""
        return 3

    def combine(
        self,
        _section: AggregationSection,
        rows: NDArray[np.float64],
        result: NDArray[np.float64],
        /,
    ) -> None:
        """One value, or the mean of two."""
        count = len(rows)
        mean_of_sorted(rows, slice((count - 1) // 2, count // 2 + 1), result)


MODE = Median()
