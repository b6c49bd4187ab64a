"""Runs with an optimiser at the server: kills, a lost spool, verify, branch, prune, refusals."""

from __future__ import annotations

import contextlib
import json
import shutil

import numpy as np
import pytest

from coordinator.aggregation.server_optimizer import wants_more_than_zeros
from coordinator.history import read_history
from coordinator.runs.branching import branch_run
from coordinator.runs.export import export_adapter
from coordinator.runs.inspection import summarise_round
from coordinator.runs.operating import operator_ledger
from coordinator.runs.retention import carry_out, read_plan
from shared import topology
from shared.config import canonical_json
from shared.errors import ConfigError, LedgerDamagedError, RunStuckError
from shared.protocol.records import ClosedRecord, OpenedRecord, RefusedRecord
from shared.tensors.tensor_file import TensorFile
from tests import federations
from tests.command_line import gradualdiff
from tests.coordinator.test_controls import when
from tests.steering import Crash, Mortal, records, store_of, verify

SERVERS = {
    "fedavgm": {"learning_rate": 0.5, "momentum": 0.5},
    "nesterov": {"learning_rate": 0.7},
    "fedadam": {"learning_rate": 0.1, "tau": 0.01},
    "fedyogi": {"learning_rate": 0.1, "tau": 0.01},
    "fedadagrad": {"learning_rate": 0.1, "momentum": 0.0},
}


def config(optimizer="fedadam", **what):
    """A federation with this optimiser."""
    server = {"optimizer": optimizer, **SERVERS[optimizer], **what.pop("server", {})}
    return federations.config(server=server, **what)


def closed(folder, run="test"):
    """The results by round."""
    return {record.round: record for record in records(folder, ClosedRecord, run)}


def states(folder, run="test"):
    """The sha256 of every state in the store."""
    prefix = topology.server_state_prefix(run)
    return {info.key.removeprefix(prefix) for info in store_of(folder).list(prefix)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of four rounds under fedadam."""
    folder = tmp_path_factory.mktemp("whole")
    federations.run(config(rounds=4), folder)
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "copy")


# Results ------------------------------------------------------------


@pytest.mark.parametrize("optimizer", SERVERS)
def test_every_optimiser_runs_verifies_and_is_repeatable(tmp_path, optimizer):
    """Each round names a state of its own; the adapter is not the plain one."""
    ends = [federations.run(config(optimizer), tmp_path / name).adapter_sha for name in "ab"]
    assert ends[0] == ends[1]
    assert ends[0] != federations.run(federations.config(), tmp_path / "plain").adapter_sha
    folder = tmp_path / "a"
    found = verify(folder)
    assert (found.findings, found.notes, found.recomputed) == ([], [], 3)
    results = closed(folder)
    assert {record.server_sha for record in results.values()} == states(folder)
    assert len(states(folder)) == 3
    assert all(record.step_norm != record.mean_norm for record in results.values())


def test_plain_keeps_no_state(tmp_path):
    """Nothing in the store, nothing on record."""
    federations.run(federations.config(), tmp_path)
    assert states(tmp_path) == set()
    assert {(r.server_sha, r.step_norm) for r in closed(tmp_path).values()} == {(None, None)}


def test_the_state_is_shown_and_not_exported(finished, tmp_path):
    """By rounds show, for people and for programs."""
    last = closed(finished)[4]
    history = read_history(store_of(finished), "test")
    summary = summarise_round(history, 4)
    assert (summary.server_sha, summary.step_norm) == (last.server_sha, last.step_norm)
    store = ["--store", str(finished / "store")]
    shown = gradualdiff("rounds", "show", "test", "4", *store)
    assert f"server state {last.server_sha}; norms: mean delta" in shown.stdout
    shown = gradualdiff("rounds", "show", "test", "4", "--json", *store)
    assert json.loads(shown.stdout)["round"]["server_sha"] == last.server_sha
    exported = export_adapter(history, store_of(finished), tmp_path / "out", None)
    assert exported.sha == last.adapter_sha
    assert not any("state" in path.name for path in (tmp_path / "out").iterdir())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "plus the step that fedadam makes of the weighted mean of the" in card


# Kills ------------------------------------------------------------


@pytest.mark.parametrize(("after", "spool"), [(False, "kept"), (True, "lost")])
def test_a_kill_at_any_write_ends_in_the_same_adapter_and_state(tmp_path, after, spool):
    """Also by a coordinator that comes back without its disk: the store has the state."""
    made = config("nesterov", sites=("a", "b"))
    federations.run(made, tmp_path / "whole")
    wanted = closed(tmp_path / "whole")
    fired = 0
    for number in range(1, 200):
        folder = tmp_path / str(number)
        store = Mortal(folder / "store", number, after=after)
        with contextlib.suppress(Crash):
            federations.run(made, folder, store=store)
        if not store.fired:
            break
        fired += 1
        if spool == "lost":
            shutil.rmtree(folder / "spool", ignore_errors=True)
        federations.run(made, folder)
        got = closed(folder)
        assert got == wanted, number
        assert states(folder) == states(tmp_path / "whole")
    assert fired > 30
    assert verify(folder).findings == []


def crashed_in_round(folder, number, made):
    """A run that died while a trained in this round."""

    def die():
        raise Crash

    with pytest.raises(Crash):
        federations.run(made, folder, when(made, number, die))


@pytest.mark.parametrize("damage", ["altered", "gone"])
def test_a_damaged_state_on_the_coordinators_disk_is_fetched_again(tmp_path, damage):
    """A file that another process left is hashed before it is used."""
    wanted = federations.run(config(), tmp_path / "whole").adapter_sha
    folder = tmp_path / "cut"
    crashed_in_round(folder, 3, config())
    (path,) = (folder / "spool" / "test").glob("state-*")
    assert path.name == f"state-{closed(folder)[2].server_sha}"
    data = path.read_bytes()
    path.unlink()
    if damage == "altered":
        path.write_bytes(data[:-1] + b"\x01")
    assert federations.run(config(), folder).adapter_sha == wanted


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_a_run_does_not_go_on_without_its_state(tmp_path, damage):
    """The object is named; nobody begins with a fresh momentum in the middle of a run."""
    crashed_in_round(tmp_path, 3, config())
    key = topology.server_state_key("test", closed(tmp_path)[2].server_sha)
    store = store_of(tmp_path)
    shutil.rmtree(tmp_path / "spool")
    data = store.get(key)
    if damage == "missing":
        store.delete(key)
    else:
        store.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(LedgerDamagedError, match=key):
        federations.run(config(), tmp_path)
    assert {(f.round, f.key) for f in verify(tmp_path).findings} == {(2, key)}
    store.put(key, data)
    federations.run(config(), tmp_path)
    assert verify(tmp_path).findings == []


# Verify ------------------------------------------------------------


def test_another_rounds_state_in_a_record_is_found(finished):
    """It is whole, and has the right form: only recomputing tells."""
    results, store = closed(finished), store_of(finished)
    key = results[3].key("test")
    record = json.loads(store.get(key))
    store.put(key, canonical_json({**record, "server_sha": results[2].server_sha}))
    assert {(f.round, f.key) for f in verify(finished).findings} == {(3, key)}


def test_without_a_result_the_next_round_cannot_be_recomputed(finished):
    """Which state it went on from is nowhere else: a note; the round after it is checked again."""
    key = closed(finished)[2].key("test")
    store_of(finished).delete(key)
    found = verify(finished)
    assert {(f.round, f.key) for f in found.findings} == {(2, key)}
    assert [note.round for note in found.notes] == [3]
    assert "on no record" in found.notes[0].problem
    assert found.recomputed == 2  # rounds 1 and 4


# Branch ------------------------------------------------------------


def test_a_branch_begins_with_a_fresh_state(finished):
    """Whatever its parent remembered: the first step of a branch is the one of a first round."""
    store = store_of(finished)
    parent, child = (operator_ledger(store, name, lambda: 1.0) for name in ("test", "new"))
    branch_run(parent, 3, child)
    assert states(finished, "new") == set()
    made = config("fedavgm", name="new", rounds=1, server={"momentum": 0.9, "learning_rate": 1.0})
    federations.run(made, finished)
    assert verify(finished, "new").findings == []
    (result,) = closed(finished, "new").values()
    assert result.step_norm == result.mean_norm  # m = D where m was 0


# Prune ------------------------------------------------------------


def prune(folder, keep):
    """Plan, record, delete; the plan."""
    ledger = operator_ledger(store_of(folder), "test", lambda: 86_400.0)
    wanted = read_plan(ledger, keep)
    carry_out(ledger, wanted, "room", "me", lambda _: None)
    return wanted


def test_keeping_adapters_keeps_the_last_state(finished):
    """The others are of no use without the deltas."""
    results = closed(finished)
    wanted = prune(finished, "adapters")
    assert states(finished) == {results[4].server_sha}
    assert sum("/server_state/" in item.key for item in wanted.objects) == 3
    found = verify(finished)
    assert found.findings == []
    notes = {(note.round, note.key) for note in found.notes}
    gone = {(n, topology.server_state_key("test", results[n].server_sha)) for n in (1, 2, 3)}
    assert gone <= notes


def test_the_last_rounds_can_still_be_recomputed(finished):
    """last:2 keeps the state that round 3 began with, and those after it."""
    results = closed(finished)
    prune(finished, "last:2")
    assert states(finished) == {results[n].server_sha for n in (2, 3, 4)}
    found = verify(finished)
    assert (found.findings, found.recomputed) == ([], 2)


@pytest.mark.parametrize("keep", ["adapters", "last:1"])
def test_an_unfinished_run_goes_on_from_the_state_that_was_kept(tmp_path, keep):
    """Pruned, and the coordinator's disk lost as well."""
    made = config(rounds=4)
    wanted = federations.run(made, tmp_path / "whole").adapter_sha
    folder = tmp_path / "cut"

    def fail():
        raise ConfigError("b is broken")

    with pytest.raises(RunStuckError):
        federations.run(made, folder, when(made, 3, fail, site="b"))
    prune(folder, keep)
    assert closed(folder)[2].server_sha in states(folder)
    shutil.rmtree(folder / "spool")
    assert federations.run(made, folder).adapter_sha == wanted
    assert verify(folder).findings == []


# Zeros ------------------------------------------------------------


def zeros(*rounds):
    """A fault: nothing is trained in these rounds."""

    def fault(task):
        return (lambda _, delta: np.zeros_like(delta)) if task.round in rounds else None

    return fault


@pytest.mark.parametrize("optimizer", SERVERS)
def test_a_delta_of_zeros_is_refused_by_the_rule_that_it_meets(tmp_path, optimizer):
    """The site is told which setting refuses it; mended, the run ends as if nothing had been."""
    made = config(optimizer)
    wanted = federations.run(made, tmp_path / "whole").adapter_sha
    sites = federations.learners(made)
    sites["b"].fault = zeros(2)
    folder = tmp_path / "idle"
    with pytest.raises(RunStuckError):
        federations.run(made, folder, sites)
    reasons = {record.reason for record in records(folder, RefusedRecord)}
    (reason,) = reasons
    assert reason.startswith(f'norm: expected above 0 (server.optimizer = "{optimizer}"')
    assert federations.run(made, folder).adapter_sha == wanted


def test_a_delta_of_zeros_is_taken_where_it_is_only_added(tmp_path):
    """It is a vote for no change."""
    made = federations.config()
    sites = federations.learners(made)
    sites["b"].fault = zeros(2)
    federations.run(made, tmp_path, sites)
    assert records(tmp_path, RefusedRecord) == []
    assert closed(tmp_path)[2].delta_norms["b"] == 0


def test_a_schedule_that_ends_at_zero_may_end_in_a_delta_of_zeros():
    """The one step of the last round has the rate 0: nobody is to blame for it."""

    def opened(to):
        return OpenedRecord(
            round=1, selected=("a",), source_sha="0" * 64, seed=1, progress_from=0.0, progress_to=to
        )

    falling = config(training={"local_steps": 1, "schedule": "cosine"})
    assert wants_more_than_zeros(falling, opened(0.9)) == 'server.optimizer = "fedadam"'
    assert wants_more_than_zeros(falling, opened(1.0)) is None
    assert wants_more_than_zeros(config(), opened(1.0)) is not None
    assert wants_more_than_zeros(federations.config(), opened(0.5)) is None


def test_a_round_of_nothing_but_zeros_moves_nothing(tmp_path):
    """Where such deltas are taken, the momentum of other rounds is not carried on with."""
    made = config("fedavgm", training={"local_steps": 1, "schedule": "linear"})
    sites = federations.learners(made)
    for site in sites.values():
        site.fault = zeros(3)
    federations.run(made, tmp_path, sites)
    results = closed(tmp_path)
    assert (results[3].step_norm, results[3].mean_norm) == (0, 0)
    assert results[3].adapter_sha == results[2].adapter_sha
    assert results[3].server_sha == results[2].server_sha
    assert verify(tmp_path).findings == []
    prune(tmp_path, "last:1")  # one state of two rounds: the newer one keeps it
    assert states(tmp_path) == {results[3].server_sha}


def test_a_tensor_that_one_round_does_not_train_keeps_its_state(tmp_path):
    """As where the two factors of an adapter are trained in turn."""
    made = config("fedadam")
    sites = federations.learners(made)

    def only_b(task):
        skipped = "layer.lora_A.weight"
        return (lambda spec, d: d * (spec.name != skipped)) if task.round == 2 else None

    for site in sites.values():
        site.fault = only_b
    federations.run(made, tmp_path, sites)
    results, store = closed(tmp_path), store_of(tmp_path)
    kept = {}
    for number in (1, 2):
        path = tmp_path / f"state-{number}"
        store.fetch_file(topology.server_state_key("test", results[number].server_sha), path)
        with TensorFile(path) as file:
            kept[number] = {name: file.read(name).tobytes() for name in file.layouts}
    assert kept[1]["layer.lora_A.weight"] == kept[2]["layer.lora_A.weight"]
    assert kept[1]["layer.lora_B.weight"] != kept[2]["layer.lora_B.weight"]
    assert verify(tmp_path).findings == []


# Settings ------------------------------------------------------------

BAD = [
    ({"momentum": 0.5}, {}, r'server.momentum: expected none with server.optimizer = "plain"'),
    ({"tau": 0.5}, {}, r"server.tau: expected none"),
    ({"learning_rate": 0.5}, {}, r'to scale it use optimizer = "fedavgm" with momentum = 0.0'),
    ({"optimizer": "fedavgm", "tau": 0.5}, {}, r"server.tau: expected none .*fedavgm"),
    ({"optimizer": "nesterov", "second_momentum": 0.5}, {}, r"server.second_momentum: expected"),
    (
        {"optimizer": "fedadagrad", "learning_rate": 0.1, "second_momentum": 0.5},
        {},
        r"server.second_momentum: expected none .*fedadagrad",
    ),
    ({"optimizer": "nesterov", "momentum": 0.0}, {}, r"server.momentum: expected above 0"),
    (
        {"optimizer": "fedavgm"},
        {"averaging": "svd"},
        r'expected plain with aggregation.averaging = "svd": it makes the factors anew',
    ),
    ({"optimizer": "fedadam"}, {}, r"server.learning_rate: expected below 1 .*begin with 0.01"),
    (
        {"optimizer": "fedyogi", "learning_rate": 0.1, "tau": 1e-9},
        {},
        r"server.tau: expected at least learning_rate / 1e\+07, got 1e-09",
    ),
    (
        {"optimizer": "nesterov", "momentum": 0.9999999},
        {},
        r"server.learning_rate: expected at most 1e\+06 / \(1 - momentum\)",
    ),
]


@pytest.mark.parametrize(("server", "aggregation", "says"), BAD)
def test_settings_that_cannot_work_are_refused(server, aggregation, says):
    """With the setting, what was expected and what to do."""
    base = {"model": "none", "quantisation": "none"}
    with pytest.raises(ConfigError, match=says):
        federations.config(server=server, aggregation=aggregation, base=base)


@pytest.mark.parametrize("optimizer", SERVERS)
@pytest.mark.parametrize("averaging", ["fedavg", "rolora", "ffa"])
def test_settings_that_fit_are_taken(optimizer, averaging):
    """Every optimiser with every averaging whose factors go on from round to round."""
    made = config(optimizer, aggregation={"averaging": averaging})
    assert made.server.optimizer == optimizer
