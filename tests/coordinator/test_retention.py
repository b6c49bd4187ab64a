"""Pruning: what goes, what stays although it was asked for, and what verify says afterwards."""

from __future__ import annotations

import shutil

import pytest

from coordinator.history import read_history
from coordinator.runs.operating import operator_ledger
from coordinator.runs.retention import carry_out, plan, read_plan
from shared import topology
from shared.errors import ConfigError, LedgerDamagedError, RunStuckError
from shared.protocol.records import ClosedRecord, GenesisRecord, PrunedRecord
from tests import federations
from tests.coordinator.test_controls import when
from tests.steering import Crash, Mortal, ask, records, store_of, verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of four rounds."""
    folder = tmp_path_factory.mktemp("whole")
    federations.run(federations.config(rounds=4), folder)
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of it to prune."""
    return shutil.copytree(whole, tmp_path / "copy")


def prune(folder, keep, store=None):
    """Plan, record, delete; the plan."""
    ledger = operator_ledger(store or store_of(folder), "test", lambda: 86_400.0)
    wanted = read_plan(ledger, keep)
    carry_out(ledger, wanted, "room", "me", lambda _: None)
    return wanted


def there(folder, what):
    """The keys below ``adapters/`` or ``deltas/``."""
    prefix = f"runs/test/{what}/"
    return [info.key.removeprefix(prefix) for info in store_of(folder).list(prefix)]


def shas(folder):
    """The adapter's sha256 by round."""
    found = [*records(folder, GenesisRecord), *records(folder, ClosedRecord)]
    return {record.round: record.adapter_sha for record in found}


def test_keeping_all_deletes_nothing(finished):
    """And leaves no record of a deletion."""
    assert prune(finished, "all").objects == ()
    assert records_pruned(finished) == []


def records_pruned(folder):
    """What is on record as deleted."""
    return list(operator_ledger(store_of(folder), "test", lambda: 0.0).pruned())


def test_keeping_adapters_deletes_the_deltas_of_closed_rounds(finished):
    """Verify says of each when it went, finds nothing, and still hashes every adapter."""
    wanted = prune(finished, "adapters")
    assert {item.round for item in wanted.objects} == {1, 2, 3, 4}
    assert len(wanted.objects) == 12
    assert there(finished, "deltas") == []
    assert len(there(finished, "adapters")) == 10
    found = verify(finished)
    assert (found.findings, found.rounds, found.deltas) == ([], 4, 0)
    assert len(found.notes) == 12
    assert {note.problem for note in found.notes} == {"pruned on 1970-01-02: cannot be recomputed"}
    (record,) = records_pruned(finished)
    assert set(record.keys) == {item.key for item in wanted.objects}
    assert any("rounds 1 to 4" in line for line in wanted.consequences)


def test_after_pruning_damage_is_found_all_the_same(finished):
    """An adapter, a weight, a record: what does not need the deltas is checked."""
    prune(finished, "adapters")
    store = store_of(finished)
    key = topology.adapter_key("test", shas(finished)[2])
    data = store.get(key)
    store.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    store.delete("runs/test/rounds/00003/accepted/b.json")
    found = {(finding.round, finding.key) for finding in verify(finished).findings}
    assert (2, key) in found
    assert (3, "runs/test/rounds/00003/accepted/b.json") in found


def test_the_last_rounds_can_still_be_recomputed(finished):
    """last:2 keeps what rounds 3 and 4 come from: their deltas, and the adapter they began with."""
    before = shas(finished)
    wanted = prune(finished, "last:2")
    kept = {key.partition("/")[0] for key in there(finished, "adapters")}
    assert kept == {before[2], before[3], before[4]}
    assert {key[:5] for key in there(finished, "deltas")} == {"00003", "00004"}
    found = verify(finished)
    assert (found.findings, found.rounds, found.deltas) == ([], 4, 6)
    assert {note.round for note in found.notes} == {0, 1, 2}
    assert any("recompute rounds 1 to 2" in line for line in wanted.consequences)
    assert any("adapter of rounds 0 to 1" in line for line in wanted.consequences)


def test_more_rounds_than_there_are_keeps_everything(finished):
    """last:99 of four rounds."""
    assert prune(finished, "last:99").objects == ()


@pytest.mark.parametrize("keep", ["last:0", "last", "last:-1", "nothing", "last:1x", ""])
def test_another_word_is_refused(finished, keep):
    """The error names the words there are."""
    with pytest.raises(ConfigError, match=r"expected all, adapters or last:N"):
        prune(finished, keep)


# Unfinished runs ----------------------------------------------------------------------------------


@pytest.fixture
def unfinished(tmp_path):
    """Round 3 is open: a and c are in, b failed for good."""
    config = federations.config(rounds=4)

    def fail():
        raise ConfigError("b is broken")

    with pytest.raises(RunStuckError):
        federations.run(config, tmp_path, when(config, 3, fail, site="b"))
    return config, tmp_path


@pytest.mark.parametrize("keep", ["adapters", "last:1"])
def test_an_unfinished_run_keeps_what_it_goes_on_with(unfinished, tmp_path_factory, keep):
    """The newest adapter and every delta that no round has counted; the digest is the same."""
    config, folder = unfinished
    wanted = federations.run(config, tmp_path_factory.mktemp("whole")).adapter_sha
    prune(folder, keep)
    assert {key[:5] for key in there(folder, "deltas")} - {"00002"} == {"00003"}
    assert f"{shas(folder)[2]}/adapter_model.safetensors" in there(folder, "adapters")
    assert federations.run(config, folder).adapter_sha == wanted
    assert verify(folder).findings == []


def test_a_delta_that_no_round_has_counted_stays_until_the_end(tmp_path):
    """A was taken out after its delta of round 2 was accepted: under carry it may still count."""
    config = federations.config()

    def take_out():
        ask(tmp_path, "exclude", "x", site="a")
        ask(tmp_path, "pause")

    with pytest.raises(RunStuckError, match="paused after round 2"):
        federations.run(config, tmp_path, when(config, 2, take_out, site="b"))
    (line,) = prune(tmp_path, "adapters").kept
    assert "deltas/00002/a-" in line
    assert "no round has counted it yet" in line
    assert [key[:7] for key in there(tmp_path, "deltas")] == ["00002/a"]


def test_a_delta_that_no_record_speaks_of_stays_until_the_end(unfinished):
    """Its record may be about to be written."""
    _, folder = unfinished
    stray = topology.delta_key("test", 1, "a", "d" * 64)
    store_of(folder).put(stray, b"x")
    assert any(line.startswith(stray) for line in prune(folder, "adapters").kept)
    assert store_of(folder).get(stray) == b"x"


def test_a_late_delta_that_a_newer_round_counted_goes_with_that_round(whole):
    """What is kept of the last rounds is all they were made of, from whatever round it came."""
    history = read_history(store_of(whole), "test")
    second, fourth = history.rounds[2], history.rounds[4]
    inputs, sha = fourth.closing.inputs, {"sha": "d" * 64}
    more = (*inputs, inputs[0].model_copy(update={"from_round": 2, **sha}))
    fourth.closing = fourth.closing.model_copy(update={"inputs": more})
    fewer = second.closing.inputs[1:]
    second.closing = second.closing.model_copy(update={"inputs": fewer})
    second.accepted["a"] = second.accepted["a"].model_copy(update=sha)
    late = topology.delta_key("test", 2, "a", "d" * 64)
    other = topology.delta_key("test", 2, "b", "e" * 64)
    found = plan(history, {late: 1, other: 1}, "last:1")
    assert [item.key for item in found.objects] == [other]


@pytest.mark.parametrize(("late", "left"), [(0, [3]), (1, [2, 3])])
def test_uploads_go_that_no_round_takes_any_more(tmp_path, late, left):
    """Of an unfinished run those of closed rounds, but for late ones that may count."""
    policy = {"kind": "quorum", "quorum": 3, "deadline_seconds": 9.0}
    if late:
        policy |= {"late": "carry", "max_staleness": late}
    config = federations.config(policy=policy)

    def halt():
        raise Crash

    with pytest.raises(Crash):
        federations.run(config, tmp_path, when(config, 3, halt))
    uploads = [topology.inbox_key("test", number, "a", "d" * 64, 0) for number in (1, 2, 3)]
    for key in uploads:
        store_of(tmp_path).put(key, b"xy")
    assert prune(tmp_path, "all").uploads == ()
    assert inbox(tmp_path) == uploads
    wanted = prune(tmp_path, "last:9")
    assert (wanted.objects, wanted.bytes) == ((), 2 * (3 - len(left)))
    assert inbox(tmp_path) == [uploads[number - 1] for number in left]
    assert records_pruned(tmp_path) == []


def test_after_the_end_every_upload_goes(finished):
    """Of whatever round; no record speaks of them, and another run's stay."""
    keys = [topology.inbox_key(run, 9, "a", "d" * 64, 0) for run in ("test", "tests")]
    for key in keys:
        store_of(finished).put(key, b"x")
    prune(finished, "adapters")
    assert inbox(finished) == keys[1:]
    (record,) = records_pruned(finished)
    assert not any(key.startswith(topology.INBOX) for key in record.keys)


def inbox(folder):
    """The keys of all uploads."""
    return [info.key for info in store_of(folder).list(topology.INBOX)]


# Kills ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_write_of_a_pruning_is_no_harm(whole, tmp_path, after):
    """Nothing goes before it is on record; said again, it ends in the same objects."""
    wanted = shutil.copytree(whole, tmp_path / "wanted")
    prune(wanted, "last:1")
    left = there(wanted, "adapters") + there(wanted, "deltas")
    for number in range(1, 100):
        folder = shutil.copytree(whole, tmp_path / str(number))
        store = Mortal(folder / "store", number, after=after)
        try:
            prune(folder, "last:1", store)
        except Crash:
            found = verify(folder)
            assert found.findings == []
            gone = 16 - len(there(folder, "deltas")) - 4
            assert gone == 0 or records_pruned(folder) != []
        prune(folder, "last:1")
        assert there(folder, "adapters") + there(folder, "deltas") == left
        assert verify(folder).findings == []
        if not store.fired:
            break
    assert number > 10
    prune(folder, "last:1")
    assert len(records_pruned(folder)) == 1  # nothing left to delete: nothing more on record


def test_a_torn_pruned_record_is_found_and_excuses_nothing(finished):
    """What it deleted is missing then."""
    prune(finished, "adapters")
    store = store_of(finished)
    key = PrunedRecord(number=1, keep="x", keys=("x",), reason="", by="").key("test")
    store.put(key, store.get(key)[:50])
    found = verify(finished)
    assert key in {finding.key for finding in found.findings}
    assert len(found.findings) == 13
    assert found.notes == []


def test_a_stopped_run_can_be_pruned_like_any_finished_one(tmp_path):
    """Also the deltas of the round that was open at the end."""
    config = federations.config()
    federations.run(config, tmp_path, when(config, 2, lambda: ask(tmp_path, "stop", "x"), "b"))
    assert {key[:5] for key in there(tmp_path, "deltas")} == {"00001", "00002"}
    prune(tmp_path, "adapters")
    assert {key[:5] for key in there(tmp_path, "deltas")} == set()
    assert verify(tmp_path).findings == []


def test_export_of_a_pruned_round_says_so(finished, tmp_path):
    """The error names the record, not damage."""
    from coordinator.runs.export import export_adapter

    prune(finished, "last:1")
    store = store_of(finished)
    with pytest.raises(LedgerDamagedError, match=r"pruned.*pruned/00001\.json"):
        export_adapter(read_history(store, "test"), store, tmp_path / "out", 1)
