"""Federations that protect each site as a whole: the mean has the noise that is declared."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest

from coordinator.history import read_history
from coordinator.runs.branching import branch_run
from coordinator.runs.model_card import model_card
from coordinator.runs.operating import operator_ledger
from participant.privacy import Noise, budget, epsilon_of
from participant.workspace import PRIVACY_FOLDER
from shared import topology
from shared.config import privacy_rules
from shared.errors import DataError, RunStuckError
from shared.stores.directory import DirectoryStore
from shared.tensors.tensor_file import TensorFile
from tests import federations
from tests.federation.test_embedded import restarted
from tests.federation.test_secure import verified
from tests.numpy_learner import NumpyLearner, manifest_of

SECURE = {"aggregation": {"secure": True}, "codec": {"name": "int8"}}
WAYS = pytest.mark.parametrize("sections", [{}, SECURE], ids=["plain", "secure"])
FEW = "abc"  # sites of the small federations, and the numbers of their adapters: 64
SMALL = {"unit": "site", "clip": 1.0, "noise_multiplier": 0.2}


@pytest.fixture
def few(monkeypatch):
    """Three sites are enough: what is tested is not how many."""
    monkeypatch.setattr(privacy_rules, "LEAST_SITES", 3)


def config(sites=FEW, rounds=2, privacy=SMALL, **sections):
    return federations.config(sites, rounds, privacy=privacy, **sections)


def history(folder, run="test"):
    return read_history(DirectoryStore(folder / "store"), run)


def tensors(folder, sha):
    """An adapter of the run: name -> float64."""
    path = folder / f"{sha[:12]}.adapter"
    DirectoryStore(folder / "store").spool([topology.adapter_key("test", sha)], path)
    with TensorFile(path) as file:
        return {name: file.read(name).astype(np.float64) for name in file.layouts}


@dataclass
class Recording(NumpyLearner):
    """Keeps the delta that it trained last."""

    def __post_init__(self):
        self.deltas = {}
        self.fault = lambda _: self.keep

    def keep(self, spec, delta):
        self.deltas[spec.name] = delta
        return delta


# The noise ---------------------------------------------------------------------------------------


@pytest.mark.slow
@WAYS
def test_the_mean_has_the_noise_that_is_declared(tmp_path, sections):
    """A hundred sites and 4,032 numbers: what the mean is off by is a Gaussian of sigma x clip.

    By its deviation and its kurtosis, where more than the fewest deltas are there with more noise;
    the run verifies, and each site says what that costs.
    """
    sites = [f"s{number:03d}" for number in range(100)]
    privacy = {"unit": "site", "clip": 0.5, "noise_multiplier": 1.0}
    made = config(sites, 1, privacy, **sections)
    fewest = privacy_rules.fewest_deltas(made)
    learners = {site: Recording(site, manifest=manifest_of(1_000)) for site in sites}
    state = federations.run(made, tmp_path, learners)
    before = tensors(tmp_path, history(tmp_path).genesis.adapter_sha)
    after = tensors(tmp_path, state.adapter_sha)
    mean = dict.fromkeys(before, 0.0)
    for learner in learners.values():
        squares = [np.sum(np.square(d.astype(np.float64))) for d in learner.deltas.values()]
        norm = math.sqrt(sum(squares))
        assert norm > 1  # all are clipped
        for name, delta in learner.deltas.items():
            mean[name] = mean[name] + delta.astype(np.float64) * (0.5 / norm) / len(sites)
    off = np.concatenate([(after[n] - before[n] - mean[n]).reshape(-1) for n in before])
    assert off.size == 4_032
    declared = 0.5 * math.sqrt(len(sites) / fewest) / len(sites)
    assert off.std() == pytest.approx(declared, rel=0.05)
    assert declared >= 0.5 * 1.0 / len(sites)
    assert abs(off.mean()) < 5 * declared / math.sqrt(off.size)
    assert np.mean((off / off.std()) ** 4) == pytest.approx(3, abs=0.4)
    assert verified(tmp_path).findings == []
    cost = epsilon_of([(Noise(1.0, 1.0, bool(sections)), 1)], 1e-3)
    for record in history(tmp_path).round(1).accepted.values():
        told = record.privacy
        assert (told.unit, told.sampling, told.epsilon, told.steps) == ("site", "none", cost, 1)


@pytest.mark.usefixtures("few")
@WAYS
@pytest.mark.parametrize("mode", ["fedavg", "ffa", "rolora"])
def test_a_private_run_ends_and_verifies(tmp_path, sections, mode):
    """With each mode that adds values up; epsilon grows by round, and no loss leaves a site."""
    aggregation = {**sections.get("aggregation", {}), "averaging": mode}
    made = config(rounds=2, **{**sections, "aggregation": aggregation})
    state = federations.run(made, tmp_path)
    assert (state.last_round, verified(tmp_path).findings) == (2, [])
    found = history(tmp_path)
    for number in (1, 2):
        for record in found.round(number).accepted.values():
            metrics = record.metrics
            assert (metrics.held_out, metrics.train_nll, record.tokens) == (None, None, 1)
            assert record.privacy.steps == number
    assert all(not found.held_out(number) for number in range(3))


@pytest.mark.usefixtures("few")
def test_every_site_declines_where_the_noise_is_longer_than_an_update(tmp_path):
    """Only there is it known how many numbers an adapter has; each says how many would do."""
    made = config(privacy={**SMALL, "noise_multiplier": 0.5})
    with pytest.raises(
        RunStuckError, match=r"1.33 times as long.*0.5 x sqrt\(64\) / 3.*at most 36"
    ):
        federations.run(made, tmp_path)


@pytest.mark.usefixtures("few")
def test_no_round_is_closed_with_less_noise_than_the_run_promises(tmp_path):
    """Sites that fail are left out, but two of three deltas there must be."""
    policy = {"kind": "all", "on_failure": "exclude", "max_attempts": 1}
    made = config(rounds=1, privacy={**SMALL, "noise_multiplier": 0.1}, policy=policy)
    learners = federations.learners(made)

    def broken(_task):
        raise DataError("none")

    learners["a"].fault = broken
    assert federations.run(made, tmp_path / "two", learners).last_round == 1
    learners = federations.learners(made)
    learners["a"].fault = learners["b"].fault = broken
    with pytest.raises(RunStuckError, match=r"expected 2 deltas or more, got 1: fewer have less"):
        federations.run(made, tmp_path / "one", learners)


@pytest.mark.usefixtures("few")
def test_one_account_is_kept_for_the_site_over_all_runs(tmp_path):
    """A second run adds to the first one's; one whose account is gone goes on in no round."""
    federations.run(config(rounds=2), tmp_path)
    federations.run(config(rounds=1, name="second"), tmp_path)
    for record in history(tmp_path, "second").round(1).accepted.values():
        assert record.privacy.epsilon == epsilon_of([(Noise(1.0, 0.2), 1)], 1 / 30)
        assert record.privacy.total_epsilon == epsilon_of([(Noise(1.0, 0.2), 3)], 1 / 30)
    account = next(tmp_path.rglob(f"a/{PRIVACY_FOLDER}/{budget.SPENT_FILE}"))
    spends = json.loads(account.read_text())["spends"]
    assert [(one["run"], one["round"], one["text"]) for one in spends] == [
        ("test", 1, None),
        ("test", 2, None),
        ("second", 1, None),
    ]


@pytest.mark.usefixtures("few")
def test_a_model_card_says_what_its_epsilon_is_not_of(tmp_path):
    """A branch of a run without noise: what it began with is in no account."""
    federations.run(federations.config(), tmp_path)
    store = DirectoryStore(tmp_path / "store")
    parent, child = (operator_ledger(store, name, lambda: 1.0) for name in ("test", "new"))
    branch_run(parent, 3, child)
    state = federations.run(config(rounds=1, name="new"), tmp_path)
    settings = config().lora
    card = model_card(history(tmp_path, "new"), 1, state.adapter_sha, settings, "owner/m")
    assert "for the whole site, of what the mean of all deltas tells (1 round," in card
    assert "Not of what it began with: the adapter of test@3" in card
    plain = model_card(history(tmp_path, "test"), 3, state.adapter_sha, settings, "owner/m")
    assert "Not of what it began with" not in plain


# Deaths ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("few")
@WAYS
def test_dying_at_any_write_ends_in_the_same_adapter(tmp_path, monkeypatch, sections):
    """With the sites' secrets given: what was made again has the same noise, and is paid once."""
    monkeypatch.setattr(budget.secrets, "token_bytes", lambda size: bytes(range(size)))
    for folder in restarted(config(rounds=1, **sections), tmp_path):
        assert verified(folder).findings == []
        told = history(folder).round(1).accepted.values()
        assert {record.privacy.steps for record in told} == {1}
