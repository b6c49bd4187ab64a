"""What differential privacy does not go with, and why: a refusal has its number or its reason.

Where a whole site is protected, each round's mean must be one of deltas with fixed and equal parts:
then no site moves their sum by more than C, and the noise on it is at least sigma x C.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shared import modes
from shared.config.secure import fewest_selected, fewest_survivors, two_thirds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shared.config.tables import FederationTables

# Of a round. With fewer, noise that hides a site hides what all sites learnt too, unless an adapter
# has fewer numbers than any has.
LEAST_SITES: Final = 100


def noise_ratio(noise_multiplier: float, numbers: int, sites: int) -> float:
    """Noise on the mean of ``sites`` updates over the largest update: sigma sqrt(d) / K.

    With noise N(0, sigma^2 C^2) on the sum of K updates of d ``numbers``, of norm C at most.
    Above 1 such a run is refused, at the site: there the numbers of an adapter are known.
    """
    return float(noise_multiplier * numbers**0.5 / sites)


def fewest_deltas(config: FederationTables) -> int:
    """The smallest number of deltas that a round of these settings is closed with.

    A site's noise is made for just so many: sigma x C / sqrt(this) each. The coordinator closes no
    round with fewer.
    """
    drawn, policy = fewest_selected(config), config.policy
    setting = modes.get("policies", policy.kind).fewest
    enough = getattr(policy, setting) if setting else None
    if config.aggregation.secure:
        return fewest_survivors(drawn)
    if policy.on_failure == "exclude":
        return min(enough or drawn, two_thirds(drawn))
    return min(enough or drawn, drawn)


def _enough_sites(config: FederationTables) -> Iterator[str]:
    drawn = fewest_selected(config)
    if drawn < LEAST_SITES:
        fewest = fewest_deltas(config)
        sigma = config.privacy.noise_multiplier if config.privacy is not None else None
        sigma = sigma or 1.0
        yield (
            f'privacy.unit: expected {LEAST_SITES} sites or more in every round with "site", but '
            f"run.participants, run.min_participants and selection.fraction allow {drawn}: with "
            f"noise of {sigma:g} x clip, a mean of {fewest} deltas of more than "
            f"{(fewest / sigma) ** 2:,.0f} numbers has noise that is longer than any site's update "
            f"(sigma x sqrt(numbers) / deltas = {noise_ratio(sigma, 10**6, fewest):.3g} for a "
            'million numbers); raise that, or use unit = "record"'
        )


def _one_site_of_all(config: FederationTables) -> Iterator[str]:
    delta, sites = config.privacy.delta if config.privacy else None, len(config.run.participants)
    if delta is not None and delta * sites > 1:
        yield (
            f"privacy.delta: expected at most 1 / {sites} (one site of all), got {delta:g}; within "
            "it a whole site may be given away"
        )


def _means_of_values(config: FederationTables) -> Iterator[str]:
    name, rule = config.aggregation.averaging, config.aggregation.rule
    averaging = modes.get("averaging", name)
    if not averaging.by_value and not averaging.makes_bases:  # those are refused below
        yield (
            f'aggregation.averaging = "{name}" does not go with privacy.unit = "site": it joins '
            "products of factors, whose noise is no noise on their sum; use fedavg, ffa or rolora"
        )
    if not modes.get("rules", rule).weighted_mean:
        yield (
            f'aggregation.rule = "{rule}" does not go with privacy.unit = "site": the noise of a '
            'mean is known, that of what compares deltas is not; use "mean"'
        )


def _no_norms(config: FederationTables) -> Iterator[str]:
    section = config.aggregation
    for name, off in (("clip_to_median", "off"), ("max_delta_norm", None)):
        got = getattr(section, name)
        if got != off and name in section.model_fields_set:  # a default gives way
            yield (
                f'aggregation.{name} = {got:g} does not go with privacy.unit = "site": it scales '
                "or drops noise by what it is added to, and each site clips its own delta; "
                + (f'use "{off}"' if off else "remove it")
            )


def _no_late_deltas(config: FederationTables) -> Iterator[str]:
    policy = config.policy
    if policy.carries:
        late = modes.get("policies", policy.kind).carried_by(policy)
        yield (
            f'policy.{late} does not go with privacy.unit = "site": a late delta weighs less, and '
            'so does its noise; use kind = "all", or kind = "quorum" with late = "drop"'
        )


def _no_feedback(config: FederationTables) -> Iterator[str]:
    codec = config.codec
    if codec.feedback and "feedback" in codec.model_fields_set:  # a default gives way
        yield (
            'codec.feedback: expected false with privacy.unit = "site", got true: what a delta '
            "left out would take its noise off again in the next round"
        )


def _no_losses(config: FederationTables) -> Iterator[str]:
    if config.convergence.patience is not None:
        yield (
            'convergence.patience: expected none with privacy.unit = "site", got '
            f"{config.convergence.patience}: a held-out loss tells of a site's text without noise; "
            "remove it"
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


def _of_sites(config: FederationTables) -> Iterator[str]:
    if config.privacy is not None and config.privacy.of_sites:
        for rule in _RULES_OF_SITES:
            yield from rule(config)


_RULES_OF_SITES: Final[tuple[Callable[[FederationTables], Iterator[str]], ...]] = (
    _enough_sites,
    _one_site_of_all,
    _means_of_values,
    _no_norms,
    _no_late_deltas,
    _no_feedback,
    _no_losses,
)

PRIVACY_RULES: Final = (_of_sites, _equal_weights, _no_gradients, _no_bases_of_a_run)
