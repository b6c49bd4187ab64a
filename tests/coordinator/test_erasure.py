"""Erasing: content gone, records there; and what verify, export and the next start say then."""

from __future__ import annotations

import shutil

import pytest

from coordinator.history import read_history
from coordinator.runs.erasure import erase, read_erasure
from coordinator.runs.operating import operator_ledger
from shared import topology
from shared.errors import ConfigError, LedgerDamagedError, LedgerError, RunNotFoundError
from tests import federations
from tests.coordinator.test_controls import when
from tests.coordinator.test_retention import prune, records_pruned, there
from tests.steering import Crash, Mortal, ask, store_of, verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of three rounds."""
    folder = tmp_path_factory.mktemp("whole")
    federations.run(federations.config(rounds=3), folder)
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of it to erase."""
    return shutil.copytree(whole, tmp_path / "copy")


def gone(folder, store=None, **scope):
    """Plan, record, erase; the plan."""
    ledger = operator_ledger(store or store_of(folder), "test", lambda: 86_400.0)
    wanted = read_erasure(ledger, **scope)
    erase(ledger, wanted, "withdrawn", "me", lambda _: None)
    return wanted


def content(folder):
    """Every object of the run that is no record."""
    keys = (info.key for info in store_of(folder).list("runs/test/"))
    return [key for key in keys if not key.endswith(".json") or "/adapters/" in key]


def says_of(folder):
    """What verify notes of the objects that are not there; it must find nothing."""
    found = verify(folder)
    assert found.findings == []
    return {note.problem for note in found.notes}


def test_a_whole_run_keeps_its_records_and_nothing_else(finished):
    """Verify calls what is gone erased, not damaged; every record still answers."""
    before = [info.key for info in store_of(finished).list("runs/test/")]
    was = content(finished)
    store_of(finished).put(topology.inbox_key("test", 2, "a", "d" * 64, 0), b"x")
    wanted = gone(finished)
    assert {item.key for item in wanted.objects} == set(was)
    assert content(finished) == []
    assert list(store_of(finished).list(topology.INBOX)) == []
    after = [info.key for info in store_of(finished).list("runs/test/")]
    assert sorted(set(before) - set(after)) == sorted(was)
    assert says_of(finished) == {"erased on 1970-01-02: cannot be recomputed"}
    (record,) = records_pruned(finished)
    assert (record.erased, record.reason, record.by) == ("all", "withdrawn", "me")
    assert any("rounds 1 to 3" in line for line in wanted.consequences)


def test_a_round_takes_its_deltas_and_the_adapter_that_came_of_them(finished):
    """The others keep theirs; round 3, which began with that adapter, cannot be recomputed."""
    result = read_history(store_of(finished), "test").rounds[2].closed.adapter_sha
    gone(finished, number=2)
    assert {key[:5] for key in there(finished, "deltas")} == {"00001", "00003"}
    assert not any(key.startswith(result) for key in there(finished, "adapters"))
    assert len(there(finished, "adapters")) == 6
    assert says_of(finished) == {"erased on 1970-01-02: cannot be recomputed"}
    assert verify(finished).recomputed == 1


def test_a_site_that_withdraws_takes_its_deltas(finished):
    """The adapters it was added to stay, and the plan says so."""
    wanted = gone(finished, site="a")
    assert len(wanted.objects) == 3
    assert [key[6] for key in there(finished, "deltas")] == ["b", "c"] * 3
    assert len(there(finished, "adapters")) == 8
    assert any("the adapters that a gave its deltas to are kept" in x for x in wanted.consequences)
    assert says_of(finished) == {"erased on 1970-01-02: cannot be recomputed"}
    (record,) = records_pruned(finished)
    assert record.erased == "site a"
    gone(finished, site="b", number=3)
    assert [key[:7] for key in there(finished, "deltas")] == [
        *("00001/b", "00001/c", "00002/b", "00002/c"),
        "00003/c",
    ]


def test_a_name_that_begins_like_another_is_another(tmp_path):
    """Site a-b keeps its deltas when a withdraws."""
    federations.run(federations.config(("a", "a-b"), 1), tmp_path)
    gone(tmp_path, site="a")
    (left,) = there(tmp_path, "deltas")
    assert left.startswith("00001/a-b-")


def test_damage_is_still_damage(finished):
    """What was not erased and is missing is a finding."""
    gone(finished, site="a")
    (lost, *_) = there(finished, "deltas")
    store_of(finished).delete(f"runs/test/deltas/{lost}")
    (finding,) = verify(finished).findings
    assert finding.key == f"runs/test/deltas/{lost}"


def test_what_was_pruned_before_stays_pruned(finished):
    """The first record that names an object says what became of it."""
    prune(finished, "adapters")
    gone(finished)
    assert says_of(finished) == {
        "erased on 1970-01-02: cannot be recomputed",
        "pruned on 1970-01-02: cannot be recomputed",
    }


def test_export_of_an_erased_run_says_so(finished, tmp_path):
    """The error names the record and the reason."""
    from coordinator.runs.export import export_adapter

    gone(finished)
    store = store_of(finished)
    with pytest.raises(LedgerDamagedError, match=r"was erased.*pruned/00001\.json: withdrawn"):
        export_adapter(read_history(store, "test"), store, tmp_path / "out", 3)


@pytest.fixture
def paused(tmp_path):
    """Cut off in round 3 of 3, site a excluded meanwhile."""
    config, folder = federations.config(rounds=3), tmp_path / "paused"

    def halt():
        ask(folder, "exclude", "withdrawn", site="a")
        raise Crash

    with pytest.raises(Crash):
        federations.run(config, folder, when(config, 3, halt))
    return config, folder


def test_an_unfinished_run_gives_up_a_sites_old_deltas_and_nothing_that_it_needs(paused):
    """It ends with the adapter that it would have had; the whole of it is refused."""
    config, folder = paused
    other = shutil.copytree(folder, folder.parent / "other")
    for scope in ({}, {"number": 1}):
        with pytest.raises(LedgerError, match="not finished"):
            gone(folder, **scope)
    wanted = gone(folder, site="a")
    assert {item.key.split("/")[3] for item in wanted.objects} == {"00001", "00002"}
    result = federations.run(config, folder).adapter_sha
    assert result == federations.run(config, other).adapter_sha
    assert says_of(folder) == {"erased on 1970-01-02: cannot be recomputed"}


def test_a_site_or_a_round_that_is_not_there_is_named(finished):
    """A misspelt word erases nothing."""
    before = content(finished)
    with pytest.raises(ConfigError, match="--site: expected one of a, b, c, got d"):
        gone(finished, site="d")
    with pytest.raises(RunNotFoundError, match="no round 4"):
        gone(finished, number=4)
    assert content(finished) == before
    assert records_pruned(finished) == []


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_write_of_an_erasure_is_no_harm(whole, tmp_path, after):
    """Nothing goes before it is on record; said again, all is gone."""
    for at in range(1, 100):
        folder = shutil.copytree(whole, tmp_path / str(at))
        store = Mortal(folder / "store", at, after=after)
        try:
            gone(folder, store)
        except Crash:
            assert says_of(folder) <= {"erased on 1970-01-02: cannot be recomputed"}
        gone(folder)
        assert content(folder) == []
        assert says_of(folder) == {"erased on 1970-01-02: cannot be recomputed"}
        if not store.fired:
            break
    assert at > 10
