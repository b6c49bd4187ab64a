"""What a run's ``[privacy]`` comes to at one site, whose number of examples only it knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from participant.privacy.accountant import Noise, calibrated, epsilon_of

if TYPE_CHECKING:
    from shared.config import PrivacySection


@dataclass(frozen=True)
class Mechanism:
    """The noisy steps of a run at a site of ``examples`` different examples.

    ``noise`` of each, how many ``in_round``, ``rounds`` of them. ``clip``: C.
    """

    examples: int
    noise: Noise
    clip: float
    delta: float
    in_round: int
    rounds: int

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.in_round * self.rounds

    @property
    def epsilon(self) -> float:
        """Of the whole run. Raises MissingPackageError."""
        return epsilon_of([(self.noise, self.steps)], self.delta)


def mechanism(
    privacy: PrivacySection, batch: int, examples: int, in_round: int, rounds: int
) -> Mechanism:
    """``batch``: examples that a step is expected to draw.

    Raises ConfigError where no noise keeps the target, MissingPackageError.
    """
    delta = privacy.delta or 1 / (10 * examples)
    rate = min(1.0, batch / examples)
    sigma = privacy.noise_multiplier
    if sigma is None:
        assert privacy.target_epsilon is not None  # one of the two: see PrivacySection
        sigma = calibrated(privacy.target_epsilon, delta, rate, rounds * in_round)
    return Mechanism(examples, Noise(rate, sigma), privacy.clip, delta, in_round, rounds)
