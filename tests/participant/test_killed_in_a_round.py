"""SIGKILL in the middle of local trainings of a real federation: the same adapter comes out.

Each case is one run whose process is killed again and again, at another point each time, and ends
in the adapter of a run that nothing disturbed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import signal
import subprocess
import sys

import pytest

from participant.privacy import Secret
from participant.privacy.budget import SEED_FILE, SPENT_FILE, Spent
from participant.workspace import PRIVACY_FOLDER
from shared.config import canonical_json
from tests.patience import PATIENCE_SECONDS
from tests.tiny_model import make_tiny_model, write_federation

pytestmark = [pytest.mark.model, pytest.mark.slow]

EVERY_SECONDS = 25.0  # with steps of 10 s: after every third step
STEPS_APART = 3
STEPS = 5
SITES = 2

CASES = {
    "reset, local_steps": (
        'optimizer_state = "reset"\nlocal_steps = 5\n',
        1,
        [
            ("training.stepped", 3),  # just before it
            ("checkpoint.adapter_written", 1),  # in it
            ("checkpoint.renamed", 1),  # just after it
            ("checkpoint.cleared", 1),  # the round is committed, and nobody knows
            ("checkpoint.progress_written", 2),  # of the other site
        ],
    ),
    "keep, local_epochs, accumulated, feedback": (
        (
            'optimizer_state = "keep"\nlocal_epochs = 1\ngradient_accumulation = 2\n'
            '[codec]\nname = "uniform4"\n'
        ),
        2,
        [
            ("checkpoint.optimizer_written", 2),  # round 1, the second site
            ("training.stepped", 9),  # round 2: 2 steps of site b, then 5 of a, then 2 of b
            ("checkpoint.old_removed", 2),  # round 2, the second site, step 3
            ("training.stepped", 1),
        ],
    ),
    "private": (
        "local_steps = 5\n[privacy]\nclip = 0.5\nnoise_multiplier = 1.0\n",
        1,
        [
            ("budget.before", 1),  # neither site has paid: the account is there, and the seed
            ("budget.after", 1),  # paid for, and not a step of it done
            ("training.stepped", 3),
            ("checkpoint.renamed", 1),
            ("training.stepped", 4),  # of the other site
        ],
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def federation(folder, model, training, rounds, every_seconds=EVERY_SECONDS):
    path = write_federation(folder, model, rounds=rounds, extra=training)
    text = path.read_text()
    assert "local_steps = 3\n" in text
    path.write_text(text.replace("local_steps = 3\n", ""))
    for name in "ab":
        site = folder / f"{name}.toml"
        site.write_text(
            site.read_text().replace("[data]", f"checkpoint_seconds = {every_seconds}\n[data]")
        )
        give_seed(folder / "sites" / name / PRIVACY_FOLDER)
    return path


def give_seed(folder):
    """A secret that two runs share, as no two sites ever do: else no bytes could be compared."""
    folder.mkdir(parents=True)
    seed = hashlib.sha256(folder.parent.name.encode()).digest()
    (folder / SEED_FILE).write_bytes(seed)
    spent = Spent(seed=Secret(seed).fingerprint)
    (folder / SPENT_FILE).write_bytes(canonical_json(spent.model_dump(mode="json")))


def simulate(path, *options, point="-", nth=0, name="SIGKILL"):
    """One process. Its end, and the points it passed."""
    trace = path.with_name("trace.txt")
    trace.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.participant.killed", trace, name, point, nth]
    command += ["simulate", path, "--json", *options]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    return done, trace.read_text().splitlines()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    """By case: the summary of a run that nothing disturbs, and the points it passed."""

    @functools.cache
    def run(case):
        training, rounds, _ = CASES[case]
        done, passed = simulate(
            federation(tmp_path_factory.mktemp("whole"), model, training, rounds)
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), passed

    return run


@pytest.mark.parametrize("case", CASES)
def test_kills_inside_rounds_end_in_the_same_adapter(whole, model, tmp_path, case):
    """A kill costs at most one interval; a round that was committed is not trained again."""
    training, rounds, kills = CASES[case]
    wanted, through = whole(case)
    assert through.count("training.stepped") == rounds * SITES * STEPS
    path = federation(tmp_path, model, training, rounds)
    options, passed = [], []
    for point, nth in kills:
        done, here = simulate(path, *options, point=point, nth=nth)
        assert (done.returncode, here[-2:]) == (-signal.SIGKILL, [point, "SIGKILL"]), done.stderr
        passed += here
        options = ["--resume"]
    done, here = simulate(path, "--resume")
    passed += here
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapter_sha"] == wanted["adapter_sha"]
    again = passed.count("training.stepped") - through.count("training.stepped")
    assert 0 < again <= len(kills) * STEPS_APART
    assert passed.count("checkpoint.cleared") == through.count("checkpoint.cleared")


def test_sigterm_costs_no_step(whole, model, tmp_path):
    """The process keeps what is done before it ends, however long the interval is."""
    case = "reset, local_steps"
    wanted, through = whole(case)
    training, rounds, _ = CASES[case]
    path = federation(tmp_path, model, training, rounds, 3600.0)
    done, passed = simulate(path, point="training.stepped", nth=7, name="SIGTERM")
    assert done.returncode == 130, done.stderr
    assert passed.count("checkpoint.begun") == 1
    done, here = simulate(path, "--resume")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapter_sha"] == wanted["adapter_sha"]
    steps = [line for line in passed + here if line == "training.stepped"]
    assert len(steps) == through.count("training.stepped")
