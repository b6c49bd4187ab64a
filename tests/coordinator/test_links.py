"""The chain of links: every record is named, nothing is said before it, and nobody else adds."""

from __future__ import annotations

import hashlib
import json

import pytest

from coordinator.audit.verification import verify_run
from coordinator.bootstrap import build_coordinator
from shared import topology
from shared.brokers.embedded import EmbeddedBroker
from shared.config import canonical_json
from shared.errors import (
    FencedError,
    LedgerDamagedError,
    RunExistsError,
    StoreUnavailableError,
)
from shared.protocol.ledger import Ledger
from shared.protocol.records import DeclinedRecord, FinishedRecord, LinkRecord, OpenedRecord
from shared.stores.directory import DirectoryStore
from shared.trust.keys import SigningKey
from tests import federations
from tests.steering import Crash, ask, forget, forget_links, records, store_of, verify

KEY, OTHER = SigningKey.generate(), SigningKey.generate()


def coordinator(folder, store=None, key=None):
    """One more coordinator of the run, on a broker of its own, and that broker."""
    broker = EmbeddedBroker().connect("coordinator", topology.coordinator_rights())
    store = store or store_of(folder)
    clock, spool = (lambda: 1.0), folder / "spool"
    role = build_coordinator(federations.config(), store, broker, spool, clock, key=key)
    return role.coordinator, broker


def links(folder):
    """All links, in order."""
    ledger = Ledger(store_of(folder), "test", "test", lambda: 0.0)
    keys = [info.key for info in ledger.store.list(topology.links_prefix("test"))]
    return [ledger.read(LinkRecord, key) for key in keys]


def there(folder):
    """Every record that lies in the store, with its sha256."""
    store = store_of(folder)
    places = Ledger(store, "test", "test", lambda: 0.0).places()
    keys = [place.key for place in places] + [topology.federation_key("test")]
    prefix = topology.run_prefix("test")
    return {k.removeprefix(prefix): hashlib.sha256(store.get(k)).hexdigest() for k in keys}


def assert_whole(folder):
    """Each record is named once, by its bytes, and each link names the bytes of the one before."""
    found, store, before = links(folder), store_of(folder), None
    names = [(name, sha) for link in found for name, sha in (link.records | link.found).items()]
    assert sorted(names) == sorted(there(folder).items())
    for number, link in enumerate(found, 1):
        assert (link.number, link.previous) == (number, before)
        before = hashlib.sha256(store.get(link.key("test"))).hexdigest()


def test_every_record_of_a_run_is_named_by_its_bytes(tmp_path):
    """What the coordinator wrote, and what an operator did."""
    config = federations.config()
    sites = federations.learners(config)

    def asks(task):
        if task.round == 2:
            ask(tmp_path, "extend", rounds=1)

    sites["b"].fault = asks
    federations.run(config, tmp_path, sites)
    assert_whole(tmp_path)
    (extended,) = [name for link in links(tmp_path) for name in link.found]
    assert extended == "control/00001.json"


def test_what_was_recorded_and_not_linked_is_taken_in_at_the_next_start(tmp_path):
    """Killed between a record and its link, at every link there is."""

    class Dies(DirectoryStore):
        at = 0

        def create(self, key, data):
            if key == topology.link_key("test", self.at):
                raise Crash
            return super().create(key, data)

    fired = 0
    for at in range(1, 100):
        folder, config = tmp_path / str(at), federations.config(("a", "b"), 2)
        store = Dies(folder / "store")
        store.at = at
        try:
            federations.run(config, folder, store=store)
        except Crash:
            fired += 1
            federations.run(config, folder)
            assert links(folder)[at - 1].found
        assert_whole(folder)
        if fired < at:
            break
    assert fired >= 6


def test_a_run_of_a_release_without_links_is_taken_in_whole(tmp_path):
    """More records than one link names."""
    config = federations.config()
    federations.run(config, tmp_path)
    store = store_of(tmp_path)
    forget(store, topology.finished_key("test"))
    forget_links(store)
    federations.run(config, tmp_path)
    assert_whole(tmp_path)
    assert "rounds/00001/opened.json" in links(tmp_path)[0].found
    assert list(links(tmp_path)[-1].records) == ["finished.json"]


def test_one_link_names_no_more_than_its_most(tmp_path, monkeypatch):
    """The rest goes into the next ones."""
    monkeypatch.setattr("coordinator.linking.MOST_NAMED", 2)
    federations.run(federations.config(), tmp_path)
    assert max(len(link.records | link.found) for link in links(tmp_path)) == 2
    assert_whole(tmp_path)


def test_whoever_meets_anothers_link_is_fenced(tmp_path):
    """Two coordinators, each with a record to link: one link is written, and one of them stops."""
    (first, _), (second, broker) = coordinator(tmp_path), coordinator(tmp_path)
    first.start()
    assert len(links(tmp_path)) == 1
    with pytest.raises(FencedError, match=r"chain/00000001\.json was written by"):
        second.links.link()
    assert broker.depth(topology.site_queue("a")) == 0
    second.start()
    assert len(links(tmp_path)) == 1


def test_nothing_is_said_before_its_link_is_there(tmp_path):
    """A store that fails at the link: no queue holds a word; it comes with the next try."""

    class Away(DirectoryStore):
        away = True

        def create(self, key, data):
            if self.away and "/chain/" in key:
                raise StoreUnavailableError("503; try again")
            return super().create(key, data)

    store = Away(tmp_path / "store")
    run, broker = coordinator(tmp_path, store)
    with pytest.raises(StoreUnavailableError):
        run.start()
    queue = topology.site_queue("a")
    assert broker.depth(queue) == 0
    store.away = False
    run.start()
    assert broker.depth(queue) > 0
    assert len(links(tmp_path)) == 1


def test_a_link_that_was_written_although_it_seemed_not_is_met_again(tmp_path):
    """A lost answer is no other coordinator; nothing is linked twice."""

    class Loses(DirectoryStore):
        lost = 0

        def create(self, key, data):
            info = super().create(key, data)
            if "/chain/" in key and not self.lost:
                self.lost += 1
                raise StoreUnavailableError("no answer; try again")
            return info

    store = Loses(tmp_path / "store")
    run, _ = coordinator(tmp_path, store)
    with pytest.raises(StoreUnavailableError):
        run.start()
    run.ledger.write(OpenedRecord(
        round=1, selected=(), source_sha="0" * 64, seed=1, progress_from=0.0, progress_to=1.0,
    ))  # fmt: skip
    run.links.link()
    assert store.lost == 1
    assert [sorted(link.records) for link in links(tmp_path)] == [
        ["federation.json"],
        ["rounds/00001/opened.json"],
    ]


@pytest.mark.parametrize("how", ["gone", "altered", "link gone", "link altered", "swapped"])
def test_nothing_is_decided_on_a_ledger_that_was_meddled_with(tmp_path, how):
    """A coordinator that starts on it names the object and stops."""
    config = federations.config()
    federations.run(config, tmp_path)
    store, key = store_of(tmp_path), topology.accepted_key("test", 2, "b")
    forget(store, topology.finished_key("test"))
    data, two, three = store.get(key), topology.link_key("test", 2), topology.link_key("test", 3)
    if how == "gone":
        store.delete(key)
    elif how == "altered":
        store.put(key, data.replace(b'"examples":', b'"examples":1'))
    elif how == "link gone":
        key = three
        store.delete(two)
    elif how == "link altered":
        key = three
        store.put(two, store.get(two).replace(b'"writer":"', b'"writer":"x'))
    else:
        key = two
        one, other = store.get(two), store.get(three)
        store.put(two, other)
        store.put(three, one)
    with pytest.raises(LedgerDamagedError, match=key):
        federations.run(config, tmp_path)


def test_a_run_keeps_its_key_or_that_it_has_none(tmp_path):
    """Neither another key nor none goes on with it, nor a key with a run that began unsigned."""
    run, _ = coordinator(tmp_path / "signed", key=KEY)
    run.start()
    run.ledger.write(FinishedRecord(round=0, sha=None, reason="it ends", failed=True))
    run.links.link()
    assert verify(tmp_path / "signed").chain.by == KEY.public.text
    for key in (None, OTHER):
        with pytest.raises(RunExistsError, match=r"Name that key in trust\.key_file"):
            coordinator(tmp_path / "signed", key=key)
    coordinator(tmp_path / "signed", key=KEY)[0].start()
    coordinator(tmp_path / "unsigned")[0].start()
    with pytest.raises(RunExistsError, match=r"Take \[trust\] out"):
        coordinator(tmp_path / "unsigned", key=KEY)


def test_a_signed_run_is_not_gone_on_with_unsigned_links(tmp_path):
    """A coordinator does not lend its signature to a chain that somebody made anew."""
    coordinator(tmp_path, key=KEY)[0].start()
    store, key = store_of(tmp_path), topology.link_key("test", 1)
    link = json.loads(store.get(key))
    del link["signed_by"], link["signature"]
    store.put(key, canonical_json(link))
    with pytest.raises(LedgerDamagedError, match="signed_by: expected"):
        coordinator(tmp_path, key=KEY)[0].start()
    (finding,) = verify(tmp_path).findings
    assert finding.problem == f"signed_by: expected {KEY.public.text}, got none"


def test_a_signature_is_of_the_whole_link(tmp_path):
    """A link with one value changed, whichever, is not what was signed."""
    run, _ = coordinator(tmp_path, key=KEY)
    run.start()
    store, key = store_of(tmp_path), topology.link_key("test", 1)
    whole = json.loads(store.get(key))
    changes = {
        "time": 5.0,
        "writer": "x",
        "signed_by": OTHER.public.text,
        "found": {"a": "0" * 64},
        "later": "a field of a later release",
        "records": {},
    }
    for name, value in changes.items():
        store.put(key, canonical_json(whole | {name: value}))
        with pytest.raises(LedgerDamagedError, match="signature"):
            coordinator(tmp_path, key=KEY)[0].start()
    store.put(key, canonical_json({k: v for k, v in whole.items() if k != "signature"}))
    with pytest.raises(LedgerDamagedError, match="both a key and a signature"):
        coordinator(tmp_path, key=KEY)[0].start()
    store.put(key, canonical_json(whole))
    coordinator(tmp_path, key=KEY)[0].start()
    assert whole["signed_by"] == KEY.public.text
    assert records(tmp_path, FinishedRecord) == []


def test_a_run_that_goes_on_while_it_is_verified_has_no_finding(tmp_path):
    """What came since the records were read is named by newer links; none of it is missed."""
    config = federations.config()
    sites = federations.learners(config)

    def dies(task):
        if task.round == 2:
            raise Crash

    sites["b"].fault = dies
    with pytest.raises(Crash):
        federations.run(config, tmp_path, sites)
    (tmp_path / "scratch").mkdir()

    def goes_on(number):
        if number == 1:
            federations.run(config, tmp_path)

    ledger = Ledger(store_of(tmp_path), "test", "test", lambda: 0.0)
    found = verify_run(ledger, tmp_path / "scratch", goes_on)
    assert (found.findings, found.rounds) == ([], 1)
    assert found.chain.head == verify(tmp_path).chain.head


def test_a_record_of_a_run_under_way_that_no_link_names_is_said(tmp_path):
    """It may be seconds old; it may be somebody's: verify names it and finds no damage."""
    run, _ = coordinator(tmp_path)
    run.start()
    run.ledger.write(DeclinedRecord(site="a", reason="no"))
    found = verify(tmp_path)
    assert (found.findings, found.chain.unlinked) == ([], ("declined/a.json",))
