"""Differential privacy of a run: what is protected, and how strongly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field

from shared.config.section import Section

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LEAST_NOISE: Final = 0.1  # below it, epsilon is in the thousands


class PrivacySection(Section):
    """Differential privacy. Without this table there is none."""

    unit: Literal["record", "site"] = "record"
    """What is protected: ``"record"``: each training example of a site, by noise in each of its
    steps. ``"site"``: all that a site trained on, by noise on its delta; only the mean of many
    sites has all of it. Both are added by the site itself.
    """
    clip: Annotated[float, Field(gt=0)]
    """C: each example's gradient is scaled down to at most this norm, in place of
    ``training.max_grad_norm``; of a site: its whole delta.
    """
    noise_multiplier: Annotated[float, Field(ge=LEAST_NOISE, le=1_000)] | None = None
    """Sigma: the noise on the sum of an optimiser step, or of all sites' deltas, has standard
    deviation sigma x C. Or ``target_epsilon``.
    """
    target_epsilon: Annotated[float, Field(gt=0, le=1_000)] | None = None
    """Each site takes the sigma with which all rounds of the run come to this epsilon, and trains
    no round beyond it.
    """
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Delta of (epsilon, delta); without it 1 / (10 n) for a site of n examples, or n sites."""

    @property
    def of_sites(self) -> bool:
        """Whether a site is protected as a whole, and not its records one by one."""
        return self.unit == "site"

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """Noise or epsilon."""
        return (self._noise_or_epsilon,)

    def _noise_or_epsilon(self) -> Iterator[str]:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            yield "give exactly one of noise_multiplier and target_epsilon"
