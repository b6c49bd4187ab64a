"""The store loses a delta that was taken: its site sends it again, and the round is closed."""

import re
import shutil

import pytest

from coordinator.deltas import Deltas
from coordinator.runs.branching import branch_run
from coordinator.runs.operating import operator_ledger
from shared import topology
from shared.errors import LedgerDamagedError
from shared.protocol.events import UploadRequested
from shared.protocol.records import AcceptedRecord, ClosingRecord
from shared.stores.directory import DirectoryStore
from tests import federations
from tests.steering import Crash, ask, records, store_of, verify


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """What the run ends in when nothing is lost."""
    folder = tmp_path_factory.mktemp("whole")
    return federations.run(federations.config(), folder).adapter_sha


@pytest.fixture
def halted(tmp_path):
    """A run whose coordinator died with its disk in round 2, when c was still at work."""
    config = federations.config()
    sites = federations.learners(config)

    def crash(task):
        if task.round == 2:
            raise Crash

    sites["c"].fault = crash
    with pytest.raises(Crash):
        federations.run(config, tmp_path, sites)
    shutil.rmtree(tmp_path / "spool")
    return config, tmp_path


def lose(folder, site, how):
    """Damage or remove the delta of round 2; its key and what it was."""
    (record,) = [r for r in records(folder, AcceptedRecord) if (r.round, r.site) == (2, site)]
    key, store = topology.delta_key("test", 2, site, record.sha), store_of(folder)
    data = store.get(key)
    if how == "removed":
        store.delete(key)
    else:
        store.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    return key, data


@pytest.mark.parametrize("how", ["damaged", "removed"])
def test_a_lost_delta_is_sent_again_and_the_run_ends_in_the_same_adapter(halted, wanted, how):
    """Of two sites at once. The site trains nothing again, and the chain is whole after it."""
    config, folder = halted
    lost = [lose(folder, site, how) for site in "ab"]
    sites = federations.learners(config)
    assert federations.run(config, folder, sites).adapter_sha == wanted
    assert [sites[site].trained for site in "abc"] == [[3], [3], [2, 3]]
    for key, data in lost:
        assert store_of(folder).get(key) == data
    assert verify(folder).findings == []


def test_what_an_excluded_site_sends_again_is_not_swept(halted, wanted, monkeypatch):
    """It was counted before it was taken out: the decided round needs it."""
    config, folder = halted
    key, data = lose(folder, "a", "removed")
    restore = Deltas._restore

    def excluded_before(self, upload):
        ask(folder, "exclude", site="a")
        assert self._run.notice_controls()
        restore(self, upload)

    monkeypatch.setattr(Deltas, "_restore", excluded_before)
    assert federations.run(config, folder).adapter_sha != wanted
    assert store_of(folder).get(key) == data
    decided = [[item.site for item in closing.inputs] for closing in records(folder, ClosingRecord)]
    assert decided == [["a", "b", "c"], ["a", "b", "c"], ["b", "c"]]
    assert verify(folder).findings == []


@pytest.mark.parametrize("way", ["the site", "a copy", "a branch"])
def test_a_delta_that_its_site_lost_too_is_named_and_there_is_a_way_on(halted, wanted, way):
    """The decision is on record by then. Object and command are named; each way works."""
    config, folder = halted
    key, data = lose(folder, "a", "damaged")
    workspace, aside = folder / "sites" / "a" / "test" / "trained", folder / "aside"
    workspace.rename(aside)
    says = rf"{re.escape(key)}.*the stored object is damaged.*runs branch test --at 1 --name"
    for _ in range(2):
        with pytest.raises(LedgerDamagedError, match=says):
            federations.run(config, folder)
    assert len(records(folder, ClosingRecord)) == 2
    if way == "a branch":
        ledgers = [operator_ledger(store_of(folder), run, lambda: 1.0) for run in ("test", "new")]
        branch_run(ledgers[0], 1, ledgers[1])
        state = federations.run(federations.config(name="new", rounds=1), folder)
        assert state.finished is not None
        assert not state.finished.failed
        assert verify(folder, "new").findings == []
        return
    if way == "the site":
        shutil.rmtree(workspace)
        aside.rename(workspace)
    else:
        store_of(folder).put(key, data)
    assert federations.run(config, folder).adapter_sha == wanted
    assert verify(folder).findings == []


@pytest.mark.parametrize("who", ["a site of an older release", "a store that cannot"])
def test_deltas_that_take_the_inbox_end_in_the_same_adapter(tmp_path, wanted, monkeypatch, who):
    """They are stored again from the spool, and nothing of them is left there."""
    if who == "a store that cannot":
        monkeypatch.setattr(DirectoryStore, "indirect", "as if")
    else:

        def older(**fields):
            return UploadRequested(**{**fields, "creates": False})

        monkeypatch.setattr("participant.uploads.UploadRequested", older)
    stored = []
    put_file = DirectoryStore.put_file

    def seen(self, key, path):
        stored.append(key)
        return put_file(self, key, path)

    monkeypatch.setattr(DirectoryStore, "put_file", seen)
    assert federations.run(federations.config(), tmp_path).adapter_sha == wanted
    assert sum("/deltas/" in key for key in stored) == len(records(tmp_path, AcceptedRecord))
    assert list(store_of(tmp_path).list(topology.INBOX)) == []
