"""A run's history: every record in its place, and what becomes of one that cannot be read."""

from __future__ import annotations

import pytest

from coordinator.history import read_history
from coordinator.runs.newest_round import WHOLE_EVERY, Follower
from shared import topology
from shared.errors import LedgerDamagedError
from shared.protocol.ledger import Ledger
from shared.protocol.records import PrunedRecord
from shared.stores.directory import DirectoryStore
from tests import federations
from tests.coordinator.test_controls import when
from tests.steering import ask, records, store_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of two rounds: an extension, and three sites."""
    folder = tmp_path_factory.mktemp("whole")
    config = federations.config(rounds=1)
    more = when(config, 1, lambda: ask(folder, "extend", "more", rounds=1))
    federations.run(config, folder, more)
    return folder


def test_every_record_lies_in_a_field_of_its_kind(whole):
    """None is lost and none is doubled, and each round's are in the order of the ledger."""
    history = read_history(store_of(whole), "test")
    found = [
        history.federation,
        *history.members.values(),
        *history.controls,
        *(record for there in history.rounds.values() for record in there.records),
        history.finished,
    ]
    assert found == records(whole, object)
    assert list(history.rounds) == [0, 1, 2]
    assert (history.last_closed, history.total_rounds) == (2, 2)
    assert history.genesis is history.round(0).result
    assert [history.round(n).state for n in (0, 2, 3)] == ["closed", "closed", "open"]
    assert set(history.accepted) == {(site, n) for site in "abc" for n in (1, 2)}
    assert {pair: n for pair, (n, _) in history.counted.items()} == {
        (site, n): n for site in "abc" for n in (1, 2)
    }
    assert set(history.held_out(2)) == set("abc")


def test_a_damaged_record_hides_no_other(whole):
    """Whoever listens is told of each with its place, and gets the rest; else it is an error."""
    store = store_of(whole)
    keys = ["runs/test/members/b.json", "runs/test/rounds/00001/closing.json"]
    pruned = PrunedRecord(number=1, keep="x", keys=("x",), reason="", by="").key("test")
    kept = {key: store.get(key) for key in keys}
    for key in (*keys, pruned):
        store.put(key, b"{")
    told = []
    history = read_history(store, "test", lambda place, error: told.append((place, str(error))))
    assert [(place.key, place.round) for place, _ in told] == [
        (keys[0], None),
        (pruned, None),
        (keys[1], 1),
    ]
    assert all(place.key in problem for place, problem in told)
    assert (sorted(history.members), history.pruned) == (["a", "c"], [])
    assert (history.round(1).closing, history.round(1).state) == (None, "closed")
    with pytest.raises(LedgerDamagedError, match="members/b"):
        read_history(store, "test")
    for key, data in kept.items():
        store.put(key, data)
    store.delete(pruned)
    assert read_history(store, "test").finished == history.finished


def test_who_reads_while_it_is_written_knows_the_same_in_the_end(whole, tmp_path):
    """Record after record, with a look after each, and a late word of an old round after the end.

    Most looks list the newest two rounds only; the late word is found all the same.
    """
    store = DirectoryStore(tmp_path)
    source, ledger = store_of(whole), Ledger(store_of(whole), "test", "reader", lambda: 0.0)
    keys = [topology.federation_key("test"), *(place.key for place in ledger.places())]
    late = next(key for key in keys if "rounds/00001/accepted/" in key)
    store.put(keys[0], source.get(keys[0]))
    follower = Follower(store, "test", whole=True)
    for key in [*(key for key in keys[1:] if key != late), late]:
        store.put(key, source.get(key))
        now = follower.look()
    looks = 0
    while late not in follower.keys:
        now, looks = follower.look(), looks + 1
        assert looks <= WHOLE_EVERY
    assert now.history == read_history(source, "test")
    assert follower.count == len(keys) - 1
