"""What so many noisy steps reveal of one record, or of one site: (epsilon, delta).

A step is the Gaussian mechanism on a Poisson sample of the records; neighbours differ in one record
that is there or not. dp-accounting composes them by privacy loss distributions, always on the safe
side. Of a site a step is a round, and it is in all that it is accounted for (rate 1).

Noise of whole numbers has no such distribution of its loss in many dimensions. It satisfies
concentrated differential privacy as the continuous noise of its variance does (Canonne, Kamath and
Steinke 2020, arXiv:2004.00010), and what comes of that is composed by Renyi divergences instead:
a larger epsilon, by about a tenth.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from shared.errors import ConfigError, MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Iterable

INTERVAL = 1e-3  # of privacy loss; a finer one changes epsilon in its fourth digit
MOST_NOISE = 10_000.0
TOLERANCE = 1e-3  # of sigma


class Noise(NamedTuple):
    """One kind of step: sampling rate q and noise multiplier sigma. ``discrete``: whole numbers."""

    rate: float
    multiplier: float
    discrete: bool = False


def epsilon_of(steps: Iterable[tuple[Noise, int]], delta: float) -> float:
    """Epsilon of all these steps together: (kind, how many) each. Raises MissingPackageError.

    Infinite where no epsilon goes with this ``delta``.
    """
    counts: dict[Noise, int] = {}
    for noise, count in steps:
        counts[noise] = counts.get(noise, 0) + count
    return _epsilon(tuple(sorted(counts.items())), delta)


@functools.lru_cache(maxsize=256)
def _epsilon(steps: tuple[tuple[Noise, int], ...], delta: float) -> float:
    accounting = _library()
    if any(noise.discrete for noise, _ in steps):
        accountant = accounting.rdp.RdpAccountant()
    else:
        accountant = accounting.pld.PLDAccountant(value_discretization_interval=INTERVAL)
    for noise, count in steps:
        accountant.compose(_event(accounting, noise), count)
    epsilon = float(accountant.get_epsilon(delta))
    return epsilon if math.isfinite(epsilon) else math.inf


@functools.lru_cache(maxsize=64)
def calibrated(
    epsilon: float, delta: float, rate: float, steps: int, *, discrete: bool = False
) -> float:
    """The least sigma, to 0.001, with which ``steps`` steps stay within ``epsilon``.

    By bisection: epsilon falls as sigma grows. Raises ConfigError if there is none.
    """
    low, high = 0.0, 1.0
    while epsilon_of([(Noise(rate, high, discrete), steps)], delta) > epsilon:
        low, high = high, 2 * high
        if high > MOST_NOISE:
            raise ConfigError(
                f"privacy.target_epsilon: expected one that {steps} steps at a sampling rate of "
                f"{rate:g} can keep, got {epsilon:g}; raise it, or train fewer steps"
            )
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        noise = Noise(rate, middle, discrete)
        if middle > 0.05 and epsilon_of([(noise, steps)], delta) <= epsilon:
            high = middle
        else:
            low = middle
    return high


class _Library(NamedTuple):
    events: Any
    pld: Any
    rdp: Any


def _event(accounting: _Library, noise: Noise) -> Any:
    gaussian = accounting.events.GaussianDpEvent(noise.multiplier)
    return accounting.events.PoissonSampledDpEvent(noise.rate, gaussian)


def _library() -> _Library:
    try:
        from dp_accounting import dp_event  # noqa: PLC0415 - an extra, and slow to load
        from dp_accounting.pld import pld_privacy_accountant  # noqa: PLC0415
        from dp_accounting.rdp import rdp_privacy_accountant  # noqa: PLC0415
    except ImportError as error:
        raise MissingPackageError(
            f"privacy: expected the package dp-accounting, got no {error.name}; "
            "run: pip install 'gradualdiff-fed[privacy]'"
        ) from None
    return _Library(dp_event, pld_privacy_accountant, rdp_privacy_accountant)
