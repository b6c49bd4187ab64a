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
