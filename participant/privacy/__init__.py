"""A site's differential privacy: its secret, its noise, and what of its budget is spent."""

from participant.privacy.accountant import Noise, epsilon_of
from participant.privacy.budget import Budget, Spend
from participant.privacy.mechanism import Mechanism, mechanism
from participant.privacy.noise import Secret

__all__ = ["Budget", "Mechanism", "Noise", "Secret", "Spend", "epsilon_of", "mechanism"]
