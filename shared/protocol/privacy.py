"""What a site tells of its differential privacy with a delta: never an epsilon by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from shared.protocol.bounds import Count, Figure
from shared.protocol.manifest import Schema

if TYPE_CHECKING:
    from shared.config import PrivacySection

Part = Annotated[Figure, Field(gt=0, le=1)]
Positive = Annotated[Figure, Field(gt=0)]


class PrivacySpent(Schema):
    """What a site's trainings revealed of one of its records, or of the site, by its own word.

    Of a record: composed by privacy loss distributions over ``steps`` Gaussian mechanisms,
    neighbours differing in one record that is there or not. Of a site: the same over means of
    deltas, neighbours differing in one delta that is itself or zero; with a secure sum, whose noise
    is of whole numbers, by concentrated differential privacy.
    """

    unit: Literal["record", "site"] = "record"
    """What is protected: one training example, equal ones being one; or all that the site trained
    on.
    """
    sampling: Literal["poisson", "none"] = "poisson"
    """How a step's examples are drawn: each by itself with probability ``rate``; ``none``: a site
    is in each round that it tells of.
    """
    epsilon: Positive
    """Of this run so far, this delta included."""
    total_epsilon: Positive
    """Of all that was trained at the site on text that shares a record with this one, in whatever
    run; of a site: of all its runs that protect sites.
    """
    delta: Part
    """Delta of both."""
    steps: Count
    """Noisy steps of this run so far; of a site: rounds."""
    rate: Part
    """Sampling rate of this round's steps: expected batch / examples; 1 of a site."""
    clip: Positive
    """C: largest norm of one example's gradient, or of the site's delta."""
    noise_multiplier: Positive
    """Sigma: noise on a step's sum, or on the sum of all deltas, / C."""

    def problem(self, wanted: PrivacySection) -> str:
        """How this is less than what a run asks for; empty if it is not."""
        least, most = wanted.noise_multiplier, wanted.target_epsilon
        if self.unit != wanted.unit:
            return f"privacy.unit: expected {wanted.unit}, got {self.unit}"
        if self.clip != wanted.clip:
            return f"privacy.clip: expected {wanted.clip:g}, got {self.clip:g}"
        if least is not None and self.noise_multiplier < least:
            return f"privacy.noise_multiplier: expected {least:g}, got {self.noise_multiplier:g}"
        if most is not None and self.epsilon > most:
            return f"privacy.target_epsilon: expected at most {most:g}, got {self.epsilon:g}"
        if wanted.delta is not None and self.delta != wanted.delta:
            return f"privacy.delta: expected {wanted.delta:g}, got {self.delta:g}"
        return ""

    def words(self) -> str:
        """In one line."""
        if self.unit == "site":
            rounds = "1 round" if self.steps == 1 else f"{self.steps} rounds"
            return (
                f"epsilon {self.epsilon:.3g} at delta {self.delta:.2g} for the whole site, of what "
                f"the mean of all deltas tells ({rounds}, without sampling, clip {self.clip:g}, "
                f"noise multiplier {self.noise_multiplier:.4g}); all of the site's runs that "
                f"protect sites: {self.total_epsilon:.3g}"
            )
        return (
            f"epsilon {self.epsilon:.3g} at delta {self.delta:.2g} for each {self.unit} "
            f"({self.steps} steps, {self.sampling.capitalize()} sampling at {self.rate:.3g}, "
            f"clip {self.clip:g}, noise multiplier {self.noise_multiplier:.4g}); all of the site's "
            f"runs on this text: {self.total_epsilon:.3g}"
        )
