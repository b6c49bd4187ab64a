"""Settings that are each well but cannot work together, and why."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.config import FederationConfig


def misfits(config: FederationConfig) -> Iterator[str]:
    """Every combination of settings in ``config`` that cannot work: field, what to do."""
    yield from _averaging(config)
    yield from _robust(config)


def _averaging(config: FederationConfig) -> Iterator[str]:
    mode, ranks = config.aggregation.averaging, config.lora.ranks
    if mode == "flora" and config.base.quantisation != "none":
        yield (
            f'aggregation.averaging = "flora" merges every round into the base, but '
            f'base.quantisation is "{config.base.quantisation}": quantised again, the merged base '
            "would lose more than a round adds; use svd, or an unquantised base"
        )
    if ranks and mode not in ("svd", "flora"):
        yield (
            f'lora.ranks: expected one rank for all sites with aggregation.averaging = "{mode}", '
            f"got {len(ranks)} of their own: factors of two ranks have no mean; use svd"
        )


def _robust(config: FederationConfig) -> Iterator[str]:
    """A rule that withstands a bad site needs enough deltas of equal standing in every round."""
    section, policy = config.aggregation, config.policy
    if section.rule == "mean":
        return
    rule = f'aggregation.rule = "{section.rule}"'
    if section.weights != "equal":
        yield (
            f'aggregation.weights: expected "equal" with {rule}, got "{section.weights}": each '
            "delta has one vote, or a bad site could claim the most text"
        )
    if policy.carries:
        late = 'kind = "buffered"' if policy.kind == "buffered" else 'late = "carry"'
        yield (
            f"policy.{late} does not go with {rule}: each site has one vote in a round, and late "
            'deltas would give it more; use kind = "all", or kind = "quorum" with late = "drop"'
        )
    if section.averaging in ("svd", "flora"):
        yield (
            f'aggregation.averaging = "{section.averaging}" does not go with {rule}: it joins '
            "products of factors, and the rule compares the factors value by value; use fedavg, "
            "ffa or rolora"
        )
    yield from _enough_deltas(config, rule)


def _enough_deltas(config: FederationConfig, rule: str) -> Iterator[str]:
    run, section = config.run, config.aggregation
    bad = section.assumed_bad
    needs = {"median": "3", "trimmed-mean": f"2 x {bad} + 1", "multi-krum": f"2 x {bad} + 3"}
    why = "" if section.rule == "median" else f" with aggregation.assumed_bad = {bad}"
    # The smallest round that these settings allow; a selection takes ceil(fraction x members).
    members = run.min_participants or len(run.participants)
    counts = {
        f"run.participants lists {len(run.participants)}": len(run.participants),
        f"run.min_participants is {members}": members,
        f"selection.fraction takes {config.selection.fraction:g} of {members}": max(
            1, math.ceil(config.selection.fraction * members)
        ),
        f"policy.quorum is {config.policy.quorum}": config.policy.quorum or members,
    }
    for what, count in counts.items():
        if count < section.least_deltas:
            yield (
                f"{rule}{why} needs at least {section.least_deltas} deltas in every round "
                f"({needs[section.rule]}), but {what}; raise that, lower assumed_bad or take "
                "another rule"
            )
            return
