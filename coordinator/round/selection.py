"""Who trains in a round: a pure function of config, members and round number."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import TYPE_CHECKING

from shared.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shared.config import SelectionSection


def select(
    section: SelectionSection, members: Iterable[str], seed: int, round_number: int
) -> tuple[str, ...]:
    """The selected sites in name order: all, or ``ceil(fraction * members)`` of them.

    The random choice ranks every site by a seed derived from run seed, round and name, so it needs
    no generator state and anybody can recompute it from the ledger.
    """
    names = sorted(members)
    if section.method != "random":
        return tuple(names)
    count = max(1, math.ceil(section.fraction * len(names)))
    ranked = sorted(names, key=lambda site: derive_seed(seed, "selection", round_number, site))
    return tuple(sorted(ranked[:count]))


def is_among(site: str, names: Sequence[str]) -> bool:
    """Whether a site is one of ``names``, which are in name order, as :func:`select` gives them.

    Asked of each message: in a large federation nobody may look through all names for that.
    """
    at = bisect_left(names, site)
    return at < len(names) and names[at] == site
