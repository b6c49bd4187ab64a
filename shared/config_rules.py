"""Settings that are each well but cannot work together, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.config import FederationConfig


def misfits(config: FederationConfig) -> Iterator[str]:
    """Every combination of settings in ``config`` that cannot work: field, what to do."""
    yield from _averaging(config)


def _averaging(config: FederationConfig) -> Iterator[str]:
    mode = config.aggregation.averaging
    if mode == "flora":
        yield _no_flora(config)
    yield from _ranks(config)
    if mode == "svd" and config.aggregation.rule != "mean":
        yield (
            f'aggregation.rule = "{config.aggregation.rule}" takes values one by one, but '
            'aggregation.averaging = "svd" joins products of whole factors; use rule = "mean" with '
            "clip_to_median or max_delta_norm against a bad site, or another averaging"
        )
    if mode in ("rolora", "svd"):
        yield from _new_factors_each_round(config, mode)


def _no_flora(config: FederationConfig) -> str:
    if config.base.quantisation != "none":
        return (
            f'aggregation.averaging = "flora" merges every round into the base, but '
            f'base.quantisation is "{config.base.quantisation}": quantised again, the merged base '
            "would lose more than a round adds; use svd"
        )
    return (
        'aggregation.averaging = "flora" needs sites that merge every round into their base, which '
        "none here does: the base is frozen and fingerprinted; use svd, which is as exact as rank "
        "lora.rank allows and takes sites of several ranks too"
    )


def _ranks(config: FederationConfig) -> Iterator[str]:
    mode, lora = config.aggregation.averaging, config.lora
    if lora.ranks and mode not in ("svd", "flora"):
        yield (
            f'lora.ranks: expected one rank for all sites with aggregation.averaging = "{mode}", '
            f"got {len(lora.ranks)} of their own: factors of two ranks have no mean; use svd"
        )
    strangers = sorted(lora.ranks.keys() - set(config.run.participants))
    if strangers:
        yield (
            f"lora.ranks: expected sites of run.participants, got {', '.join(strangers)}; "
            "mend the name, or list it there"
        )
    for site, rank in sorted(lora.ranks.items()):
        if rank > lora.rank:
            yield (
                f"lora.ranks.{site}: expected at most lora.rank = {lora.rank}, got {rank}: the "
                "global adapter is what every site's is a part of; raise lora.rank"
            )


def _new_factors_each_round(config: FederationConfig, mode: str) -> Iterator[str]:
    """What cannot outlive a round whose factors are not those of the round before."""
    why = {
        "rolora": "trains the other factor in the next round",
        "svd": "makes both factors anew in every round, in other directions",
    }[mode]
    if config.training.optimizer_state == "keep":
        yield (
            f'training.optimizer_state = "keep": aggregation.averaging = "{mode}" {why}, so '
            'AdamW\'s moments are not of what it then trains; use "reset"'
        )
    if config.policy.carries:
        yield (
            f"policy: a delta that counts in a later round needs factors that stay, but "
            f'aggregation.averaging = "{mode}" {why}; use policy.late = "drop", or fedavg or ffa'
        )
