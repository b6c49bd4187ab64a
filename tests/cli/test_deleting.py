"""``gradualdiff runs delete``: says what goes, asks, and may be cut off anywhere."""

from __future__ import annotations

import contextlib
import os
import shutil
import time

import pytest
from typer.testing import CliRunner

from coordinator.liveness import RunStatus
from coordinator.runs.deletion import delete_run, run_lock
from coordinator.runs.inspection import summarise_runs
from coordinator.runs.operating import operator_ledger
from gradualdiff.cli.main import app
from shared import topology
from shared.config import canonical_json
from shared.errors import FencedError, RunExistsError, RunNotFoundError
from tests import federations
from tests.steering import Crash, Mortal, store_of


def gradualdiff(folder, *arguments, answer=None):
    arguments = [*arguments, "--store", str(folder / "store")]
    return CliRunner().invoke(app, arguments, input=answer, terminal_width=200)


@pytest.fixture
def ended(tmp_path):
    """A folder with a run that ended, and one beside it that must stay."""
    for name in ("test", "other"):
        federations.run(federations.config(("a", "b"), 1, name=name), tmp_path / "ended")
    return tmp_path / "ended"


def left(folder, run="test"):
    return [info.key for info in store_of(folder).list("") if f"/{run}" in info.key]


def test_it_says_what_goes_and_asks(ended):
    """No is no; yes deletes the run and nothing else, and its name is free."""
    before = left(ended)
    refused = gradualdiff(ended, "runs", "delete", "test", answer="n\n")
    assert refused.exit_code == 1
    records = sum(key.endswith(".json") for key in before)
    assert f"run test (finished): {records} records and" in refused.output
    assert left(ended) == before
    done = gradualdiff(ended, "runs", "delete", "test", answer="y\n")
    assert done.exit_code == 0, done.output
    assert left(ended) == []
    listed = gradualdiff(ended, "runs", "list").output
    assert "other" in listed
    assert "test" not in listed
    assert federations.run(federations.config(("a", "b"), 1), ended).finished is not None


def test_a_run_that_is_not_there_is_named(ended):
    """A misspelt name deletes nothing."""
    done = gradualdiff(ended, "runs", "delete", "tset", "--yes")
    assert isinstance(done.exception, RunNotFoundError)


@pytest.mark.parametrize("how", ["status", "lock"])
def test_it_is_refused_while_somebody_is_at_work_on_the_run(ended, how):
    """A coordinator that wrote a moment ago, or a process that holds the run."""
    before = left(ended)
    if how == "lock":
        with run_lock(store_of(ended), "test"):
            done = gradualdiff(ended, "runs", "delete", "test", "--yes")
    else:
        now = time.time()
        status = RunStatus(run="test", writer="w", at=now, round=1, state="open", since=now)
        data = canonical_json(status.model_dump(mode="json"))
        store_of(ended).put(topology.status_key("test"), data)
        before = left(ended)
        done = gradualdiff(ended, "runs", "delete", "test", "--yes")
    assert isinstance(done.exception, FencedError), done.output
    says = {"status": "a coordinator is active on it", "lock": "another process is using run test"}
    assert says[how] in str(done.exception)
    assert left(ended) == before


def test_cut_off_anywhere_it_is_told_from_a_run_and_the_next_finishes_it(ended, tmp_path):
    """At every write: the run is whole, or being deleted, or gone; no coordinator begins it."""
    states = []
    for at in range(1, 200):
        folder = tmp_path / str(at)
        shutil.copytree(ended / "store", folder / "store", copy_function=os.link)
        store = Mortal(folder / "store", at, after=at % 2 == 0)
        with contextlib.suppress(Crash):
            delete_run(operator_ledger(store, "test", lambda: 1.0), "me")
        runs = {summary.run: summary.state for summary in summarise_runs(store_of(folder))}
        shown = runs.get("test", "gone")
        states.append(shown)
        if shown == "being deleted":
            with pytest.raises(RunExistsError, match="runs delete test"):
                operator_ledger(store_of(folder), "test", lambda: 1.0).begin(federations.config())
            assert gradualdiff(folder, "runs", "delete", "test", "--yes").exit_code == 0
        if shown != "finished":
            assert left(folder) == []
        if not store.fired:
            break
    assert list(dict.fromkeys(states)) == ["finished", "being deleted", "gone"]
    assert len(states) > 10
