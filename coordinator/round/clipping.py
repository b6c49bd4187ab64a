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
LEAST_SITES: Final = 3


def scales(
    limit: float | Literal["off"],
    norms: Mapping[str, float],
    sites: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """What each delta is multiplied by, in name order: min(1, limit x median / norm).

    ``norms``: L2 of the deltas that a round counts, by label. ``sites``: whose each is; None: each
    a site's own. The median is over sites, a site's norm the median of its own: one that hands in
    several late deltas together must not say what is usual. Exactly 1.0 where nothing is clipped:
    with ``limit`` "off", with fewer than three sites, and where the median is 0 (most sites did
    not move at all, so there is no usual norm, and a factor of 0 would silence those that did).
    """
    own: dict[str, list[float]] = {}
    for label, norm in norms.items():
        own.setdefault(sites[label] if sites else label, []).append(norm)
    usual = [statistics.median(values) for values in own.values()]
    median = statistics.median(usual) if len(usual) >= LEAST_SITES else 0.0
    if limit == "off" or median == 0:
        return dict.fromkeys(sorted(norms), 1.0)
    bound = limit * median
    return {label: bound / norms[label] if norms[label] > bound else 1.0 for label in sorted(norms)}
