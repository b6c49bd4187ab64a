"""A mistake at the start burns no name: it is found before the first record, or begun over."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from coordinator.runs.branching import branch_run
from coordinator.runs.deletion import delete_run
from coordinator.runs.operating import operator_ledger
from gradualdiff.cli.main import app
from gradualdiff.embedded import sites as embedded_sites
from shared.config import load_federation
from shared.errors import InterruptedRunError, RunExistsError, StoreUnavailableError
from shared.protocol.ledger import list_runs
from shared.protocol.records import FederationRecord, FinishedRecord
from tests import federations
from tests.numpy_learner import NumpyLearner
from tests.steering import Crash, Mortal, ask, records, store_of
from tests.tiny_model import make_tiny_model, write_federation

SMALL_DISK = SimpleNamespace(total=10**6, used=700_000, free=300_000)


class Stops(NumpyLearner):
    """Is stopped when it is to train in round ``at``."""

    at = 1

    def learn(self, task, *rest):
        if task.round == self.at:
            raise InterruptedRunError("stopped")
        return super().learn(task, *rest)


@pytest.fixture
def simulated(tmp_path, monkeypatch):
    """``gradualdiff simulate`` over numpy learners: ``run(rounds, *arguments, sites=...)``."""

    def run(rounds, *arguments, sites=NumpyLearner, **settings):
        path = write_federation(tmp_path, tmp_path, rounds=rounds, **settings)
        learners = {site: sites(site) for site in "ab"}
        monkeypatch.setattr(embedded_sites, "load_learners", lambda *_: learners)
        return CliRunner().invoke(app, ["simulate", str(path), "--json", *arguments])

    return run


def fresh(folder, rounds):
    """The adapter of a run with these settings that nothing came before."""
    config = load_federation(write_federation(folder, folder.parent, rounds=rounds))
    return federations.run(config, folder).adapter_sha


def test_a_run_without_a_closed_round_begins_anew_with_other_settings(simulated, tmp_path):
    """Also what the sites had trained for the other settings is of no run any more."""
    stopped = simulated(2, sites=lambda site: Stops(site) if site == "b" else NumpyLearner(site))
    assert isinstance(stopped.exception, InterruptedRunError)
    assert list((tmp_path / "sites" / "a" / "tiny" / "trained").iterdir())
    done = simulated(4)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["adapter_sha"] == fresh(tmp_path / "fresh", 4)


def test_a_run_with_a_closed_round_does_not(simulated, tmp_path):
    """Work is not thrown away by a command that says nothing of it."""

    class Later(Stops):
        at = 2

    assert isinstance(simulated(3, sites=Later).exception, InterruptedRunError)
    before = [info.key for info in store_of(tmp_path).list("")]
    again = simulated(4)
    assert isinstance(again.exception, RunExistsError)
    assert f"runs delete tiny --store {tmp_path / 'store'}" in str(again.exception)
    assert [info.key for info in store_of(tmp_path).list("")] == before
    assert simulated(3, "--resume").exit_code == 0


def test_with_the_same_settings_it_is_resumed_and_not_begun_anew(simulated):
    """What is trained already is worth the word --resume."""
    assert isinstance(simulated(2, sites=Stops).exception, InterruptedRunError)
    again = simulated(2)
    assert isinstance(again.exception, RunExistsError)
    assert "--resume" in str(again.exception)
    assert simulated(2, "--resume").exit_code == 0


def test_a_setting_given_beside_the_file_is_on_record_with_the_run(simulated, tmp_path):
    """So it must be given again to resume, as the hint does; another one is refused."""

    class Later(Stops):
        at = 2

    given = ["--set", "server.optimizer=fedavgm", "--set", "lora.alpha=8"]
    stopped = simulated(3, *given, sites=Later)
    assert isinstance(stopped.exception, InterruptedRunError)
    assert str(stopped.exception).endswith(f"--resume {' '.join(given)}")
    config = load_federation(tmp_path / "federation.toml", given[1::2])
    [record] = records(tmp_path, FederationRecord, "tiny")
    assert record.digest == config.digest
    assert record.config["server"]["optimizer"] == "fedavgm"
    other = simulated(3, "--resume", "--set", "lora.alpha=4")
    assert isinstance(other.exception, RunExistsError)
    assert "lora.alpha is 8.0 on record, 4.0 here" in str(other.exception)
    assert simulated(3, "--resume", *given).exit_code == 0


def test_a_run_that_failed_before_its_first_round_begins_anew(simulated, tmp_path):
    """It has nothing that could be resumed."""
    assert isinstance(simulated(2, sites=Stops).exception, InterruptedRunError)
    ask(tmp_path, "stop", run="tiny")
    simulated(2, "--resume")
    assert records(tmp_path, FinishedRecord, "tiny")
    assert simulated(2).exit_code == 0


def test_no_room_for_all_rounds_is_said_before_the_first_record(simulated, tmp_path):
    """Deltas and adapters of every round stay in the ledger."""
    done = simulated(10**12)
    assert isinstance(done.exception, StoreUnavailableError)
    assert "1000000000000 rounds of 2 sites" in str(done.exception)
    assert list_runs(store_of(tmp_path)) == {}
    assert simulated(1).exit_code == 0


def test_what_room_there_is_and_should_be_is_told_apart_on_a_small_disk(simulated, monkeypatch):
    """In GB both would be 0.0."""
    monkeypatch.setattr("gradualdiff.embedded.preflight.shutil.disk_usage", lambda _: SMALL_DISK)
    told = str(simulated(10**4).exception)
    assert "got 0.3 MB" in told
    assert "expected 0.0" not in told


def test_a_branch_begins_anew_from_where_it_branched(tmp_path):
    """Cut off anywhere, deleting keeps its origin, and the branch ends in the same adapter."""
    parent, child = federations.config(rounds=2), federations.config(rounds=1, name="new")
    federations.run(parent, tmp_path)

    mother = operator_ledger(store_of(tmp_path), "test", lambda: 1.0)
    branch_run(mother, 2, operator_ledger(store_of(tmp_path), "new", lambda: 1.0))
    before = tmp_path / "before"
    shutil.copytree(tmp_path / "store", before / "store", copy_function=os.link)
    wanted = federations.run(child, tmp_path).adapter_sha
    branch = [info.key for info in store_of(before).list("runs/new/")]
    for at in range(1, 100):
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "store", folder / "store", copy_function=os.link)
        store = Mortal(folder / "store", at, after=at % 2 == 0)
        with contextlib.suppress(Crash):
            delete_run(operator_ledger(store, "new", lambda: 1.0), "me", keep_origin=True)
        if not store.fired:
            break
        delete_run(operator_ledger(store_of(folder), "new", lambda: 1.0), "me", keep_origin=True)
        assert [info.key for info in store_of(folder).list("runs/new/")] == branch
    assert at > 10
    assert federations.run(child, folder).adapter_sha == wanted


# With the real learner -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def gradualdiff(*arguments):
    command = [sys.executable, "-m", "gradualdiff.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.model
@pytest.mark.slow
def test_wrong_model_layer_and_text_have_their_own_codes_and_leave_no_run(model, tmp_path):
    """Mended, the run begins under the name that it had."""
    path = write_federation(tmp_path, tmp_path / "nothing", rounds=1)
    assert gradualdiff("simulate", path).returncode == 12
    write_federation(tmp_path, model, rounds=1)
    text = path.read_text()
    path.write_text(text.replace("rank = 4", 'rank = 4\ntarget_modules = ["no_such_layer"]'))
    layer = gradualdiff("simulate", path)
    assert (layer.returncode, "no_such_layer" in layer.stderr) == (12, True)
    path.write_text(text)
    good = (tmp_path / "b.jsonl").read_bytes()
    (tmp_path / "b.jsonl").write_bytes(b"\xff not text\n")
    assert gradualdiff("simulate", path).returncode == 11
    listed = gradualdiff("runs", "list", "--json", "--store", tmp_path / "store")
    assert json.loads(listed.stdout) == []
    (tmp_path / "b.jsonl").write_bytes(good)
    done = gradualdiff("simulate", path)
    assert done.returncode == 0, done.stderr
