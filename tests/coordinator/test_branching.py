"""Branches: a new run that begins with another run's adapter, and what it checks."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest

from coordinator.runs.branching import branch_run
from coordinator.runs.operating import operator_ledger
from coordinator.runs.retention import carry_out, read_plan
from shared import topology
from shared.errors import (
    LedgerDamagedError,
    RunExistsError,
    RunFailedError,
    RunNotFoundError,
    RunStuckError,
)
from shared.protocol.manifest import Manifest, TensorSpec
from shared.protocol.records import ClosedRecord, FinishedRecord, GenesisRecord, OpenedRecord
from tests import federations
from tests.coordinator.test_controls import when
from tests.steering import Crash, Mortal, ask, records, store_of, verify


@pytest.fixture
def parent(tmp_path):
    """A finished run of three rounds."""
    federations.run(federations.config(), tmp_path)
    return tmp_path


def branch(folder, at, name="new", parent="test", store=None):
    """Branch; the origin."""
    store = store or store_of(folder)
    return branch_run(
        operator_ledger(store, parent, lambda: 1.0), at, operator_ledger(store, name, lambda: 1.0)
    )


def child(name="new", **what):
    """The branch's settings."""
    return federations.config(name=name, **what)


@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_branch_begins_where_the_round_ended(parent, at):
    """Round 1 of the branch trains from the very adapter; other settings may differ."""
    shas = [r.adapter_sha for r in records(parent, GenesisRecord)]
    shas += [r.adapter_sha for r in records(parent, ClosedRecord)]
    assert branch(parent, at).adapter_sha == shas[at]
    before = {i.key: i.etag for i in store_of(parent).list("runs/test/")}
    federations.run(child(rounds=2, run={"seed": 9}, codec={"name": "bf16"}), parent)
    (genesis,) = records(parent, GenesisRecord, "new")
    assert (genesis.origin, genesis.adapter_sha) == (f"test@{at}", shas[at])
    assert records(parent, OpenedRecord, "new")[0].source_sha == shas[at]
    found = verify(parent, "new")
    assert (found.findings, found.notes, found.rounds) == ([], [], 2)
    assert {i.key: i.etag for i in store_of(parent).list("runs/test/")} == before


def test_a_branch_of_a_running_run_disturbs_neither(tmp_path):
    """Taken while round 3 is open; the parent ends in its own digest."""
    config = federations.config()
    wanted = federations.run(config, tmp_path / "whole").adapter_sha
    folder = tmp_path / "branched"
    sites = when(config, 3, lambda: branch(folder, 2))
    assert federations.run(config, folder, sites).adapter_sha == wanted
    federations.run(child(), folder)
    assert verify(folder, "new").findings == []
    assert verify(folder).findings == []


def test_a_branch_needs_nothing_of_its_parent(parent):
    """Pruned to its last round, or gone: the branch holds its own copy; verify says what it saw."""
    branch(parent, 1)
    store = store_of(parent)
    ledger = operator_ledger(store, "test", lambda: 0.0)
    carry_out(ledger, read_plan(ledger, "last:1"), "room", "me", lambda _: None)
    federations.run(child(), parent)
    assert verify(parent, "new").findings == []
    for info in list(store.list("runs/test/")):
        store.delete(info.key)
    found = verify(parent, "new")
    assert found.findings == []
    (note,) = found.notes
    assert note.key == "runs/new/origin.json"
    assert "test@1 is not in this store" in note.problem


def test_the_same_branch_twice_ends_in_the_same_adapter(parent):
    """The origin and the settings are all that counts."""
    branch(parent, 2)
    other = shutil.copytree(parent, parent.parent / "other")
    ends = [federations.run(child(), folder).adapter_sha for folder in (parent, other)]
    assert ends[0] == ends[1]
    assert ends[0] != federations.run(child("third"), other).adapter_sha


# What is refused -----------------------------------------------------------------------------


def test_a_name_that_is_taken_is_refused(parent):
    """By a run, or by a branch that was not started yet."""
    with pytest.raises(RunExistsError, match="run test already exists in this store"):
        branch(parent, 2, "test")
    branch(parent, 2)
    with pytest.raises(RunExistsError, match="as a branch of test@2; start it"):
        branch(parent, 3)
    assert operator_ledger(store_of(parent), "new", lambda: 0.0).origin().parent_round == 2


def test_a_round_without_a_result_is_refused(parent):
    """And so is a run that is not there."""
    with pytest.raises(RunNotFoundError, match="no result of round 4"):
        branch(parent, 4)
    with pytest.raises(RunNotFoundError, match="no run 'nobody'"):
        branch(parent, 1, parent="nobody")


@pytest.mark.parametrize("how", ["altered", "missing", "pruned"])
def test_an_adapter_that_is_not_whole_is_refused(parent, how):
    """Nothing is begun with bytes that nobody can vouch for."""
    store = store_of(parent)
    sha = records(parent, ClosedRecord)[0].adapter_sha
    key = topology.adapter_key("test", sha)
    if how == "pruned":
        ledger = operator_ledger(store, "test", lambda: 0.0)
        carry_out(ledger, read_plan(ledger, "last:1"), "room", "me", lambda _: None)
    elif how == "missing":
        store.delete(key)
    else:
        store.put(key, b"x")
    says = {"altered": "do not have the sha256", "missing": sha, "pruned": "was pruned"}[how]
    with pytest.raises(LedgerDamagedError, match=says):
        branch(parent, 1)
    assert list(store.list("runs/new/")) == []


def test_sites_over_another_base_model_are_named_and_the_branch_waits(parent):
    """Deltas over one base do not go on another, however many sites have it."""
    branch(parent, 2)
    sites = federations.learners(child())
    for site in sites.values():
        site.fingerprint = "e" * 64
    said = (
        r"a loaded another base model \(eeeeeeeeeeee\), but the adapter of test@2 was trained over"
    )
    with pytest.raises(RunStuckError, match=said):
        federations.run(child(), parent, sites)
    assert records(parent, FinishedRecord, "new") == []
    assert federations.run(child(), parent).finished.failed is False


def test_sites_with_other_tensors_are_named_and_the_branch_waits(parent):
    """Another rank cannot go on from this adapter."""
    branch(parent, 2)
    sites = federations.learners(child())
    for site in sites.values():
        site.manifest = Manifest(
            tensors=(TensorSpec(name="layer.lora_A.weight", shape=(2, 8), init="zeros"),),
            target_modules=("layer",),
        )
    with pytest.raises(RunStuckError, match=r"a trains other tensors than the adapter of test@2"):
        federations.run(child(), parent, sites)


def test_another_scale_ends_the_branch_with_the_reason(parent):
    """lora.alpha and lora.scaling are in no tensor, and are part of the model all the same."""
    branch(parent, 2)
    with pytest.raises(RunFailedError, match=r"lora.alpha is 1, .*another model"):
        federations.run(child(lora={"alpha": 1.0}), parent)
    branch(parent, 2, "other")
    with pytest.raises(RunFailedError, match=r'lora.scaling is "rslora", .*with "classic"'):
        federations.run(child("other", lora={"scaling": "rslora"}), parent)


# Kills and damage ----------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_write_of_a_branching_leaves_it_whole_or_to_be_repeated(parent, after):
    """The origin is written last: before it there is no branch, after it a whole one."""
    for number in range(1, 5):
        name = f"new-{number}"
        store = Mortal(parent / "store", number, after=after)
        with contextlib.suppress(Crash):
            branch(parent, 2, name, store=store)
        origin = operator_ledger(store_of(parent), name, lambda: 0.0).origin()
        if origin is None:
            origin = branch(parent, 2, name)
        key = topology.adapter_key(name, origin.adapter_sha)
        assert store_of(parent).sha256(key) == origin.adapter_sha
        if not store.fired:
            break
    assert number == 4


def test_a_kill_at_any_write_of_a_branch_changes_nothing(parent):
    """A branch is a run like any other: every life of its coordinator goes on where it was."""
    branch(parent, 2)
    wanted = federations.run(
        child(rounds=1), shutil.copytree(parent, parent.parent / "whole")
    ).adapter_sha
    for number in range(1, 100):
        folder = shutil.copytree(parent, parent.parent / f"killed-{number}")
        store = Mortal(folder / "store", number, after=True)
        with contextlib.suppress(Crash):
            federations.run(child(rounds=1), folder, store=store)
        assert federations.run(child(rounds=1), folder).adapter_sha == wanted
        if not store.fired:
            break
    assert number > 8
    assert verify(folder, "new").findings == []


def test_an_origin_that_does_not_fit_its_parent_is_found(parent):
    """The parent's record says another sha, another config."""
    branch(parent, 2)
    federations.run(child(), parent)
    store = store_of(parent)
    key = "runs/new/origin.json"
    record = json.loads(store.get(key))
    store.put(key, json.dumps({**record, "parent_round": 1}).encode())
    assert {finding.key for finding in verify(parent, "new").findings} == {
        key,
        "runs/new/rounds/00000/closed.json",
    }


def test_a_branch_can_be_paused_before_it_begins_a_round(parent):
    """Control records and an origin do not get in each other's way."""
    branch(parent, 3)
    operator_ledger(store_of(parent), "new", lambda: 0.0).begin(child())
    ask(parent, "pause", run="new")
    with pytest.raises(RunStuckError, match="paused after round 0"):
        federations.run(child(), parent)
    ask(parent, "resume", run="new")
    federations.run(child(), parent)
    assert verify(parent, "new").findings == []
