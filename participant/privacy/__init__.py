"""A site's differential privacy: its secret, its noise, and what of its budget is spent."""

from participant.privacy.accountant import Noise, epsilon_of
from participant.privacy.budget import Budget, Spend
from participant.privacy.mechanism import Mechanism, mechanism, mechanism_of_sites
from participant.privacy.noise import Secret
from participant.privacy.whole_site import SiteNoise, grid_of

__all__ = [
    "Budget",
    "Mechanism",
    "Noise",
    "Secret",
    "SiteNoise",
    "Spend",
    "epsilon_of",
    "grid_of",
    "mechanism",
    "mechanism_of_sites",
]
