"""A store that an earlier release wrote is shown, verified, exported and resumed by this one."""

from __future__ import annotations

import hashlib
import json
import math
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradualdiff.cli.main import app
from shared.config import FederationConfig
from shared.protocol.ledger import Ledger
from tests import federations
from tests.steering import store_of, verify

HERE = Path(__file__).parent
SHOWN = json.loads((HERE / "shown.json").read_text())
FINISHED = {
    "whole": "7281cb5f273a4bc2f1fdf6a3da2f3a9595df52796da36bd9514ee686110c2ddd",
    "turns": "84fb36c041ca0180b909c4616a15cf5854d8d8b6e0b12580365cb8cbd37fee09",
    "buffer": "479c03e171d1062e7c32831336e2bea238ccd7022f3d4c14c3dd74116ad20150",
}
KILLED = {  # where the earlier release ended after it was started again
    "branch": "407bf3c00ed12ee7b5c1390652c3e0d5ed2a7e913b9000dcd43a05c6a678a6da",
    "stack": "cc3634cd107e7da45a6b3cf415052a7ebca74b235e128e9e8418e96e63083ce9",
}


@pytest.fixture
def folder(tmp_path):
    """The old federation's folder, to write into."""
    with tarfile.open(HERE / "store.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def gradualdiff(folder, *words):
    done = CliRunner().invoke(app, [*words, "--store", str(folder / "store")])
    assert done.exit_code == 0, (words, done.output)
    return done.stdout


def assert_says(now, then, where):
    """All that was said is said, number by number. A release may say more than the one before."""
    if isinstance(then, dict):
        assert set(then) <= set(now), where
        for key, value in then.items():
            assert_says(now[key], value, f"{where}.{key}")
    elif isinstance(then, list):
        assert len(now) == len(then), where
        for index, value in enumerate(then):
            assert_says(now[index], value, f"{where}[{index}]")
    elif isinstance(then, float):
        assert math.isclose(now, then, rel_tol=1e-12), where  # another C library's last digit
    else:
        assert now == then, where


def test_it_is_shown_as_it_was(folder):
    """Runs list, runs show, rounds list and rounds show, of every run and round."""
    for command, then in SHOWN.items():
        now = json.loads(gradualdiff(folder, *command.split(), "--json"))
        assert_says(now, then, command)


@pytest.mark.parametrize("run", [*FINISHED, *KILLED])
def test_it_is_verified(folder, run):
    """Every round is computed again to the same bytes; what was pruned is a note."""
    found = verify(folder, run)
    assert found.findings == []
    assert found.rounds == len([n for n in SHOWN[f"rounds list {run}"] if n["adapter_sha"]]) - 1
    assert bool(found.notes) == (run == "turns")


@pytest.mark.parametrize("run", FINISHED)
def test_it_is_exported(folder, run):
    """To the bytes that the run ended in."""
    gradualdiff(folder, "runs", "export", run, "--to", str(folder / "exported"))
    exported = (folder / "exported" / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(exported).hexdigest() == FINISHED[run]


@pytest.mark.parametrize("run", KILLED)
def test_a_killed_run_is_resumed_to_the_same_adapter(folder, run):
    """From its records, workspaces and settings; what was accepted is not trained again."""
    record = Ledger(store_of(folder), run, "test", lambda: 0.0).federation()
    config = FederationConfig.from_record(record.config, "federation.json")
    assert config.digest == record.digest
    sites = federations.learners(config)
    state = federations.run(config, folder, sites)
    assert (state.last_round, state.adapter_sha) == (3, KILLED[run])
    trained = {site: learner.trained for site, learner in sites.items()}
    late = [2, 3] if run == "stack" else [3]
    assert trained == {"a": [3], "b": [3], "c": late}
    assert verify(folder, run).findings == []
