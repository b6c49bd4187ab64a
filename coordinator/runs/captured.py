"""How much of the mean gradient the bases of a run hold, from its records."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.methods.averaging import get_averaging

if TYPE_CHECKING:
    from coordinator.history import History

WORST = 5  # layers that are named


@dataclass(frozen=True)
class Held:
    """Parts of the squared norm that the first ``rank`` directions hold.

    ``whole``: of all layers' gradients together; the others of single layers'. ``worst``: the
    layers that they hold least of, by name.
    """

    rank: int
    whole: float
    least: float
    median: float
    most: float
    worst: dict[str, float]


@dataclass(frozen=True)
class Captured:
    """What the bases that round ``round`` made hold. ``layers``: how many have a gradient.

    The parts are estimates: what the directions hold is exact, what they do not is estimated from
    the random directions of round 1, and rather too large.
    """

    round: int
    layers: int
    ranks: tuple[Held, ...]


def captured(history: History, number: int | None = None) -> Captured | None:
    """Of the bases that a round made, or the last one that did; None where none did."""
    config = history.config
    mode = get_averaging(config.aggregation.averaging)
    if not mode.makes_bases:
        return None
    first = history.round(1).closed
    made = [n for n in range(2, history.last_closed + 1, 2) if number in (None, n)]
    closed, second = (history.round(n).closed for n in (made[-1], 2)) if made else (None, None)
    if first is None or second is None or closed is None:
        return None
    ranks = mode.depths(config.lora.rank)
    wholes, held = {}, {}
    for layer, energy in closed.gradient_energy.items():
        outside, inside = first.gradient_energy.get(layer), second.gradient_energy.get(layer)
        if outside and inside and outside[0] + inside[-1] > 0 and len(energy) == len(ranks):
            wholes[layer] = outside[0] + inside[-1]
            held[layer] = energy
    if not held:
        return None
    found = tuple(_held(rank, at, wholes, held) for at, rank in enumerate(ranks))
    return Captured(closed.round, len(held), found)


def _held(rank: int, at: int, wholes: dict[str, float], held: dict[str, tuple[float, ...]]) -> Held:
    parts = {layer: min(energy[at] / wholes[layer], 1.0) for layer, energy in held.items()}
    worst = sorted(parts, key=lambda layer: (parts[layer], layer))[:WORST]
    total = math.fsum(energy[at] for energy in held.values()) / math.fsum(wholes.values())
    return Held(
        rank=rank,
        whole=min(total, 1.0),
        least=min(parts.values()),
        median=statistics.median(parts.values()),
        most=max(parts.values()),
        worst={layer.removeprefix("base_model.model."): parts[layer] for layer in worst},
    )
