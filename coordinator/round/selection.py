"""Who trains in a round: a pure function of config, members and round number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from shared.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Iterable

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
