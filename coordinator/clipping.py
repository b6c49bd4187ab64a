"""Norm clipping: one delta may pull no further than a few times what is usual in its round.

Decided before anything is added up, from the norms that the accepted deltas have on record, so the
factors stand in ``closing.json`` and anybody can recompute them.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

# Of two norms nobody can say which one is unusual; of one there is nothing to compare it with.
LEAST_DELTAS: Final = 3


def scales(limit: float | Literal["off"], norms: Mapping[str, float]) -> dict[str, float]:
    """What each delta is multiplied by, in name order: min(1, limit x median(norms) / norm).

    ``norms``: L2 of the deltas that a round counts, by label. Exactly 1.0 where nothing is clipped:
    with ``limit`` "off", with fewer than three deltas, and where the median is 0 (most sites did
    not move at all, so there is no usual norm, and a factor of 0 would silence those that did).
    """
    median = statistics.median(norms.values()) if len(norms) >= LEAST_DELTAS else 0.0
    if limit == "off" or median == 0:
        return dict.fromkeys(sorted(norms), 1.0)
    bound = limit * median
    return {label: bound / norms[label] if norms[label] > bound else 1.0 for label in sorted(norms)}
