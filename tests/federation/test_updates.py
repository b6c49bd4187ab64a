"""Adapters that travel down as updates, in whole federations: every way to come to the same w."""

from __future__ import annotations

import shutil
import time

import numpy as np
import pytest

from coordinator.history import read_history
from coordinator.runs.branching import branch_run
from coordinator.runs.export import export_adapter
from coordinator.runs.inspection import summarise_round
from coordinator.runs.operating import operator_ledger
from coordinator.runs.retention import carry_out, read_plan
from shared import topology
from shared.errors import ConfigError
from shared.protocol.records import AcceptedRecord, ClosedRecord, GenesisRecord
from shared.stores.directory import DirectoryStore
from shared.tensors.packed_header import MARK
from shared.tensors.tensor_file import TensorFile
from tests import federations
from tests.federation.test_embedded import restarted
from tests.numpy_learner import NumpyLearner, manifest_of
from tests.steering import records, store_of, verify

WIDE = manifest_of(1000)  # wide enough for several updates to be fewer bytes than an adapter
DOWN = {"name": "int4", "down": "int4"}


def config(*args, codec=None, **what):
    """A federation whose adapters travel as updates of 4 bits a value."""
    return federations.config(*args, codec=codec or DOWN, **what)


def learners(config):
    """Learners of a wide adapter."""
    return {site: NumpyLearner(site, manifest=WIDE) for site in config.run.participants}


def run(config, folder, sites=None, **what):
    """Run it to its end."""
    return federations.run(config, folder, sites or learners(config), **what)


def closed(folder, name="test"):
    """The results by round."""
    return {record.round: record for record in records(folder, ClosedRecord, name)}


def fetched(folder, name="test"):
    """Bytes that came with the adapters, by site and round."""
    return {(r.site, r.round): r.traffic.down for r in records(folder, AcceptedRecord, name)}


def tensors(folder, key):
    """What a tensor file in the store holds."""
    path = folder / "looked-at"
    store_of(folder).fetch_file(key, path)
    with TensorFile(path) as file:
        return {name: np.array(file.read(name)) for name in file.layouts}


def test_without_the_setting_all_is_as_it_was(tmp_path):
    """No record says a word of updates, and nothing lies beside the adapters."""
    settings = federations.config()
    assert "down" not in settings.recorded().get("codec", {})
    assert settings.digest == federations.config(codec={"down": "whole"}).digest
    federations.run(settings, tmp_path)
    key = topology.round_key("test", 2, "closed")
    said = store_of(tmp_path).get(key)
    assert b"update" not in said
    assert b"exact_sha" not in said
    assert list(store_of(tmp_path).list(topology.updates_prefix("test"))) == []


@pytest.mark.parametrize("averaging", ["svd", "flora", "range-finder"])
def test_a_mode_that_makes_the_adapter_anew_refuses_it(averaging):
    """No update leads from an adapter to one of other factors."""
    with pytest.raises(ConfigError, match=r"codec.down = \"int4\" needs an adapter"):
        config(aggregation={"averaging": averaging, "clip_to_median": "off"})


def test_an_unknown_codec_is_refused_with_those_that_are_known():
    """And with the word for none."""
    with pytest.raises(ConfigError, match=r"codec.down.*'whole'.*'int4'"):
        config(codec={"down": "zip"})


@pytest.mark.parametrize("down", ["int8", "int4", "sign", "topk", "uniform16"])
@pytest.mark.parametrize("name", ["fp32", "int4"])
def test_a_run_verifies_and_its_sites_fetch_updates(tmp_path, name, down):
    """The first adapter is drawn, each later one comes as its round's update, to the byte."""
    state = run(config(rounds=4, codec={"name": name, "down": down}), tmp_path)
    found = verify(tmp_path)
    assert (found.findings, found.notes, found.recomputed) == ([], [], 4)
    results = closed(tmp_path)
    whole = records(tmp_path, GenesisRecord)[0].adapter_size
    assert all(r.update_size < whole / 2 for r in results.values())
    for (_, number), came in fetched(tmp_path).items():
        assert came == (0 if number == 1 else results[number - 1].update_size)
    assert all(record.exact_sha != record.adapter_sha for record in results.values())
    assert state.adapter_sha == results[4].adapter_sha
    assert summarise_round(read_history(store_of(tmp_path), "test"), 2).update_bytes


def test_a_files_form_changes_no_adapter(tmp_path):
    """Packed or safetensors, deltas and updates hold the same, and each run verifies."""
    shas, marks = set(), []
    for packed in (True, False):
        folder = tmp_path / str(packed)
        settings = config(codec={**DOWN, "packed": packed})
        assert ("packed" in settings.recorded()["codec"]) == packed
        shas.add(run(settings, folder).adapter_sha)
        assert verify(folder).findings == []
        store = store_of(folder)
        prefixes = topology.updates_prefix("test"), topology.deltas_prefix("test", 2)
        files = [store.get(item.key) for prefix in prefixes for item in store.list(prefix)]
        assert len(files) == 6
        marks.append({data[:8] == MARK for data in files})
    assert len(shas) == 1
    assert marks == [{True}, {False}]


def test_an_exact_codec_comes_to_the_adapter_of_a_run_without(tmp_path):
    """Nothing is left out: x is w but for a rounding of the last digit."""
    run(config(codec={"name": "fp32", "down": "fp32"}), tmp_path / "exact")
    run(config(codec={"name": "fp32"}), tmp_path / "whole")
    one, other = (
        tensors(folder, topology.adapter_key("test", closed(folder)[3].adapter_sha))
        for folder in (tmp_path / "exact", tmp_path / "whole")
    )
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], rtol=1e-6, atol=1e-7)


def test_the_exact_adapter_is_what_the_rounds_add_to(tmp_path):
    """What an update leaves out is in x - w and nowhere else: w follows x, and no step is lost."""
    run(config(rounds=6), tmp_path)
    last = closed(tmp_path)[6]
    exact = tensors(tmp_path, topology.server_state_key("test", last.exact_sha))
    held = tensors(tmp_path, topology.adapter_key("test", last.adapter_sha))
    for name, values in exact.items():
        gap = np.linalg.norm(values - held[name])
        assert 0 < gap < 0.05 * np.linalg.norm(values)


def test_a_site_that_missed_rounds_takes_the_updates_since(tmp_path):
    """One of four trains in a round: it takes all updates since it trained, or at all, if less."""
    selection = {"method": "random", "fraction": 0.25}
    run(config(("a", "b", "c", "d"), 12, selection=selection), tmp_path)
    assert verify(tmp_path).findings == []
    results = closed(tmp_path)
    whole = results[1].adapter_size
    last, several, late = {}, 0, 0
    for record in sorted(records(tmp_path, AcceptedRecord), key=lambda r: r.round):
        before, number = last.get(record.site), record.round
        since = [results[n].update_size for n in range(before or 1, number)]
        less = sum(since) < whole
        # With the rest of the round before: its updates, or the adapter; it is told with a delta.
        assert record.traffic.down == (sum(since) if less else whole)
        several += less and len(since) > 1
        late += less and before is None and number > 1
        last[record.site] = number
    assert several > late > 0


@pytest.mark.parametrize("damage", ["gone", "altered", "workspace"])
def test_a_site_without_the_adapter_before_fetches_it_whole(tmp_path, damage):
    """A lost or altered file costs bytes, and no result: feedback apart, which is lost with it."""
    settings = config(rounds=4, codec={**DOWN, "feedback": False})
    wanted = run(settings, tmp_path / "whole").adapter_sha
    folder, sites = tmp_path / "hurt", learners(settings)
    mine, hurt = folder / "sites" / "b" / "test", []

    def fault(task):
        if task.round == 3:  # a trains first: b has not asked for this round's adapter yet
            hurt.extend((mine / "adapters").iterdir())
            for path in hurt:
                path.write_bytes(b"other") if damage == "altered" else path.unlink()
            if damage == "workspace":
                shutil.rmtree(mine / "trained")

    sites["a"].fault = fault
    assert run(settings, folder, sites).adapter_sha == wanted
    assert len(hurt) == 1
    whole, results = closed(folder)[1].adapter_size, closed(folder)
    assert fetched(folder)["b", 3] == whole
    assert fetched(folder)["b", 4] == results[3].update_size
    assert fetched(folder)["a", 3] == results[2].update_size
    assert verify(folder).findings == []


@pytest.mark.parametrize("how", ["swapped", "torn", "missing", "elsewhere"])
def test_an_update_that_does_not_lead_there_costs_bytes_and_nothing_else(tmp_path, how):
    """Whatever lies at its key, a site says so and fetches the adapter whole."""
    settings = config(rounds=4)
    wanted = run(settings, tmp_path / "whole").adapter_sha
    folder = tmp_path / "hurt"

    class Hostile(DirectoryStore):
        """Its third update is not the one that was stored."""

        updates = 0

        def put_file(self, key, path):
            super().put_file(key, path)
            if key.startswith(topology.updates_prefix("test")):
                self.updates += 1
                if self.updates == 2:
                    hurt_update(self, key, how)

    store = Hostile(folder / "store")
    assert run(settings, folder, store=store).adapter_sha == wanted
    assert store.updates == 4
    results = closed(folder)
    assert all(fetched(folder)[site, 3] == results[2].adapter_size for site in "abc")
    refused = {(r.site, r.round): r.traffic.refused for r in records(folder, AcceptedRecord)}
    assert {key for key, count in refused.items() if count} == {(site, 3) for site in "abc"}
    key = topology.accepted_key("test", 2, "a")
    assert b"refused" not in store.get(key)
    assert fetched(folder)["a", 4] == results[3].update_size
    (finding,) = verify(folder).findings
    assert topology.update_key("test", results[2].update_sha) == finding.key


def hurt_update(store, key, how):
    """Damage what lies at an update's key."""
    data = store.get(key)
    store.delete(key)
    if how == "swapped":
        store.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "torn":
        store.put(key, data[: len(data) // 2])
    elif how == "elsewhere":
        first = next(i.key for i in store.list(topology.updates_prefix("test")) if i.key != key)
        store.put(key, store.get(first))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"server": {"optimizer": "fedadam", "learning_rate": 0.1, "tau": 0.01}},
        {"policy": {"kind": "quorum", "quorum": 2, "deadline_seconds": 900.0, "late": "carry"}},
        {"aggregation": {"averaging": "rolora"}},
    ],
    ids=["plain", "fedadam", "carry", "rolora"],
)
def test_a_restart_at_any_write_ends_in_the_same_adapter(tmp_path, sections):
    """Die before and after each write to the store: exact adapter, update and adapter agree."""
    for folder in restarted(config(("a", "b"), 2, **sections), tmp_path):
        assert verify(folder).findings == []


@pytest.mark.parametrize("averaging", ["ffa", "rolora"])
def test_an_update_holds_what_was_trained(tmp_path, averaging):
    """A factor that stays costs no byte on the way down."""
    run(config(rounds=4, aggregation={"averaging": averaging}), tmp_path)
    held = [
        tensors(tmp_path, topology.update_key("test", record.update_sha)).keys()
        for record in closed(tmp_path).values()
    ]
    assert all(len(names) == 1 for names in held)
    assert len(set(map(tuple, held))) == (2 if averaging == "rolora" else 1)
    assert verify(tmp_path).findings == []


def test_a_branch_begins_with_what_the_sites_hold(tmp_path):
    """The exact adapter is w at its start; it needs nothing of its parent's exact adapter."""
    run(config(), tmp_path)
    parent, child = (
        operator_ledger(store_of(tmp_path), name, time.time) for name in ("test", "child")
    )
    branch_run(parent, 2, child)
    settings = config(name="child")
    run(settings, tmp_path)
    genesis = next(r for r in records(tmp_path, GenesisRecord, "child"))
    assert genesis.adapter_sha == closed(tmp_path)[2].adapter_sha
    assert all(fetched(tmp_path, "child")[site, 1] == genesis.adapter_size for site in "abc")
    assert verify(tmp_path, "child").findings == []


def test_export_gives_what_the_sites_hold(tmp_path):
    """The run's adapter is w, and the exact one nobody's but the coordinator's."""
    state = run(config(), tmp_path)
    history = read_history(store_of(tmp_path), "test")
    export_adapter(history, store_of(tmp_path), tmp_path / "out", 3)
    exported, name = tmp_path / "out", "adapter_model.safetensors"
    stored = store_of(tmp_path).get(topology.adapter_key("test", state.adapter_sha))
    assert (exported / name).read_bytes() == stored


@pytest.mark.parametrize(("keep", "left"), [("adapters", 1), ("last:2", 3)])
def test_pruning_takes_the_updates_too(tmp_path, keep, left):
    """Those of the rounds whose states go; what stays is checked as before."""
    run(config(rounds=6), tmp_path)
    ledger = operator_ledger(store_of(tmp_path), "test", time.time)
    carry_out(ledger, read_plan(ledger, keep), "room", "me", lambda _: None)
    prefixes = (topology.updates_prefix("test"), topology.server_state_prefix("test"))
    assert [len(list(store_of(tmp_path).list(prefix))) for prefix in prefixes] == [left, left]
    found = verify(tmp_path)
    assert found.findings == []
    assert found.notes
    assert found.recomputed == left - 1


@pytest.mark.parametrize("what", ["update", "exact"])
def test_verify_finds_what_was_swapped(tmp_path, what):
    """An update or an exact adapter of another round in its place."""
    run(config(), tmp_path)
    results, store = closed(tmp_path), store_of(tmp_path)
    key_of = topology.update_key if what == "update" else topology.server_state_key
    mine, other = (key_of("test", getattr(results[n], f"{what}_sha")) for n in (2, 1))
    store.put(mine, store.get(other))
    assert {finding.key for finding in verify(tmp_path).findings} == {mine}


@pytest.mark.parametrize("name", ["update_sha", "exact_sha", "update_size"])
def test_verify_finds_a_record_that_says_something_else(tmp_path, name):
    """Of round 2, and nothing but that."""
    run(config(), tmp_path)
    store, key = store_of(tmp_path), topology.round_key("test", 2, "closed")
    record = closed(tmp_path)[2]
    lie = 5 if name == "update_size" else closed(tmp_path)[1].update_sha
    store.put(key, store.get(key).replace(str(getattr(record, name)).encode(), str(lie).encode()))
    assert any(name in f.problem for f in verify(tmp_path).findings if f.key == key)
