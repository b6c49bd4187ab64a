"""What differential privacy does not go with, and why: a refusal has its number or its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shared import modes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.config.tables import FederationTables

LEAST_SITES: Final = 100  # with fewer, noise that hides a site hides what all sites learnt too


def noise_ratio(noise_multiplier: float, numbers: int, sites: int) -> float:
    """Noise on the mean of ``sites`` updates over the largest update: sigma sqrt(d) / K.

    With noise N(0, sigma^2 C^2) on the sum of K updates of d ``numbers``, of norm C at most.
    """
    return float(noise_multiplier * numbers**0.5 / sites)


def _whole_sites(config: FederationTables) -> Iterator[str]:
    privacy, sites = config.privacy, len(config.run.participants)
    if privacy is None or privacy.unit != "site":
        return
    sigma = privacy.noise_multiplier or 1.0
    hidden = f'privacy.unit: expected "record", got "site": with {sites} sites and noise of '
    yield (
        f"{hidden}{sigma:g} x clip, an adapter of more than {(sites / sigma) ** 2:,.0f} numbers "
        f"gets noise that is longer than any site's update (sigma x sqrt(numbers) / sites = "
        f"{noise_ratio(sigma, 10**6, sites):.3g} for a million numbers), and from "
        f"{LEAST_SITES} sites on it would still be noise that the coordinator adds and could take "
        "off again"
    )


def _equal_weights(config: FederationTables) -> Iterator[str]:
    weights = config.aggregation.weights
    if config.privacy is not None and weights != "equal":
        yield (
            f'aggregation.weights: expected "equal" with [privacy], got "{weights}": how much a '
            "site trained on is told by its records and has no noise"
        )


def _no_gradients(config: FederationTables) -> Iterator[str]:
    name = config.aggregation.averaging
    if config.privacy is not None and modes.get("averaging", name).makes_bases:
        yield (
            f'aggregation.averaging = "{name}" sends gradients without noise; expected another '
            "one with [privacy], or leave [privacy] out and use public text for the bases"
        )


def _no_bases_of_a_run(config: FederationTables) -> Iterator[str]:
    lora = config.lora
    of_a_run = lora.kind == "core" and lora.bases != "weights" and "/" not in lora.bases
    if config.privacy is not None and of_a_run:
        yield (
            f'lora.bases: expected "weights" or a file ("./NAME") with [privacy], got '
            f'"{lora.bases}": a run makes bases of its sites\' gradients without noise'
        )


PRIVACY_RULES: Final = (_whole_sites, _equal_weights, _no_gradients, _no_bases_of_a_run)
