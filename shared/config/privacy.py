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
    """What is protected: ``"record"``: each training example of a site, by noise that the site adds
    itself. ``"site"`` is refused in this release.
    """
    clip: Annotated[float, Field(gt=0)]
    """C: each example's gradient is scaled down to at most this norm, in place of
    ``training.max_grad_norm``.
    """
    noise_multiplier: Annotated[float, Field(ge=LEAST_NOISE, le=1_000)] | None = None
    """Sigma: the noise on the sum of an optimiser step has standard deviation sigma x C. Or
    ``target_epsilon``.
    """
    target_epsilon: Annotated[float, Field(gt=0, le=1_000)] | None = None
    """Each site takes the sigma with which all rounds of the run come to this epsilon, and trains
    no round beyond it.
    """
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Delta of (epsilon, delta); without it 1 / (10 n) for a site of n examples."""

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """Noise or epsilon."""
        return (self._noise_or_epsilon,)

    def _noise_or_epsilon(self) -> Iterator[str]:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            yield "give exactly one of noise_multiplier and target_epsilon"
