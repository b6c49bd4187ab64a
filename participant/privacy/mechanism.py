"""What a run's ``[privacy]`` comes to at one site, whose number of examples only it knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from participant.privacy.accountant import Noise, calibrated, epsilon_of
from shared.config.privacy_rules import noise_ratio
from shared.errors import NotAcceptedError

if TYPE_CHECKING:
    from shared.config import PrivacySection
    from shared.protocol.events import RunAnnounced


@dataclass(frozen=True)
class Mechanism:
    """The noisy steps of a run at a site of ``examples`` different examples.

    ``noise`` of each, how many ``in_round``, ``rounds`` of them. ``clip``: C. ``fewest``: above 0
    where the site is protected as a whole: so many deltas together have all of the noise, each has
    sigma x C / sqrt(fewest); then ``examples`` are the run's sites, and a step is a round.
    """

    examples: int
    noise: Noise
    clip: float
    delta: float
    in_round: int
    rounds: int
    fewest: int = 0

    @property
    def of_site(self) -> bool:
        """Whether the site is protected as a whole."""
        return self.fewest > 0

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


def mechanism_of_sites(announced: RunAnnounced, numbers: int) -> Mechanism:
    """Of a run that protects each site as a whole. ``numbers``: trained in a round, at most.

    No sampling makes epsilon smaller: whom a lot takes follows from the run's seed, which others
    know. Raises NotAcceptedError with the number where the noise would be longer than any update,
    ConfigError where no noise keeps the target, MissingPackageError.
    """
    privacy, sites, secure = announced.privacy, announced.participants, announced.secure
    if privacy is None or privacy.fewest is None:
        raise NotAcceptedError(
            "privacy: expected how many deltas a round has at least, got nothing; update the "
            "coordinator's release"
        )
    delta = privacy.delta or 1 / (10 * sites)
    sigma = privacy.noise_multiplier
    if sigma is None:
        assert privacy.target_epsilon is not None  # one of the two: see PrivacySection
        target = privacy.target_epsilon
        sigma = calibrated(target, delta, 1.0, announced.rounds, discrete=secure)
    ratio = noise_ratio(sigma, numbers, privacy.fewest)
    if ratio > 1:
        raise NotAcceptedError(
            'privacy.unit: expected noise no longer than an update with "site", got '
            f"{ratio:.3g} times as long: sigma x sqrt(numbers) / deltas = {sigma:.4g} x "
            f"sqrt({numbers}) / {privacy.fewest}; an adapter of at most "
            f'{int((privacy.fewest / sigma) ** 2)} numbers would do (lora.kind = "core", a lower '
            'rank, fewer modules), more sites, or unit = "record"'
        )
    noise = Noise(1.0, sigma, secure)
    return Mechanism(sites, noise, privacy.clip, delta, 1, announced.rounds, privacy.fewest)
