"""A site's noise on its delta: exact whole numbers, a clip that holds, one noise for one delta."""

from __future__ import annotations

import math

import numpy as np
import pytest

from participant.acceptance import objections
from participant.privacy import (
    Budget,
    Mechanism,
    Noise,
    Secret,
    SiteNoise,
    Spend,
    epsilon_of,
    grid_of,
    mechanism_of_sites,
)
from participant.privacy.discrete import MOST_VARIANCE, discrete_gaussian
from shared.config import AcceptSection
from shared.errors import NotAcceptedError
from shared.protocol.events import WirePrivacy
from tests.participant.test_acceptance import ready, run

SECRET = Secret(bytes(range(32)))
NUMBERS = 4_000
STEPS = Mechanism(100, Noise(1.0, 4.0), 1.0, 1e-3, 1, 50, fewest=64)
WHOLE = Mechanism(100, Noise(1.0, 4.0, discrete=True), 1.0, 1e-3, 1, 50, fewest=64)


def probabilities(variance, most):
    """Of -most to most: float64 [2 most + 1]."""
    weights = np.exp(-np.square(np.arange(-most, most + 1.0)) / (2 * variance))
    return weights / weights.sum()


# Whole numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [1, 4, 50])
def test_the_sampler_is_a_discrete_gaussian(variance):
    """Chi-square of 400,000 numbers against the exact distribution: within five deviations."""
    count = 400_000
    drawn = discrete_gaussian(SECRET.derive("chi", variance).stream(), variance, count)
    most = 60
    expected = probabilities(variance, most) * count
    often = expected >= 20
    seen = np.bincount(drawn + most, minlength=2 * most + 1)
    chi = np.sum(np.square(seen[often] - expected[often]) / expected[often])
    freedom = np.count_nonzero(often) - 1
    assert abs(chi - freedom) < 5 * math.sqrt(2 * freedom)
    assert seen[~often].sum() < expected[~often].sum() + 40


@pytest.mark.parametrize("variance", [4, 1_000, 250_000, MOST_VARIANCE])
def test_its_moments_are_those_of_a_gaussian(variance):
    """Mean, variance, kurtosis and neighbours of 200,000, up to the largest variance."""
    drawn = discrete_gaussian(SECRET.derive("moments", variance).stream(), variance, 200_000)
    scaled = drawn / math.sqrt(variance)
    assert drawn.dtype == np.int64
    assert abs(scaled.mean()) < 0.012
    assert scaled.var() == pytest.approx(1, abs=0.016)
    assert np.mean(scaled**4) == pytest.approx(3, abs=0.12)
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.012


def test_the_sampler_says_the_same_for_the_same_key_and_refuses_what_it_cannot_do():
    """Of any length, none too; a variance beyond 64-bit products is a mistake."""
    one, two = (discrete_gaussian(SECRET.derive("a").stream(), 9, 50) for _ in range(2))
    assert np.array_equal(one, two)
    assert discrete_gaussian(SECRET.stream(), 9, 0).shape == (0,)
    for variance in (0, MOST_VARIANCE + 1):
        with pytest.raises(ValueError, match="variance: expected 1 to"):
            discrete_gaussian(SECRET.stream(), variance, 1)


@pytest.mark.parametrize(("variance", "count"), [(1, 2), (1, 5), (2, 3)])
def test_a_sum_of_them_is_as_near_to_one_as_the_theorem_says(variance, count):
    """Kairouz, Liu and Steinke 2021, theorem 1: the log ratio is at most tau, computed exactly."""
    most, summed = 40, np.ones(1)
    for _ in range(count):
        summed = np.convolve(summed, probabilities(variance, most))
    middle = len(summed) // 2
    near = slice(middle - 6, middle + 7)  # further out fp64 holds no such differences
    wanted = probabilities(count * variance, middle)[near]
    tau = 10 * sum(math.exp(-2 * math.pi**2 * variance * k / (k + 1)) for k in range(1, count))
    assert np.abs(np.log(summed[near] / wanted)).max() <= tau + 1e-12


# Clip and noise ----------------------------------------------------------------------------------


def deltas():
    """Tensors of deltas: long, short, zero, one number that is all, and hostile ones."""
    generator = np.random.Generator(np.random.Philox(1))
    long = generator.standard_normal(NUMBERS).astype(np.float32)
    single = np.zeros(NUMBERS, np.float32)
    single[7] = 1e30
    half = np.full(NUMBERS, 1 / 64, np.float32) * np.float32(1.0001)
    return {
        "long": long * 100,
        "short": long * 1e-6,
        "zero": np.zeros(NUMBERS, np.float32),
        "single": single,
        "halves": half,
    }


def norm_of(values):
    return math.sqrt(math.fsum(np.square(values.astype(np.float64))))


@pytest.mark.parametrize("name", deltas())
def test_a_clipped_delta_is_no_longer_than_the_clip(name):
    """As values, and as whole numbers after rounding, exactly."""
    values = deltas()[name]
    norm = norm_of(values)
    clipped = SiteNoise(STEPS, norm, SECRET).clipped(values)
    assert norm_of(clipped) <= STEPS.clip
    if norm <= STEPS.clip:
        assert np.array_equal(clipped, values)
    step = float(np.float32(2 / (32 * math.ceil(math.sqrt(NUMBERS)))))
    grid = grid_of(WHOLE, step, NUMBERS)
    numbers = SiteNoise(WHOLE, norm, SECRET, grid).rounded(values)
    assert sum(int(number) ** 2 for number in numbers) <= (WHOLE.clip / step) ** 2
    assert np.abs(numbers * step - clipped).max() <= step / 2 + 0.04 * np.abs(clipped).max()


def test_the_worst_rounding_stays_within_the_clip():
    """Every number half a step up: as far as rounding can lengthen a delta."""
    step = 1 / 600
    grid = grid_of(WHOLE, step, NUMBERS)
    values = np.full(NUMBERS, grid.bound / math.sqrt(NUMBERS), np.float32)
    for nudge in np.linspace(0.9, 1.1, 41):
        wanted = (values * np.float32(nudge)).astype(np.float32)
        numbers = SiteNoise(WHOLE, norm_of(wanted), SECRET, grid).rounded(wanted)
        assert int(np.sum(numbers**2)) <= (WHOLE.clip / step) ** 2


@pytest.mark.parametrize("name", deltas())
def test_one_site_moves_a_sum_by_no_more_than_the_clip(name):
    """Its delta there or zero, under the same noise: the sensitivity that is accounted for."""
    values, zeros = deltas()[name], np.zeros(NUMBERS, np.float32)
    grid = grid_of(WHOLE, 1 / 1024, NUMBERS)
    masked = [SiteNoise(WHOLE, norm_of(v), SECRET, grid).numbers("x", v) for v in (values, zeros)]
    assert int(np.sum((masked[0] - masked[1]) ** 2)) <= 1024**2
    plain = [SiteNoise(STEPS, norm_of(v), SECRET).values("x", v) for v in (values, zeros)]
    assert norm_of(plain[0].astype(np.float64) - plain[1]) <= STEPS.clip * (1 + 1e-5)  # fp32's


def test_the_noise_of_the_fewest_deltas_together_is_what_is_declared():
    """Sigma x clip on the sum of 64: floats, and whole numbers, which have no less."""
    zeros = np.zeros(NUMBERS, np.float32)
    grid = grid_of(WHOLE, 1 / 1024, NUMBERS)
    plain, masked = np.zeros(NUMBERS), np.zeros(NUMBERS)
    for site in range(STEPS.fewest):
        secret = SECRET.derive("site", site)
        plain += SiteNoise(STEPS, 0.0, secret).values("x", zeros)
        masked += SiteNoise(WHOLE, 0.0, secret, grid).numbers("x", zeros) * grid.step
    assert plain.std() == pytest.approx(4.0, rel=0.05)
    assert masked.std() == pytest.approx(4.0, rel=0.05)
    assert grid.variance * grid.step**2 * STEPS.fewest >= 16.0


def test_tensors_and_secrets_share_no_noise_and_the_same_is_said_again():
    """By name of the tensor, by training; and a value's own shape."""
    zeros = np.zeros((4, 5), np.float32)
    one = SiteNoise(STEPS, 0.0, SECRET)
    assert one.values("x", zeros).shape == (4, 5)
    assert np.array_equal(one.values("x", zeros), SiteNoise(STEPS, 0.0, SECRET).values("x", zeros))
    other = SiteNoise(STEPS, 0.0, SECRET.derive("other"))
    assert not np.array_equal(one.values("x", zeros), one.values("y", zeros))
    assert not np.array_equal(one.values("x", zeros), other.values("x", zeros))


@pytest.mark.parametrize(("step", "numbers"), [(0.5, 100), (1e-6, 100), (1 / 40, 10_000)])
def test_a_scale_that_is_too_coarse_or_too_fine_is_refused(step, numbers):
    """Whatever a coordinator says: rounding may take no more than half of the clip."""
    with pytest.raises(NotAcceptedError, match=r"reaches: expected a scale.*steps of"):
        grid_of(WHOLE, step, numbers)


# What it costs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("sites", "rounds", "wanted"), [(100, 50, 6.45), (1_000, 30, 5.55)])
def test_the_accountant_gives_the_figures_of_the_notes(sites, rounds, wanted):
    """Sigma 4, every site in each round, delta = 1 / (10 K); whole numbers cost a tenth more."""
    found = epsilon_of([(Noise(1.0, 4.0), rounds)], 1 / (10 * sites))
    assert found == pytest.approx(wanted, abs=0.02)
    whole = epsilon_of([(Noise(1.0, 4.0, discrete=True), rounds)], 1 / (10 * sites))
    assert found < whole < 1.15 * found


def private_run(fewest=100, secure=False, **privacy):
    section = {"unit": "site", "clip": 1.0, "noise_multiplier": 4.0, **privacy}
    if "target_epsilon" in privacy:
        del section["noise_multiplier"]
    update = {"privacy": WirePrivacy(**section, fewest=fewest), "secure": secure}
    return run().model_copy(update={**update, "participants": 100, "rounds": 50})


def test_noise_longer_than_an_update_is_refused_with_the_number():
    """At the last number of an adapter that goes, and one beyond."""
    assert mechanism_of_sites(private_run(), 625).fewest == 100
    with pytest.raises(
        NotAcceptedError,
        match=r"got 1 times as long: sigma x sqrt\(numbers\) / deltas = 4 x sqrt\(626\) / 100; an "
        r"adapter of at most 625 numbers",
    ):
        mechanism_of_sites(private_run(), 626)


@pytest.mark.parametrize("secure", [False, True])
def test_a_target_gives_all_sites_one_sigma(secure):
    """With it all rounds of the run stay within the target, and hardly below."""
    found = mechanism_of_sites(private_run(secure=secure, target_epsilon=6.0), 100)
    assert (found.delta, found.noise.discrete, found.rounds) == (1e-3, secure, 50)
    assert 5.98 < found.epsilon <= 6.0


def test_what_a_site_accepts_is_held_against_the_unit():
    """A whole site's noise on a delta by itself is little: "required" wants it behind a sum."""

    def said(privacy, announced):
        accept = AcceptSection(models=("owner/m",), privacy=privacy)
        return objections(announced, accept, ready(5_000))

    plain, masked = private_run(), private_run(secure=True)
    records = plain.model_copy(update={"privacy": WirePrivacy(clip=1.0, noise_multiplier=1.0)})
    assert "accept.privacy" in said("required", plain)
    assert "accept.privacy: expected a run with [privacy]" in said("site", run())
    assert 'expected a run with privacy.unit = "site", got "record"' in said("site", records)
    for privacy, announced in (("required", masked), ("site", plain), ("required", records)):
        assert "accept.privacy" not in said(privacy, announced)


def test_a_whole_site_has_an_account_of_its_own(tmp_path):
    """All its runs count, whatever the text; trainings for records do not, nor these for them."""
    budget = Budget(tmp_path / "p")
    whole = Spend(
        run="one", round=1, training="a" * 64, text=None, rate=1.0, multiplier=4.0, steps=1
    )
    record = whole.model_copy(update={"training": "b" * 64, "text": "c" * 64, "rate": 0.1})
    _, first = budget.charge(whole, (), 1e-3)
    assert budget.charge(whole, (), 1e-3)[1] == first
    _, of_records = budget.charge(record, ["d" * 64], 1e-3)
    second = whole.model_copy(update={"run": "two", "training": "e" * 64})
    _, found = budget.charge(second, (), 1e-3)
    assert of_records.total == epsilon_of([(Noise(0.1, 4.0), 1)], 1e-3)
    assert (found.run, found.steps) == (first.run, 1)
    assert found.total == epsilon_of([(Noise(1.0, 4.0), 2)], 1e-3)
    planned = mechanism_of_sites(private_run(), 100)
    assert budget.with_run("three", planned, ["d" * 64]) == epsilon_of(
        [(Noise(1.0, 4.0), 52)], 1e-3
    )
