"""trimmed-mean: of each coordinate the mean without the f largest and f smallest values.

Yin et al. (arXiv:1803.01498). With at most f bad deltas of K >= 2 f + 1 it lies within the range of
the good ones' values, whatever the bad ones are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.methods.rules import Rule
from shared.tensors.arithmetic import mean_of_sorted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shared.config import AggregationSection


class TrimmedMean(Rule):
    """f is ``assumed_bad``."""

    taken = "the trimmed mean of the participants' deltas"
    weighted_mean = False
    one_vote = True
    by_coordinate = True
    assumes_bad = True

    def least(self, section: AggregationSection, /) -> int:
        """One value is left."""
        return 2 * section.assumed_bad + 1

    def least_in_words(self, section: AggregationSection, /) -> str:
        """2 f + 1."""
        return f"2 x {section.assumed_bad} + 1"

    def combine(
        self,
        section: AggregationSection,
        rows: NDArray[np.float64],
        result: NDArray[np.float64],
        /,
    ) -> None:
        """The mean of those between."""
        bad = section.assumed_bad
        mean_of_sorted(rows, slice(bad, len(rows) - bad), result)


MODE = TrimmedMean()
