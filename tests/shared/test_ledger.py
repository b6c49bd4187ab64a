"""A record is written once: by one writer, for ever."""

from __future__ import annotations

import pytest

from shared.config import canonical_json
from shared.errors import FencedError, LedgerDamagedError, RunExistsError, RunNotFoundError
from shared.protocol.ledger import Ledger, list_runs
from shared.protocol.records import DeclinedRecord, FinishedRecord, GenesisRecord
from shared.stores.directory import DirectoryStore
from tests.federations import config
from tests.numpy_learner import MANIFEST


@pytest.fixture
def store(tmp_path):
    return DirectoryStore(tmp_path / "store")


def ledger(store, writer="one", now=5.0):
    return Ledger(store, "test", writer, lambda: now)


def genesis(sha="a" * 64):
    return GenesisRecord(
        members=("a",), manifest=MANIFEST, fingerprint="f" * 64, adapter_sha=sha, adapter_size=1
    )


def test_a_record_says_who_wrote_it_and_when(store):
    """The stamp is the ledger's, not the caller's."""
    written = ledger(store).write(FinishedRecord(round=1, sha=None, reason="x"))
    assert (written.writer, written.time) == ("one", 5.0)


def test_a_repeated_write_meets_its_own_first_attempt(store):
    """The first record stands, with its first time."""
    ledger(store).write(FinishedRecord(round=1, sha=None, reason="x"))
    again = ledger(store, now=9.0).write(FinishedRecord(round=1, sha=None, reason="x"))
    assert again.time == 5.0


def test_another_writers_decision_fences_this_one(store):
    """Two coordinators: the second learns that it is not alone."""
    ledger(store).write(FinishedRecord(round=1, sha=None, reason="x"))
    with pytest.raises(FencedError, match="another coordinator"):
        ledger(store, "two").write(FinishedRecord(round=1, sha=None, reason="x"))


def test_a_fact_that_decides_nothing_is_adopted_from_anybody(store):
    """A declined site is no decision of the coordinator's."""
    ledger(store).write(DeclinedRecord(site="a", reason="first"))
    assert ledger(store, "two").write(DeclinedRecord(site="a", reason="later")).reason == "first"


def test_another_result_on_record_is_damage(store):
    """A pure function of the same records cannot give two results."""
    ledger(store).write(genesis())
    assert ledger(store, "two").write(genesis()) == genesis()
    with pytest.raises(LedgerDamagedError, match="rounds/00000/closed"):
        ledger(store).write(genesis("b" * 64))


def test_begin_names_every_setting_that_differs(store):
    """Field, what is on record, what came."""
    ledger(store).begin(config())
    with pytest.raises(RunExistsError, match=r"run\.rounds is 3 on record, 5 here.*run\.seed"):
        ledger(store).begin(config(rounds=5, run={"seed": 9}))


def test_an_altered_config_does_not_pass(store):
    """The recorded digest holds the recorded config."""
    record = ledger(store).begin(config())
    values = record.model_dump(mode="json")
    values["config"]["run"]["rounds"] = 99
    store.put("runs/test/federation.json", canonical_json(values))
    with pytest.raises(LedgerDamagedError, match="digest"):
        ledger(store).config()


def test_an_unknown_run_is_named(store):
    """A typo in a run's name is no empty history."""
    with pytest.raises(RunNotFoundError, match="'test'"):
        list(ledger(store).history())
    assert list_runs(store) == {}
