"""Every kind of object of a finished run, damaged: verify names it with its round, and no other."""

from __future__ import annotations

import json
import shutil

import pytest

from coordinator.runs.branching import branch_run
from coordinator.runs.operating import operator_ledger
from shared import topology
from shared.config import FederationConfig, canonical_json
from shared.errors import LedgerDamagedError, ModelError, RunNotFoundError
from shared.protocol.records import ClosedRecord, ClosingRecord, GenesisRecord
from tests import federations
from tests.federation.test_embedded import Spoils, with_nan
from tests.steering import ask, forget_links, records, store_of, verify

RUN = "runs/test"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished branch of a finished run with every kind of record in it.

    d declined at first; c's delta of round 1 was refused, b failed in round 2 (both left out);
    c was taken out in round 3, which an extension added. Four sites, one of them never joined.
    The server's optimiser has a state.
    """
    folder = tmp_path_factory.mktemp("whole")
    parent = federations.config(rounds=1, name="parent")
    federations.run(parent, folder)
    store = store_of(folder)
    branch_run(
        operator_ledger(store, "parent", lambda: 1.0),
        1,
        operator_ledger(store, "test", lambda: 1.0),
    )
    config = federations.config(
        "abcd",
        rounds=2,
        policy={"on_failure": "exclude"},
        server={"optimizer": "nesterov", "learning_rate": 0.5},
        run={"min_participants": 3, "start_timeout_seconds": 0.001},
    )
    sites = federations.learners(config)

    class Declines(type(sites["d"])):
        def prepare(self, announced, report):
            raise ModelError("no model here")

    def take_out(task):
        if task.round == 3:
            ask(folder, "exclude", "its text is wrong", site="c")

    def fail(task):
        if task.round == 2:
            ask(folder, "extend", "more", rounds=1)
            raise ModelError("b has no memory left")

    sites["d"] = Declines("d")
    sites["c"] = Spoils("c", with_nan, rounds=(1,))
    sites["c"].fault, sites["b"].fault = take_out, fail
    federations.run(config, folder, sites)
    found = verify(folder)
    assert (found.findings, found.notes, found.rounds) == ([], [], 3)
    return folder


@pytest.fixture
def damaged(whole, tmp_path):
    """A copy to damage, and its store."""
    folder = shutil.copytree(whole, tmp_path / "copy", symlinks=True)
    return folder, store_of(folder)


def keys_of(folder):
    """A key and a round of each kind of object there is in the run."""
    closings = {r.round: r for r in records(folder, ClosingRecord)}
    closed = {r.round: r for r in records(folder, ClosedRecord)}
    (genesis,) = records(folder, GenesisRecord)
    (item,) = [i for i in closings[2].inputs if i.site == "c"]
    refused = [i.key for i in store_of(folder).list(f"{RUN}/rounds/00001/refused/")]
    return {
        "federation": (f"{RUN}/federation.json", 0),
        "member": (f"{RUN}/members/b.json", 0),
        "declined": (f"{RUN}/declined/d.json", 0),
        "origin": (f"{RUN}/origin.json", 0),
        "genesis": (f"{RUN}/rounds/00000/closed.json", 0),
        "opened": (f"{RUN}/rounds/00002/opened.json", 2),
        "accepted": (f"{RUN}/rounds/00002/accepted/c.json", 2),
        "refused": (refused[0], 1),
        "failed": (f"{RUN}/rounds/00002/failed/b-001.json", 2),
        "closing": (f"{RUN}/rounds/00002/closing.json", 2),
        "closed": (f"{RUN}/rounds/00002/closed.json", 2),
        "last closed": (f"{RUN}/rounds/00003/closed.json", 3),
        "evaluated": (f"{RUN}/rounds/00003/evaluated/a.json", 3),
        "finished": (f"{RUN}/finished.json", 3),
        "extend": (f"{RUN}/control/00001.json", 3),
        "exclude": (f"{RUN}/control/00002.json", 3),
        "adapter": (topology.adapter_key("test", closed[2].adapter_sha), 2),
        "first adapter": (topology.adapter_key("test", genesis.adapter_sha), 0),
        "adapter_config": (
            topology.adapter_key("test", closed[2].adapter_sha, "adapter_config.json"),
            2,
        ),
        "delta": (topology.delta_key("test", 2, "c", item.sha), 2),
        "state": (topology.server_state_key("test", closed[2].server_sha), 2),
        "last state": (topology.server_state_key("test", closed[3].server_sha), 3),
    }


RECORDS = ("member", "declined", "origin", "genesis", "opened", "accepted", "refused", "failed")
RECORDS += ("closing", "closed", "last closed", "evaluated", "finished", "extend", "exclude")
TENSORS = ("adapter", "first adapter", "adapter_config", "delta", "state", "last state")
UNMISSED = ("declined", "evaluated")  # nothing follows from them: that they are gone says nothing


def only(folder, key, number):
    """Verify finds this object, in this round, and blames no other."""
    found = verify(folder).findings
    assert {finding.key for finding in found} == {key}, found
    assert number in {finding.round for finding in found}, found
    return found


@pytest.mark.parametrize("kind", RECORDS)
def test_a_torn_record_is_named(damaged, kind):
    """Half of its bytes: it cannot be read, the rest is checked to the end."""
    folder, store = damaged
    key, number = keys_of(folder)[kind]
    if kind in ("extend", "exclude", "member", "declined", "origin", "finished"):
        number = 0  # it lies beside the rounds
    store.put(key, store.get(key)[: store.stat(key).size // 2])
    only(folder, key, number)


@pytest.mark.parametrize("kind", [k for k in (*RECORDS, *TENSORS) if k not in UNMISSED])
def test_a_missing_object_is_named(damaged, kind):
    """Whatever something else follows from is missed by what follows from it."""
    folder, store = damaged
    key, number = keys_of(folder)[kind]
    if kind == "refused":  # which sha it was, only the chain says: without, the place is named
        store.delete(key)
        assert key in {finding.key for finding in verify(folder).findings}
        forget_links(store)
        (finding,) = verify(folder).findings
        assert (finding.round, "c was left out" in finding.problem) == (1, True)
        return
    if kind == "extend":
        number = 2  # the first decision that knew of it
    store.delete(key)
    found = only(folder, key, number)
    assert "missing" in found[0].problem


@pytest.mark.parametrize("kind", UNMISSED)
def test_what_nothing_follows_from_is_missed_by_the_chain_alone(damaged, kind):
    """The limit of what records can say of each other, written down."""
    folder, store = damaged
    key, number = keys_of(folder)[kind]
    store.delete(key)
    only(folder, key, number if "/rounds/" in key else 0)
    forget_links(store)
    assert verify(folder).findings == []


@pytest.mark.parametrize("kind", TENSORS)
def test_an_altered_tensor_file_is_named(damaged, kind):
    """One bit."""
    folder, store = damaged
    key, number = keys_of(folder)[kind]
    data = store.get(key)
    store.put(key, data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    only(folder, key, number)


OTHER = "e" * 64
ALTERED = [
    ("member", "fingerprint", OTHER),
    ("member", "numerics.versions", {"numpy": "9"}),
    ("origin", "adapter_sha", OTHER),
    ("origin", "adapter_size", 7),
    ("origin", "parent_digest", OTHER),
    ("origin", "fingerprint", OTHER),
    ("origin", "lora_alpha", 3.0),
    ("origin", "lora_scaling", "rslora"),
    ("genesis", "adapter_sha", OTHER),
    ("genesis", "adapter_size", 7),
    ("genesis", "origin", "other@1"),
    ("opened", "source_sha", OTHER),
    ("opened", "seed", 7),
    ("opened", "selected", ["a", "b"]),
    ("opened", "members", ["a"]),
    ("opened", "rounds", 7),
    ("opened", "progress_to", 0.9),
    ("accepted", "sha", OTHER),
    ("accepted", "size", 7),
    ("accepted", "norm", 7.0),
    ("refused", "reason", "other"),
    ("failed", "reason", "other"),
    ("closing", "source_sha", OTHER),
    ("closing", "inputs.0.weight", 0.9),
    ("closing", "excluded", {}),
    ("closed", "adapter_sha", OTHER),
    ("closed", "adapter_size", 7),
    ("closed", "mean_norm", 7.0),
    ("closed", "delta_norms", {"a": 7.0, "c": 7.0}),
    ("closed", "cosines", {}),
    ("closed", "server_sha", OTHER),
    ("closed", "server_sha", None),
    ("closed", "step_norm", 7.0),
    ("closed", "step_norm", None),
    ("last closed", "server_sha", OTHER),
    ("closed", "source_held_out", None),
    ("last closed", "adapter_sha", OTHER),
    ("evaluated", "sha", OTHER),
    ("finished", "sha", OTHER),
    ("finished", "round", 2),
    ("finished", "round", 4),
    ("finished", "failed", True),
    ("finished", "reason", "all 2 rounds are closed"),
]


@pytest.mark.parametrize(("kind", "field", "value"), ALTERED)
def test_an_altered_record_is_named(damaged, kind, field, value):
    """A value that no other record or tensor bears out."""
    folder, store = damaged
    key, number = keys_of(folder)[kind]
    record = json.loads(store.get(key))
    *path, name = field.split(".")
    place = record
    for step in path:
        place = place[int(step)] if isinstance(place, list) else place[step]
    assert place[name] != value
    place[name] = value
    store.put(key, canonical_json(record))
    found = verify(folder).findings
    blamed = {finding.key for finding in found}
    assert blamed <= {key, f"{RUN}/members/"}, found
    assert blamed
    assert all(finding.round in (number, value) for finding in found), found


@pytest.mark.parametrize(
    ("kind", "field", "value", "witness"),
    [
        ("extend", "rounds", 5, f"{RUN}/rounds/00003/opened.json"),
        ("exclude", "reason", "other", f"{RUN}/rounds/00003/closing.json"),
        ("exclude", "site", "b", f"{RUN}/rounds/00003/closing.json"),
    ],
)
def test_an_altered_control_contradicts_the_decision_that_knew_it(
    damaged, kind, field, value, witness
):
    """Of the two nobody can say which is right: the decision is named, and what was expected."""
    folder, store = damaged
    key, number = keys_of(folder)[kind]
    record = json.loads(store.get(key))
    store.put(key, canonical_json({**record, field: value}))
    found = verify(folder).findings
    assert (number, witness) in {(finding.round, finding.key) for finding in found}, found


def test_two_damages_are_both_named(damaged):
    """A torn record of round 1 does not hide a flipped bit of round 3, nor the other way round."""
    folder, store = damaged
    torn = f"{RUN}/rounds/00001/opened.json"
    (last,) = [r for r in records(folder, ClosedRecord) if r.round == 3]
    flipped = topology.adapter_key("test", last.adapter_sha)
    store.put(torn, b"{")
    data = store.get(flipped)
    store.put(flipped, data[:-1] + bytes([data[-1] ^ 1]))
    found = {(finding.round, finding.key) for finding in verify(folder).findings}
    assert found == {(1, torn), (3, flipped)}


def test_a_lost_round_is_named_record_by_record(damaged):
    """A whole folder is gone; the rounds before and after it are checked."""
    folder, store = damaged
    keys = [info.key for info in store.list(f"{RUN}/rounds/00002/")]
    for key in keys:
        store.delete(key)
    found = verify(folder)
    assert {finding.round for finding in found.findings} == {2}
    assert {finding.key for finding in found.findings} == set(keys)
    assert found.rounds == 3


def test_settings_that_do_not_have_their_digest_are_named_first(damaged):
    """What follows from altered settings is found as well: none of it is hidden."""
    folder, store = damaged
    key = f"{RUN}/federation.json"
    record = json.loads(store.get(key))
    record["config"]["run"]["seed"] = 99
    store.put(key, canonical_json(record))
    found = verify(folder).findings
    assert (found[0].round, found[0].key) == (0, key)
    assert f"{RUN}/rounds/00003/opened.json" in {finding.key for finding in found}


def test_without_its_settings_nothing_can_be_recomputed(damaged):
    """The first record torn or gone: an error that names it, not a list of guesses."""
    folder, store = damaged
    key = f"{RUN}/federation.json"
    store.put(key, b"{")
    with pytest.raises(LedgerDamagedError, match=r"federation\.json"):
        verify(folder)
    store.delete(key)
    with pytest.raises(RunNotFoundError):
        verify(folder)


def test_a_ledger_of_before_there_were_controls_is_checked_as_it_was(tmp_path):
    """Records without the newer fields are whole."""
    config: FederationConfig = federations.config()
    federations.run(config, tmp_path)
    store = store_of(tmp_path)
    newer = ("rounds", "members", "controls", "origin")
    for info in list(store.list(f"{RUN}/rounds/")):
        record = json.loads(store.get(info.key))
        if info.key.endswith(("opened.json", "closing.json", "00000/closed.json")):
            keep = {k: v for k, v in record.items() if k not in newer or "00000" in info.key}
            keep.pop("origin", None)
            store.put(info.key, canonical_json(keep))
    forget_links(store)
    assert verify(tmp_path).findings == []
