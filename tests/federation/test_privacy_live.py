"""Differential privacy in whole federations: told, accounted for, refused, and never left out."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import dataclass, replace

import pytest

from coordinator.history import read_history
from participant.privacy import Noise, epsilon_of
from participant.privacy.budget import SPENT_FILE
from participant.workspace import PRIVACY_FOLDER
from shared.errors import RunStuckError
from shared.protocol.privacy import PrivacySpent
from shared.stores.directory import DirectoryStore
from tests import federations
from tests.federation.test_simulate import gradualdiff, summary
from tests.numpy_learner import NumpyLearner
from tests.participant.test_killed_in_a_round import simulate
from tests.tiny_model import make_tiny_model, write_federation

PRIVACY = {"clip": 1.0, "noise_multiplier": 1.0}
SPENT = PrivacySpent(
    epsilon=1.0,
    total_epsilon=2.0,
    delta=1e-3,
    steps=1,
    rate=0.5,
    clip=1.0,
    noise_multiplier=1.0,
)
NOISE = Noise(2 / 18, 1.0)  # of the tiny federation: 18 examples train at each site
DELTA = 1 / 180


@dataclass
class Tells(NumpyLearner):
    """Says ``spent`` of its privacy, whatever it does."""

    spent: PrivacySpent | None = SPENT

    def take_budget(self, budget):
        self.budget = budget

    def learn(self, *args):
        return replace(super().learn(*args), privacy=self.spent)


def accepted(folder, run="test"):
    history = read_history(DirectoryStore(folder / "store"), run)
    return [
        record
        for number in sorted(history.rounds)
        for _, record in sorted(history.round(number).accepted.items())
    ]


def tellers(config, **spent):
    sites = {site: Tells(site) for site in config.run.participants}
    sites["b"].spent = spent.get("b", SPENT)
    return sites


def test_what_a_site_tells_goes_on_record(tmp_path):
    """With every number that epsilon needs to mean anything."""
    config = federations.config(privacy=PRIVACY)
    federations.run(config, tmp_path, tellers(config))
    assert {record.privacy for record in accepted(tmp_path)} == {SPENT}


def test_a_run_without_privacy_keeps_its_digest_and_its_records(tmp_path):
    """The new table is on record only where it is set."""
    config = federations.config()
    assert "privacy" not in config.recorded()
    assert config.recorded() == type(config).from_record(config.recorded(), "record").recorded()
    federations.run(config, tmp_path)
    assert all("privacy" not in record.model_dump() for record in accepted(tmp_path))
    private = federations.config(privacy=PRIVACY)
    assert private.digest != config.digest
    assert type(config).from_record(private.recorded(), "record").privacy == private.privacy


@pytest.mark.parametrize(
    ("spent", "says"),
    [
        (None, "privacy: expected what the site spent, got nothing"),
        (SPENT.model_copy(update={"clip": 2.0}), r"privacy.clip: expected 1, got 2"),
        (
            SPENT.model_copy(update={"noise_multiplier": 0.5}),
            r"privacy.noise_multiplier: expected 1, got 0.5",
        ),
    ],
)
def test_a_delta_with_less_noise_than_the_run_asks_for_is_refused(tmp_path, spent, says):
    """By the site's own word; a release that knows of no privacy says none."""
    config = federations.config(privacy=PRIVACY)
    with pytest.raises(RunStuckError, match=rf"waits for b .*{says}"):
        federations.run(config, tmp_path, tellers(config, b=spent))
    assert {record.site for record in accepted(tmp_path)} == {"a", "c"}


def test_a_target_and_a_delta_are_held_against_what_is_told():
    """The other two settings, and a word that keeps them all."""
    section = federations.config(
        privacy={"clip": 1.0, "target_epsilon": 1.0, "delta": 1e-3}
    ).privacy
    assert SPENT.problem(section) == ""
    more = SPENT.model_copy(update={"epsilon": 1.1})
    assert more.problem(section) == "privacy.target_epsilon: expected at most 1, got 1.1"
    other = SPENT.model_copy(update={"delta": 1e-2})
    assert other.problem(section) == "privacy.delta: expected 0.001, got 0.01"


# Over a real model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def federation(folder, model, privacy="noise_multiplier = 1.0", **values):
    return write_federation(
        folder, model, extra=f"[privacy]\nclip = 0.5\n{privacy}\n", **{"rounds": 2, **values}
    )


def epsilon(steps):
    return epsilon_of([(NOISE, steps)], DELTA)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    """A private run of two rounds."""
    folder = tmp_path_factory.mktemp("private")
    summary(gradualdiff("simulate", federation(folder, model), "--json"))
    return folder


@pytest.mark.model
@pytest.mark.slow
def test_epsilon_grows_from_round_to_round_and_nothing_else_leaves(whole):
    """As the accountant has it; no loss, no count of tokens, no norm of the training text."""
    records = accepted(whole, "tiny")
    told = {(record.round, record.site): record.privacy for record in records}
    assert [spent.steps for spent in told.values()] == [3, 3, 6, 6]
    for spent in told.values():
        assert spent.epsilon == spent.total_epsilon == epsilon(spent.steps)
        assert (spent.unit, spent.sampling, spent.delta) == ("record", "poisson", DELTA)
    for record in records:
        metrics = record.metrics
        losses = (metrics.train_nll, metrics.first_step_nll, metrics.last_step_nll)
        assert (*losses, metrics.mean_grad_norm, record.tokens) == (None, None, None, None, 1)
        assert metrics.steps == 3


@pytest.mark.model
@pytest.mark.slow
def test_it_is_shown_and_stands_on_the_model_card(whole, tmp_path):
    """Never epsilon by itself."""
    store = ("--store", whole / "store")
    shown = summary(gradualdiff("rounds", "show", "tiny", "2", *store, "--json"))
    assert {row["privacy"]["epsilon"] for row in shown["sites"]} == {epsilon(6)}
    run = summary(gradualdiff("runs", "show", "tiny", *store, "--json"))
    assert run["privacy"]["a"]["steps"] == 6
    assert run["config"]["privacy"]["clip"] == 0.5
    gradualdiff("runs", "export", "tiny", *store, "--to", tmp_path / "card")
    card = (tmp_path / "card" / "README.md").read_text()
    line = (
        f"- a: epsilon {epsilon(6):.3g} at delta 0.0056 for each record (6 steps, Poisson "
        "sampling at 0.111, clip 0.5, noise multiplier 1);"
    )
    assert line in card
    said = gradualdiff("rounds", "show", "tiny", "2", *store).stdout
    assert line.removeprefix("- ") in said
    done = gradualdiff("runs", "verify", "tiny", *store)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.model
@pytest.mark.slow
def test_another_run_on_the_same_text_spends_of_the_same_budget(whole, tmp_path):
    """Under another name, with other token limits: what counts is the text."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "federation.toml"
    sets = ["run.name=second", "training.max_answer_tokens=12", "run.rounds=1"]
    words = [word for one in sets for word in ("--set", one)]
    summary(gradualdiff("simulate", path, *words, "--json"))
    for record in accepted(tmp_path, "second"):
        assert record.privacy.epsilon == epsilon(3)
        assert record.privacy.total_epsilon == epsilon(9)


def killed_in_round_2(path):
    """A run whose process died in its second round, which both sites had paid for by then."""
    done, passed = simulate(path, point="training.stepped", nth=10)
    assert (done.returncode, passed[-1]) == (-signal.SIGKILL, "SIGKILL"), done.stderr
    return path


def said(done):
    assert done.returncode != 0
    return " ".join((done.stdout + done.stderr).split())


@pytest.mark.model
@pytest.mark.slow
def test_a_run_is_not_trained_beyond_its_target(tmp_path, model):
    """Two rounds use it up; a third one, asked for later, is refused with the number."""
    path = killed_in_round_2(federation(tmp_path, model, "target_epsilon = 4.0"))
    done = gradualdiff("runs", "extend", "tiny", "1", "--store", tmp_path / "store")
    assert done.returncode == 0, done.stderr
    told = said(gradualdiff("simulate", path, "--resume"))
    assert "privacy.target_epsilon: expected at most 4, got 4." in told
    last = accepted(tmp_path, "tiny")[-1]
    assert last.round == 2
    assert 3.9 < last.privacy.epsilon <= 4


@pytest.mark.model
@pytest.mark.slow
def test_a_lost_account_is_refused_and_not_begun_anew(tmp_path, model):
    """The run counted the sites' deltas of round 1, and their workspaces know of none."""
    path = killed_in_round_2(federation(tmp_path, model))
    accounts = [tmp_path / "sites" / site / PRIVACY_FOLDER for site in "ab"]
    for account in accounts:
        spent = json.loads((account / SPENT_FILE).read_text())
        assert [one["round"] for one in spent["spends"]] == [1, 2]
        shutil.rmtree(account)
    told = said(gradualdiff("simulate", path, "--resume"))
    assert "got nothing of what was spent in run tiny; put the folder back" in told
    assert not any(account.exists() for account in accounts)
