"""A site's delta with noise: what a mean of many of them tells of any one site is bounded.

    z = clip(delta, C) + N(0, sigma^2 C^2 / K)        K: the fewest deltas that a round counts

The sum of K or more then carries N(0, sigma^2 C^2) at least, and a site that is left out of it (its
delta zero, its noise there) moves it by at most C. One delta alone has 1 / sqrt(K) of the noise.

For a secure sum the noise is of whole numbers on the round's public scale (the distributed discrete
Gaussian of Kairouz, Liu and Steinke 2021, arXiv:2102.06387): the delta is clipped to
C - step sqrt(d) / 2, so that rounding d numbers to the nearest cannot bring it beyond C, and each
number gets a discrete Gaussian of variance sigma^2 C^2 / (K step^2), rounded up. The sum of such is
no discrete Gaussian, but from a variance of 4 on so near to one that 1 / sigma grows by less than
1e-12 (their theorem 1: by 10 sqrt(d) times the sum over k of exp(-2 pi^2 variance k / (k + 1))).
Nothing is cut off after the noise: sums wrap around, and that tells nothing more.

The noise is a function of the site's secret, of the delta and of all that is asked of it: the same
delta never gets other noise, and no two deltas share theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from participant.privacy.discrete import MOST_VARIANCE, discrete_gaussian
from shared.errors import NotAcceptedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from participant.privacy.mechanism import Mechanism
    from participant.privacy.noise import Secret

MARGIN: Final = 1e-9  # keeps a clipped norm at or below its bound whatever rounding does in fp64
LEAST_VARIANCE: Final = 4


@dataclass(frozen=True)
class Grid:
    """Whole numbers in place of values. ``step``: what 1 stands for; ``bound``: clip before it.

    ``variance``: of one site's noise, in steps squared.
    """

    step: float
    bound: float
    variance: int


def grid_of(steps: Mechanism, step: float, numbers: int) -> Grid:
    """On a public scale of ``step``, for ``numbers`` of them. Raises NotAcceptedError.

    A scale can be too coarse or too fine to be used, and makes no noise smaller.
    """
    deviation = steps.noise.multiplier * steps.clip / step
    variance = math.ceil(deviation**2 / steps.fewest)
    bound = steps.clip - step * math.sqrt(numbers) / 2
    if bound < steps.clip / 2 or not LEAST_VARIANCE <= variance <= MOST_VARIANCE:
        raise NotAcceptedError(
            f"reaches: expected a scale of which {numbers} rounded numbers stay within half of "
            f"privacy.clip = {steps.clip:g}, and whose noise has a variance of {LEAST_VARIANCE} to "
            f"{MOST_VARIANCE} steps, got steps of {step:.3g} and {variance}; more noise would do, "
            "or a smaller adapter"
        )
    return Grid(step, bound, variance)


class SiteNoise:
    """One delta's. ``norm``: of the delta, L2 over all of its tensors; ``secret``: its alone."""

    def __init__(
        self, steps: Mechanism, norm: float, secret: Secret, grid: Grid | None = None
    ) -> None:
        bound = steps.clip if grid is None else grid.bound
        self._scale = min(1.0, bound / (norm * (1 + MARGIN))) if norm > 0 else 1.0
        self._deviation = steps.noise.multiplier * steps.clip / math.sqrt(steps.fewest)
        self._secret = secret
        self._grid = grid

    def clipped(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """A tensor of the clipped delta."""
        return values.astype(np.float64) * self._scale

    def values(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The tensor ``name`` with noise, in its shape; rounded to fp32 after all else."""
        noise = self._secret.derive("noise", name).stream().normal(values.size)
        noisy = self.clipped(values) + noise.reshape(values.shape) * self._deviation
        return noisy.astype(np.float32)

    def rounded(self, values: NDArray[np.float32]) -> NDArray[np.int64]:
        """A tensor of the clipped delta on the grid: with all others of norm C / step at most."""
        assert self._grid is not None  # whoever masks has a public scale
        return np.rint(self.clipped(values) / self._grid.step).astype(np.int64)

    def numbers(self, name: str, values: NDArray[np.float32]) -> NDArray[Any]:
        """The same with noise, in its shape."""
        assert self._grid is not None
        stream = self._secret.derive("numbers", name).stream()
        noise = discrete_gaussian(stream, self._grid.variance, values.size)
        return self.rounded(values) + noise.reshape(values.shape)
