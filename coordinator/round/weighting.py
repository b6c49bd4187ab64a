"""The share of each counted delta in a round's sum, and what it is scaled down by."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from coordinator.round.clipping import scales
from shared.errors import ConfigError
from shared.protocol.record import delta_label

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from shared.config import AggregationSection
    from shared.protocol.records import AcceptedRecord


class Counts(NamedTuple):
    """What a site trained on in a round."""

    examples: int
    tokens: int


def weights(
    mode: Literal["equal", "examples", "tokens"],
    counts: Mapping[str, Counts],
    staleness: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Each delta's share, in name order. ``equal``: 1/K, else in proportion to what it trained on.

    A delta that is s rounds old weighs 1 / sqrt(1 + s) of that (FedBuff, arXiv:2106.06639,
    section 5); unlike there, the shares of a round still sum to 1. Raises ConfigError where there
    is nothing to share by.
    """
    sites = sorted(counts)
    parts: dict[str, float] = {}
    for site in sites:
        parts[site] = 1 if mode == "equal" else getattr(counts[site], mode)
        age = (staleness or {}).get(site, 0)
        if age:
            parts[site] /= math.sqrt(1 + age)
    total = sum(parts.values())
    if total <= 0 or min(parts.values()) < 0:
        raise ConfigError(
            f'aggregation.weights = "{mode}": expected {mode} from at least one site, '
            f'got {total} from {len(sites)} sites; set it to "equal"'
        )
    return {site: part / total for site, part in parts.items()}


def shares(
    mode: Literal["equal", "examples", "tokens"], counted: Iterable[AcceptedRecord], number: int
) -> dict[str, float]:
    """Each delta's share in round ``number``, by its label there; they sum to 1."""
    labelled = {delta_label(record.site, record.round, number): record for record in counted}
    counts = {label: Counts(r.examples, r.tokens) for label, r in labelled.items()}
    return weights(mode, counts, {label: number - r.round for label, r in labelled.items()})


def clips(
    section: AggregationSection, counted: Iterable[AcceptedRecord], number: int
) -> dict[str, float]:
    """What each delta is scaled down by in round ``number``, by its label there; 1 if it is not."""
    labelled = {delta_label(record.site, record.round, number): record for record in counted}
    norms = {label: record.norm for label, record in labelled.items()}
    sites = {label: record.site for label, record in labelled.items()}
    return scales(section.clip_to_median, norms, sites)
