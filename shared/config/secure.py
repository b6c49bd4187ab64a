"""Settings that a secure sum does not go with, each with the reason.

The coordinator knows the sum of the sites' vectors and nothing else of them, so nothing that looks
at one delta can be asked for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from shared import modes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shared.config.tables import FederationTables

SMALLEST_COHORT: Final = 3  # of two, each knows the other's part from the sum


def two_thirds(count: int) -> int:
    """Of so many, rounded up."""
    return -(-2 * count // 3)


def fewest_survivors(cohort: int) -> int:
    """Of a round's sites so many must be there at the end, or no site reveals anything."""
    return max(SMALLEST_COHORT, two_thirds(cohort))


def fewest_selected(config: FederationTables) -> int:
    """The smallest cohort that these settings allow."""
    run = config.run
    members = run.min_participants or len(run.participants)
    return max(1, math.ceil(config.selection.fraction * members))


def _enough_sites(config: FederationTables) -> Iterator[str]:
    smallest = fewest_selected(config)
    if smallest < SMALLEST_COHORT:
        yield (
            f"aggregation.secure: expected {SMALLEST_COHORT} sites or more in every round, but "
            f"run.participants, run.min_participants and selection.fraction allow {smallest}: of "
            "a sum of two each knows the other's part; raise that"
        )


def _enough_survivors(config: FederationTables) -> Iterator[str]:
    setting = modes.get("policies", config.policy.kind).fewest
    asked = getattr(config.policy, setting) if setting else None
    most = math.ceil(config.selection.fraction * len(config.run.participants))
    if asked is not None and asked < fewest_survivors(most):
        yield (
            f"policy.{setting}: expected {fewest_survivors(most)} or more of {most} sites with "
            f"aggregation.secure, got {asked}: sites reveal nothing for fewer than two thirds; "
            "raise it"
        )


def _no_late_deltas(config: FederationTables) -> Iterator[str]:
    policy = config.policy
    if policy.carries:
        late = modes.get("policies", policy.kind).carried_by(policy)
        yield (
            f"policy.{late} does not go with aggregation.secure: masks cancel within one round, "
            'so a late delta cannot count in another; use kind = "all", or kind = "quorum" with '
            'late = "drop"'
        )


def _sums_of_values(config: FederationTables) -> Iterator[str]:
    name = config.aggregation.averaging
    if not modes.get("averaging", name).by_value:
        yield (
            f'aggregation.averaging = "{name}" does not go with aggregation.secure: it is made of '
            "each site's own factors, which nobody sees; use fedavg, ffa or rolora"
        )


def _no_rule_that_compares(config: FederationTables) -> Iterator[str]:
    name = config.aggregation.rule
    if not modes.get("rules", name).weighted_mean:
        yield (
            f'aggregation.rule = "{name}" does not go with aggregation.secure: it compares deltas '
            'that nobody sees; use "mean"'
        )


def _no_norms(config: FederationTables) -> Iterator[str]:
    section = config.aggregation
    for name, off in (("clip_to_median", "off"), ("max_delta_norm", None)):
        got = getattr(section, name)
        if got != off and name in section.model_fields_set:  # a default gives way
            way_out = f'use "{off}"' if off else "remove it"
            yield (
                f"aggregation.{name} = {got:g} does not go with aggregation.secure: it asks for "
                f"each delta's norm, which nobody sees; {way_out}"
            )


def _equal_weights(config: FederationTables) -> Iterator[str]:
    weights = config.aggregation.weights
    if weights != "equal":
        yield (
            f'aggregation.weights = "{weights}" does not go with aggregation.secure: a masked '
            "delta cannot be weighted by anybody but its site, who might claim the most; use "
            '"equal"'
        )


def _whole_numbers(config: FederationTables) -> Iterator[str]:
    codec = config.codec
    if not levels_of(config):
        known = [n for n in modes.names("codecs") if getattr(modes.get("codecs", n), "levels", 0)]
        yield (
            f'codec.name = "{codec.name}" does not go with aggregation.secure: what is summed are '
            "whole numbers at places that all sites share; use "
            f"{' or '.join(f'{chr(34)}{name}{chr(34)}' for name in known)}"
        )
    noisy = config.privacy is not None and config.privacy.of_sites  # its own scale cuts nothing off
    if not codec.feedback and not noisy:
        yield (
            "codec.feedback is false: with aggregation.secure the scale is the same at all sites, "
            "and what it cuts off must travel later; set it to true"
        )


def levels_of(config: FederationTables) -> int:
    """Whole numbers to either side of zero that the run's codec sends; 0: it sends no such."""
    return int(getattr(modes.get("codecs", config.codec.name), "levels", 0))


def secure_rules(config: FederationTables) -> Iterator[str]:
    """Every conflict, where the run has a secure sum."""
    if config.aggregation.secure:
        for rule in _RULES:
            yield from rule(config)


_RULES: Final[tuple[Callable[[FederationTables], Iterator[str]], ...]] = (
    _enough_sites,
    _enough_survivors,
    _no_late_deltas,
    _sums_of_values,
    _no_rule_that_compares,
    _no_norms,
    _equal_weights,
    _whole_numbers,
)
