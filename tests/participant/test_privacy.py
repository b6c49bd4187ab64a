"""Noise, accountant and budget: the parts of differential privacy that need no model."""

from __future__ import annotations

import hashlib
import os
import stat
import sys

import numpy as np
import pytest

from participant.privacy import Budget, Noise, Secret, Spend, epsilon_of, mechanism
from participant.privacy.budget import SEED_FILE, SPENT_FILE
from shared import failpoints
from shared.config import PrivacySection
from shared.errors import (
    ConfigError,
    MissingPackageError,
    NotAcceptedError,
    PrivacyBudgetError,
)

SECRET = Secret(bytes(range(32)))
DELTA = 1e-3
RECORDS = [hashlib.sha256(bytes([number])).hexdigest() for number in range(40)]


def spend(training="a", run="one", round_number=1, text="b", multiplier=2.0, steps=10) -> Spend:
    return Spend(
        run=run,
        round=round_number,
        training=training * 64,
        text=text * 64,
        rate=0.1,
        multiplier=multiplier,
        steps=steps,
    )


# Noise ---------------------------------------------------------------------------------------


def test_noise_is_standard_normal():
    """Mean, deviation, kurtosis and tails of a million, under one fixed key."""
    drawn = SECRET.stream().normal(1_000_001)
    assert drawn.shape == (1_000_001,)
    assert abs(drawn.mean()) < 4e-3
    assert drawn.std() == pytest.approx(1, abs=3e-3)
    assert np.mean(drawn**4) == pytest.approx(3, abs=0.03)
    assert np.mean(np.abs(drawn) > 1.96) == pytest.approx(0.05, abs=1e-3)
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 4e-3


def test_a_poisson_sample_draws_each_by_itself():
    """Rate, spread of the batch's size, and no pair that comes together more often than chance."""
    count, rate, steps = 200, 0.1, 4_000
    drawn = np.zeros((steps, count))
    for step in range(steps):
        drawn[step, SECRET.derive("sample", step).stream().chosen(count, rate)] = 1
    assert drawn.mean() == pytest.approx(rate, abs=2e-3)
    assert drawn.sum(axis=1).var() == pytest.approx(count * rate * (1 - rate), rel=0.1)
    together = drawn.T @ drawn / steps
    np.fill_diagonal(together, rate**2)
    assert np.abs(together - rate**2).max() < 0.01


def test_a_rate_of_one_draws_all_and_every_key_has_its_own_stream():
    """The boundary; and the numbers of one step say nothing of another's."""
    assert SECRET.stream().chosen(5, 1.0) == [0, 1, 2, 3, 4]
    one, two = SECRET.derive("noise", 1), SECRET.derive("noise", 2)
    assert not np.array_equal(one.stream().uniform(4), two.stream().uniform(4))
    assert np.array_equal(one.stream().uniform(4), SECRET.derive("noise", 1).stream().uniform(4))
    assert SECRET.derive("a", "b").seed != SECRET.derive("ab").seed


def test_the_stream_is_chacha20_as_rfc_8439_has_it():
    """Known answer: the first words of the all-zero key, RFC 8439 appendix A.1, vector 1."""
    first = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28")
    words = np.frombuffer(first, "<u8")
    wanted = ((words >> np.uint64(11)).astype(float) + 1) / 2**53
    assert np.array_equal(Secret(bytes(32)).stream().uniform(2), wanted)


def test_a_secret_shows_nothing_of_itself():
    """Neither in a log nor in a traceback."""
    assert repr(SECRET) == "Secret(...)"
    assert bytes(range(32)).hex()[:12] not in f"{SECRET!r}{SECRET.fingerprint}"


# Accountant ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "batch", "steps", "wanted"),
    [
        (1_000, 64, 200, [26, 11, 5.2, 2.6, 1.7]),
        (1_000, 64, 750, [58, 24, 10.9, 5.4, 3.6]),
        (2_000, 64, 750, [30, 11.5, 5.1, 2.6, 1.7]),
        (10_000, 64, 750, [8.6, 2.8, 1.0, 0.5, 0.3]),
        (10_000, 256, 750, [26, 10, 4.4, 2.2, 1.5]),
        (10_000, 512, 750, [51, 21, 9.6, 4.9, 3.2]),
        (50_000, 512, 1_000, [15, 5.3, 2.1, 1.0, 0.7]),
    ],
)
def test_the_accountant_gives_the_table(records, batch, steps, wanted):
    """Epsilon of sigma 0.5, 0.7, 1, 1.5 and 2 at delta = 1 / (10 n), to the table's digits."""
    found = [
        epsilon_of([(Noise(batch / records, sigma), steps)], 1 / (10 * records))
        for sigma in (0.5, 0.7, 1.0, 1.5, 2.0)
    ]
    assert found == pytest.approx(wanted, rel=0.04, abs=0.05)


def test_full_batches_are_the_gaussian_mechanism():
    """Against the closed form: n steps of sigma are one of sigma / sqrt(n) (Dong et al. 2019)."""
    from math import erf, exp, sqrt

    def normal(x):
        return (1 + erf(x / sqrt(2))) / 2

    sigma, steps = 4.0, 5
    mu = sqrt(steps) / sigma
    epsilon = epsilon_of([(Noise(1.0, sigma), steps)], 1e-5)
    exact = normal(-epsilon / mu + mu / 2) - exp(epsilon) * normal(-epsilon / mu - mu / 2)
    assert exact == pytest.approx(1e-5, rel=0.02)


def test_a_target_is_met_and_not_missed_by_much():
    """Sigma for epsilon 8: what it gives is at most 8, and a little less noise gives more."""
    privacy = PrivacySection(clip=1.0, target_epsilon=8.0)
    found = mechanism(privacy, 64, 1_000, 10, 20)
    assert (found.delta, found.noise.rate, found.steps) == (1e-4, 0.064, 200)
    assert 7.9 < found.epsilon <= 8
    less = Noise(0.064, found.noise.multiplier - 0.002)
    assert epsilon_of([(less, 200)], 1e-4) > 8


def test_a_target_that_nothing_keeps_is_refused():
    """Not an endless search."""
    with pytest.raises(ConfigError, match=r"privacy.target_epsilon: expected one that 200 steps"):
        mechanism(PrivacySection(clip=1.0, target_epsilon=1e-6, delta=1e-9), 1, 1, 10, 20)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    """The extra is named."""
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'gradualdiff-fed\[privacy\]'"):
        epsilon_of([(Noise(0.123, 1.0), 1)], 0.01)


# Budget --------------------------------------------------------------------------------------


def test_trainings_add_up_over_rounds_runs_and_restarts(tmp_path):
    """Each is a new Budget over the same folder: nothing is remembered but what is on disk."""
    one = [(Noise(0.1, 2.0), 10)]
    _, first = Budget(tmp_path / "p").charge(spend("a"), RECORDS, DELTA)
    _, second = Budget(tmp_path / "p").charge(spend("b", round_number=2), RECORDS, DELTA)
    _, other = Budget(tmp_path / "p").charge(spend("c", run="two"), RECORDS, DELTA)
    assert first == (epsilon_of(one, DELTA), epsilon_of(one, DELTA), 10)
    assert second == (epsilon_of(one * 2, DELTA), epsilon_of(one * 2, DELTA), 20)
    assert other == (epsilon_of(one, DELTA), epsilon_of(one * 3, DELTA), 10)


def test_the_same_training_again_costs_nothing_and_has_the_same_noise(tmp_path):
    """A retry after a kill: same bytes, same account."""
    budget = Budget(tmp_path / "p")
    key, first = budget.charge(spend("a"), RECORDS, DELTA)
    before = (tmp_path / "p" / SPENT_FILE).read_bytes()
    again, second = Budget(tmp_path / "p").charge(spend("a"), RECORDS, DELTA)
    assert (again.fingerprint, second) == (key.fingerprint, first)
    assert (tmp_path / "p" / SPENT_FILE).read_bytes() == before
    other, _ = budget.charge(spend("b"), RECORDS, DELTA)
    assert other.fingerprint != key.fingerprint


def test_a_text_pays_for_every_text_that_it_shares_a_record_with(tmp_path):
    """Neither one record more nor other limits open a new account; other records do."""
    budget = Budget(tmp_path / "p")
    budget.charge(spend("a"), RECORDS[:20], DELTA)
    _, more = budget.charge(spend("b", run="two", text="c"), RECORDS[19:30], DELTA)
    _, apart = budget.charge(spend("c", run="three", text="d"), RECORDS[30:], DELTA)
    assert more.total == epsilon_of([(Noise(0.1, 2.0), 20)], DELTA)
    assert apart.total == epsilon_of([(Noise(0.1, 2.0), 10)], DELTA)


def test_a_spent_budget_refuses_with_its_number_and_stays_as_it_was(tmp_path):
    """Both ceilings, at any delta; what was paid for already may still be trained."""
    folder = tmp_path / "p"
    _, first = Budget(folder).charge(spend("a"), RECORDS, DELTA)
    before = (folder / SPENT_FILE).read_bytes()
    tight = Budget(folder, first.total + 1e-9)
    with pytest.raises(
        NotAcceptedError, match=r"accept.max_epsilon: expected at most .*, got .* at delta 0.001"
    ):
        tight.charge(spend("b", run="two"), RECORDS, DELTA)
    with pytest.raises(NotAcceptedError, match=r"privacy.target_epsilon: expected at most"):
        Budget(folder).charge(spend("b"), RECORDS, DELTA, first.run + 1e-9)
    assert (folder / SPENT_FILE).read_bytes() == before
    assert tight.charge(spend("a"), RECORDS, DELTA)[1] == first


def test_both_files_are_their_owners_alone(tmp_path):
    """Mode 0600, whatever the umask is, and the seed stands in no other file."""
    old = os.umask(0)
    try:
        Budget(tmp_path / "p").charge(spend(), RECORDS, DELTA)
    finally:
        os.umask(old)
    files = {path.name: path for path in (tmp_path / "p").iterdir()}
    assert set(files) == {SEED_FILE, SPENT_FILE}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o600}
    assert files[SEED_FILE].read_bytes().hex() not in files[SPENT_FILE].read_text()


@pytest.mark.parametrize("missing", [SEED_FILE, SPENT_FILE])
def test_one_file_without_the_other_is_refused(tmp_path, missing):
    """A new seed would draw new noise for what was trained; a new account would forget it."""
    folder = tmp_path / "p"
    Budget(folder).charge(spend(), RECORDS, DELTA)
    (folder / missing).unlink()
    with pytest.raises(PrivacyBudgetError, match=rf"got no {missing}; put the folder back"):
        Budget(folder).charge(spend("b"), RECORDS, DELTA)


def test_a_folder_that_is_gone_is_refused_where_the_run_knows_better(tmp_path):
    """The coordinator names a delta of this site that was counted, and nothing of it is here."""
    Budget(tmp_path / "p").charge(spend(run="other"), RECORDS, DELTA)
    for folder in ("p", "gone"):
        with pytest.raises(PrivacyBudgetError, match=r"got nothing of what was spent in run one"):
            Budget(tmp_path / folder).charge(spend("b"), RECORDS, DELTA, begun=True)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"seed": "' + b"0" * 64 + b'"}'])
def test_a_damaged_account_is_refused(tmp_path, data):
    """Torn, empty, or another seed's."""
    Budget(tmp_path / "p").charge(spend(), RECORDS, DELTA)
    (tmp_path / "p" / SPENT_FILE).write_bytes(data)
    with pytest.raises(PrivacyBudgetError, match="put the folder back from a backup"):
        Budget(tmp_path / "p").charge(spend("b"), RECORDS, DELTA)


class Killed(BaseException):
    """As a SIGKILL: nothing catches it."""


@pytest.mark.parametrize("hit", range(1, 7))
def test_a_kill_at_any_write_forgets_nothing_and_pays_once(tmp_path, hit):
    """Account, seed and first payment, each before and after its write."""
    passed = []

    def hook(point):
        passed.append(point)
        if len(passed) == hit:
            raise Killed

    failpoints.arm(hook)
    try:
        with pytest.raises(Killed):
            Budget(tmp_path / "p").charge(spend(), RECORDS, DELTA)
    finally:
        failpoints.arm(None)
    _, found = Budget(tmp_path / "p").charge(spend(), RECORDS, DELTA)
    assert found.steps == 10
