"""Settings that are each well but cannot work together, and why."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from shared import modes
from shared.config.privacy_rules import PRIVACY_RULES
from shared.config.secure import secure_rules
from shared.modes import WHOLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shared.config.tables import FederationTables


def _joined_by_value(config: FederationTables) -> Iterator[str]:
    name = config.aggregation.averaging
    rule = modes.get("rules", config.aggregation.rule)
    if not rule.weighted_mean and not modes.get("averaging", name).by_value:
        yield (
            f'aggregation.rule = "{config.aggregation.rule}" takes values one by one, but '
            f'aggregation.averaging = "{name}" joins products of whole factors; use rule = "mean" '
            "with clip_to_median or max_delta_norm against a bad site, or another averaging"
        )


def _two_factors(config: FederationTables) -> Iterator[str]:
    name, kind = config.aggregation.averaging, config.lora.kind
    if kind != "lora" and modes.get("averaging", name).factors_only:
        yield (
            f'aggregation.averaging = "{name}" needs the two factors of a LoRA adapter, but '
            f'lora.kind = "{kind}" has none; use "fedavg", whose mean is exact there, or '
            'lora.kind = "lora"'
        )


def _one_rank(config: FederationTables) -> Iterator[str]:
    name, lora = config.aggregation.averaging, config.lora
    if lora.ranks and not modes.get("averaging", name).takes_ranks:
        yield (
            f'lora.ranks: expected one rank for all sites with aggregation.averaging = "{name}", '
            f"got {len(lora.ranks)} of their own: factors of two ranks have no mean; use svd, or "
            "flora over a base that is not quantised"
        )


def _ranks_of_participants(config: FederationTables) -> Iterator[str]:
    strangers = sorted(config.lora.ranks.keys() - set(config.run.participants))
    if strangers:
        yield (
            f"lora.ranks: expected sites of run.participants, got {', '.join(strangers)}; "
            "fix the name, or list it there"
        )


def _ranks_are_parts(config: FederationTables) -> Iterator[str]:
    lora = config.lora
    for site, rank in sorted(lora.ranks.items()):
        if rank > lora.rank:
            yield (
                f"lora.ranks.{site}: expected at most lora.rank = {lora.rank}, got {rank}: the "
                "global adapter is what every site's is a part of; raise lora.rank"
            )


def _no_moments_of_old_factors(config: FederationTables) -> Iterator[str]:
    name = config.aggregation.averaging
    renews = modes.get("averaging", name).renews
    if renews and config.training.optimizer_state == "keep":
        yield (
            f'training.optimizer_state = "keep": aggregation.averaging = "{name}" {renews}, so '
            'AdamW\'s moments are not of what it then trains; use "reset"'
        )


def _no_deltas_of_old_factors(config: FederationTables) -> Iterator[str]:
    name = config.aggregation.averaging
    renews = modes.get("averaging", name).renews
    if renews and config.policy.carries:
        yield (
            f"policy: a delta that counts in a later round needs factors that stay, but "
            f'aggregation.averaging = "{name}" {renews}; use policy.late = "drop", or fedavg or ffa'
        )


def _one_vote_whatever_the_text(config: FederationTables) -> Iterator[str]:
    section = config.aggregation
    if modes.get("rules", section.rule).one_vote and section.weights != "equal":
        yield (
            f'aggregation.weights: expected "equal" with aggregation.rule = "{section.rule}", got '
            f'"{section.weights}": each delta has one vote, or a bad site could claim the most text'
        )


def _one_vote_in_a_round(config: FederationTables) -> Iterator[str]:
    section, policy = config.aggregation, config.policy
    if modes.get("rules", section.rule).one_vote and policy.carries:
        late = modes.get("policies", policy.kind).carried_by(policy)
        yield (
            f'policy.{late} does not go with aggregation.rule = "{section.rule}": each site has '
            "one vote in a round, and late deltas would give it more; use "
            'kind = "all", or kind = "quorum" with late = "drop"'
        )


def _enough_deltas(config: FederationTables) -> Iterator[str]:
    """A rule that withstands a bad site needs enough deltas of equal standing in every round."""
    run, section, policy = config.run, config.aggregation, config.policy
    rule, fewest = modes.get("rules", section.rule), modes.get("policies", policy.kind).fewest
    least, why = rule.least(section), ""
    if rule.assumes_bad:
        why = f" with aggregation.assumed_bad = {section.assumed_bad}"
    # The smallest round that these settings allow, by each that says something of it; a selection
    # takes ceil(fraction x members).
    listed, fraction = len(run.participants), config.selection.fraction
    members = run.min_participants or listed
    counts = {f"run.participants lists {listed}": listed}
    if run.min_participants is not None:
        counts[f"run.min_participants is {members}"] = members
    if fraction < 1:
        drawn = max(1, math.ceil(fraction * members))
        counts[f"selection.fraction takes {fraction:g} of {members}"] = drawn
    if fewest and (asked := getattr(policy, fewest)) is not None:
        counts[f"policy.{fewest} is {asked}"] = asked
    few = [what for what, count in counts.items() if count < least]
    if few:
        yield (
            f'aggregation.rule = "{section.rule}"{why} needs at least {least} deltas in every '
            f"round ({rule.least_in_words(section)}), but {' and '.join(few)}; raise that, lower "
            "assumed_bad or take another rule"
        )


def _server_needs_no_more(config: FederationTables) -> Iterator[str]:
    server, optimizer = config.server, modes.get("server_optimizers", config.server.optimizer)
    for name in ("momentum", "second_momentum", "tau"):
        given, default = getattr(server, name), type(server).model_fields[name].default
        if given != default and name not in optimizer.takes:
            yield (
                f"server.{name}: expected none with {_server_word(config)}, which has no use for "
                f"it, got {given}"
            )


def _server_needs_factors_that_stay(config: FederationTables) -> Iterator[str]:
    name = config.aggregation.averaging
    steps = modes.get("server_optimizers", config.server.optimizer).rows > 0
    if steps and not modes.get("averaging", name).by_value:
        yield (
            f'{_server_word(config)}: expected plain with aggregation.averaging = "{name}": it '
            "makes the factors anew in each round, so what was remembered of a value says nothing "
            "of the next one in its place; use fedavg, rolora or ffa"
        )


def _updates_lead_from_the_adapter_before(config: FederationTables) -> Iterator[str]:
    name, down = config.aggregation.averaging, config.codec.down
    said = "down" in config.codec.model_fields_set
    if said and down != WHOLE and not modes.get("averaging", name).by_value:
        yield (
            f'codec.down = "{down}" needs an adapter that each round adds to, but '
            f'aggregation.averaging = "{name}" makes it anew; use down = "{WHOLE}", or fedavg, '
            "rolora or ffa"
        )


def _server_word(config: FederationTables) -> str:
    return f'server.optimizer = "{config.server.optimizer}"'


# Each yields every combination of a few settings that cannot work: field, what to do. A rule of
# its own for each few, so that one setting that cannot be read silences no more than it must.
RULES: Final[tuple[Callable[[FederationTables], Iterator[str]], ...]] = (
    _joined_by_value,
    _two_factors,
    _one_rank,
    _ranks_of_participants,
    _ranks_are_parts,
    _no_moments_of_old_factors,
    _no_deltas_of_old_factors,
    _one_vote_whatever_the_text,
    _one_vote_in_a_round,
    _enough_deltas,
    _server_needs_no_more,
    _server_needs_factors_that_stay,
    _updates_lead_from_the_adapter_before,
    secure_rules,
    *PRIVACY_RULES,
)
