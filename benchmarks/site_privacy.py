"""``python benchmarks/site_privacy.py``: what protecting a whole site costs, by how many there are.

Sites fit one linear model of ``NUMBERS`` numbers, each on a few noisy examples of its own. Each
round's deltas get the product's own clip and noise (``SiteNoise``, every site in every round), and
their mean is added. The clip is the median norm of a first delta on text that counts as public.

Printed by number of sites: noise on the mean over the clip (sigma sqrt(numbers) / sites), epsilon
of all rounds at delta = 1 / (10 sites), and the held-out error before, without noise and with it. A
toy: it shows from where on the noise is small, and nothing of a real model. No run is refused here.
Some seconds on one core.
"""

from __future__ import annotations

import numpy as np

from participant.privacy import Mechanism, Noise, Secret, SiteNoise
from shared.config.privacy_rules import noise_ratio
from shared.seeds import derive_seed

NUMBERS, EXAMPLES, ROUNDS, STEPS, RATE = 64, 32, 30, 8, 0.02
SIGMA = 4.0
SITES = (5, 100, 1_000)
NOISE_IN_TEXT = 1.0


def generator(*parts: str | int) -> np.random.Generator:
    """Of its own for these parts."""
    return np.random.Generator(np.random.Philox(derive_seed(*parts)))


def examples(count: int, *parts: str | int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (count, NUMBERS) and what belongs to them, with noise, of one model for all."""
    truth = generator("truth").standard_normal(NUMBERS) / np.sqrt(NUMBERS)
    drawn = generator("examples", *parts)
    inputs = drawn.standard_normal((count, NUMBERS))
    return inputs, inputs @ truth + NOISE_IN_TEXT * drawn.standard_normal(count)


def trained(model: np.ndarray, inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The delta of a few steps of gradient descent: fp32 (NUMBERS,)."""
    mine = model.copy()
    for _ in range(STEPS):
        mine -= RATE * inputs.T @ (inputs @ mine - wanted) / len(wanted)
    return (mine - model).astype(np.float32)


def error_after(sites: int, steps: Mechanism | None) -> float:
    """Mean squared held-out error after all rounds; ``steps`` None: without clip and noise."""
    own = [examples(EXAMPLES, site) for site in range(sites)]
    inputs, wanted = examples(5_000, "held out")
    model, secret = np.zeros(NUMBERS), Secret(bytes(32))
    for number in range(ROUNDS):
        deltas = [trained(model, *text) for text in own]
        if steps is not None:
            deltas = [
                SiteNoise(
                    steps, float(np.linalg.norm(delta)), secret.derive(sites, site, number)
                ).values("model", delta)
                for site, delta in enumerate(deltas)
            ]
        model = model + np.mean(deltas, axis=0)
    return float(np.mean(np.square(inputs @ model - wanted)))


def main() -> None:
    """Print the table."""
    clip = float(
        np.median(
            [
                np.linalg.norm(trained(np.zeros(NUMBERS), *examples(EXAMPLES, "public", i)))
                for i in range(50)
            ]
        )
    )
    _, wanted = examples(5_000, "held out")
    before = float(np.mean(np.square(wanted)))
    print(f"{NUMBERS} numbers, {ROUNDS} rounds, sigma {SIGMA:g}, clip {clip:.3f}")
    print("| sites | noise / clip | epsilon | before | without | with |")
    print("|---:|---:|---:|---:|---:|---:|")
    for sites in SITES:
        delta = 1 / (10 * sites)
        steps = Mechanism(sites, Noise(1.0, SIGMA), clip, delta, 1, ROUNDS, fewest=sites)
        ratio = noise_ratio(SIGMA, NUMBERS, sites)
        plain, noisy = error_after(sites, None), error_after(sites, steps)
        print(
            f"| {sites:,} | {ratio:.3f} | {steps.epsilon:.2f} | {before:.3f} | {plain:.3f} | "
            f"{noisy:.3f} |"
        )


if __name__ == "__main__":
    main()
