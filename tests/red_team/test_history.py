"""The store's owner rewrites what happened: drops, edits, adds, cuts off, or tells another story.

He can write every object and knows every rule; he has neither the coordinator's key nor a site's.
"""

from __future__ import annotations

import json
import shutil

import pytest

from coordinator.audit.links import Expected
from coordinator.bootstrap import build_coordinator
from coordinator.site_keys import SiteKeys, revoke
from shared import topology
from shared.brokers.embedded import EmbeddedBroker
from shared.config import canonical_json
from shared.errors import FencedError, LedgerDamagedError, RunExistsError
from shared.protocol.chain import Head
from shared.protocol.ledger import Ledger
from shared.protocol.records import AcceptedRecord, LinkRecord, RefusedRecord
from shared.trust.keys import SigningKey
from tests import federations
from tests.steering import Crash, forget, relink, store_of, verify

KEY, HIS = SigningKey.generate(), SigningKey.generate()
TRUST = {"key_file": "coordinator.key"}
KNOWN = Expected(KEY.public, demanded=True)
ACCEPTED = topology.accepted_key("test", 2, "b")
EVALUATED = topology.evaluated_key("test", 3, "a")  # nothing follows from it


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run whose links are signed."""
    folder = tmp_path_factory.mktemp("whole")
    KEY.save(folder / "coordinator.key")
    federations.run(federations.config(trust=TRUST), folder)
    found = verify(folder, expected=KNOWN)
    assert found.findings == []
    assert found.chain.known
    return folder


@pytest.fixture
def world(whole, tmp_path):
    """A copy of it to meddle with."""
    return shutil.copytree(whole, tmp_path / "copy", symlinks=True)


def role_in(folder, broker=None):
    """One more coordinator of the run, with the right key."""
    broker = broker or EmbeddedBroker().connect("coordinator", topology.coordinator_rights())
    store, spool = store_of(folder), folder / "spool"
    return build_coordinator(
        federations.config(trust=TRUST), store, broker, spool, lambda: 1.0, key=KEY
    )


def head_of(folder):
    """What a site kept."""
    return Head.parse(verify(folder, expected=KNOWN).chain.head, "head")


def found(folder, expected=KNOWN):
    """The objects of all findings, and their words."""
    findings = verify(folder, expected=expected).findings
    return {finding.key for finding in findings}, "; ".join(f.problem for f in findings)


def edit(store, key, **values):
    """Another word in a record, its form kept."""
    record = json.loads(store.get(key))
    store.put(key, canonical_json(record | values))


def test_a_record_that_is_dropped_is_missed(world):
    """Even one of which nothing follows."""
    store_of(world).delete(EVALUATED)
    assert found(world) == ({EVALUATED}, "is missing, but a link names it")


def test_a_record_that_is_edited_is_found(world):
    """Although what it says fits all others."""
    edit(store_of(world), EVALUATED, writer="somebody")
    keys, words = found(world)
    assert keys == {EVALUATED}
    assert "as a link names it" in words


def test_a_record_that_is_added_is_found(world):
    """A refusal that never was, of what the site did sign: nothing is wrong with it in itself."""
    store = store_of(world)
    forged = refusal_of(store)
    store.create(forged.key("test"), canonical_json(forged.model_dump(mode="json")))
    keys, words = found(world)
    assert keys == {forged.key("test")}
    assert "was put there by somebody else" in words


def refusal_of(store):
    """What becomes of a site's genuine word where somebody says that its delta was refused."""
    ledger = Ledger(store, "test", "somebody", lambda: 1.0)
    taken = ledger.read(AcceptedRecord, ACCEPTED)
    values = {name: getattr(taken, name) for name in ("writer", "time", "round", "site", "sha")}
    return RefusedRecord(verdict="late", reason="it was late", said=taken.said, **values)


def test_two_links_that_are_swapped_are_found(world):
    """Each says its number and the one before."""
    store, keys = store_of(world), [topology.link_key("test", n) for n in (2, 3)]
    one, other = map(store.get, keys)
    store.put(keys[0], other)
    store.put(keys[1], one)
    assert set(keys) <= found(world)[0]


def test_a_link_that_is_taken_out_is_missed(world):
    """With the records that it named."""
    store = store_of(world)
    (gone,) = [
        info.key
        for info in store.list(topology.links_prefix("test"))
        if EVALUATED.encode().removeprefix(b"runs/test/") in store.get(info.key)
    ]
    following = f"runs/test/chain/{int(gone[-13:-5]) + 1:08d}.json"
    store.delete(gone)
    keys, words = found(world)
    assert {EVALUATED, following} <= keys
    assert "got none: dropped, or lost" in words


@pytest.mark.parametrize("key", [None, HIS], ids=["unsigned", "his own key"])
def test_an_edited_record_with_all_links_made_anew_is_not_signed(world, key):
    """All is consistent; who knows the key is not fooled, and without it there is a word."""
    store, kept = store_of(world), head_of(world)
    edit(store, EVALUATED, writer="somebody")
    relink(store, key)
    findings = verify(world).findings
    named = any(f.problem.startswith("said: ") for f in findings)
    assert bool(findings) == named == (key is HIS)  # then sites have to have signed too
    told = verify(world).chain
    assert (told.by, told.known) == (key and key.public.text, False)
    keys, words = found(world)
    assert topology.link_key("test", 1) in keys
    assert f"expected the signature of {KEY.public.fingerprint}" in words
    assert "another history" in found(world, Expected(against=kept))[1]


def test_an_old_signature_does_not_fit_a_new_link(world):
    """He leaves the signatures where they were."""
    store = store_of(world)
    edit(store, EVALUATED, writer="somebody")
    before = {i.key: json.loads(store.get(i.key)) for i in store.list("runs/test/chain/")}
    relink(store)
    for key, link in before.items():
        edit(store, key, signed_by=link["signed_by"], signature=link["signature"])
    edit(store, topology.federation_key("test"), signed_by=KEY.public.text)
    keys, words = found(world)
    assert keys
    assert "somebody else signed it" in words


def cut_off(store):
    """The run as it was after its second round: all of it is genuine."""
    gone = [info.key for info in store.list("runs/test/rounds/00003/")]
    gone.append(topology.finished_key("test"))
    names = {key.removeprefix("runs/test/") for key in gone}
    for info in list(store.list(topology.links_prefix("test"))):
        link = json.loads(store.get(info.key))
        if not names.isdisjoint(link["records"]):
            gone += [i.key for i in store.list("runs/test/chain/") if i.key >= info.key]
            gone += [f"runs/test/{name}" for name in link["records"]]
            break
    for key in gone:
        store.delete(key)


def test_a_history_that_is_cut_off_is_found_by_a_sites_head_alone(world):
    """What is left is as it was then: only somebody who saw more can say that there was more."""
    kept = head_of(world)
    cut_off(store_of(world))
    assert found(world) == (set(), "")
    keys, words = found(world, Expected(KEY.public, demanded=True, against=kept))
    assert keys == {topology.link_key("test", kept.number)}
    assert "got no such link" in words
    assert "another history than the one that was confirmed" in words


def test_another_run_in_its_place_is_signed_by_nobody(world):
    """Every record of it fits; so says verify, and that nobody signed it."""
    kept = head_of(world)
    shutil.rmtree(world / "store")
    federations.run(federations.config(run={"seed": 7}), world)
    alone = verify(world)
    assert (alone.findings, alone.chain.by) == ([], None)
    assert "got no signature" in found(world)[1]
    assert "another history" in found(world, Expected(against=kept))[1]
    for info in list(store_of(world).list("runs/test/chain/")):
        store_of(world).delete(info.key)
    assert "got no signature" in found(world)[1]


def test_a_link_of_another_run_is_not_one_of_this(world):
    """Signed by the right key, for a run of another name."""
    store = store_of(world)
    (*_, last) = store.list(topology.links_prefix("test"))
    link = Ledger(store, "test", "test", lambda: 0.0).read(LinkRecord, last.key)
    ledger = Ledger(store, "test", "test", lambda: 0.0, KEY)
    ledger.run = "other"
    ledger.birth = "0" * 64
    store.put(last.key, ledger.bytes_of(link.model_copy(update={"run": "other"})))
    keys, words = found(world)
    assert last.key in keys
    assert "belongs to runs/other/" in words


def test_a_link_by_a_zombie_stops_whoever_meets_it(tmp_path):
    """One that somebody made without the key is never gone on with; nothing is said after it."""
    store = store_of(tmp_path)
    broker = EmbeddedBroker().connect("coordinator", topology.coordinator_rights())
    role = role_in(tmp_path, broker)
    his = LinkRecord(run="test", number=1, previous=None, records={}, writer="a zombie")
    forged = Ledger(store, "test", "a zombie", lambda: 0.0, HIS).bytes_of(his)
    store.create(his.key("test"), forged)
    with pytest.raises(LedgerDamagedError, match="signed_by: expected"):
        role.coordinator.start()
    store.delete(his.key("test"))
    role.coordinator.reload()
    store.create(his.key("test"), forged)
    with pytest.raises(FencedError, match="a zombie"):
        role.coordinator.publish()
    assert broker.depth(topology.site_queue("a")) == 0


def test_a_coordinator_does_not_go_on_with_what_was_cut_out(world):
    """It names the record and stops: a store can end a run, and change nothing in it."""
    store_of(world).delete(ACCEPTED)
    with pytest.raises(LedgerDamagedError, match="accepted/b"):
        role_in(world).coordinator.start()


# While no coordinator runs ----------------------------------------------------------------------


def planted(folder, key, forge):
    """A run whose coordinator died after round 2; somebody adds ``forge(store)`` meanwhile."""
    config = federations.config(trust=TRUST)
    sites = federations.learners(config)
    died = []

    def dies(task):
        if task.round == 3:
            died.append(task.round)
            raise Crash

    sites["b"].fault = dies
    folder.mkdir(exist_ok=True)
    key.save(folder / "coordinator.key")
    with pytest.raises(Crash):
        federations.run(config, folder, sites)
    assert died
    store = store_of(folder)
    place, data = forge(store)
    store.create(place, data)
    return config, place


def of_somebody(store):
    """What the coordinator alone writes, by a site's genuine word, without the key."""
    forged = refusal_of(store)
    return forged.key("test"), canonical_json(forged.model_dump(mode="json"))


def by_his_key(store):
    """The same, signed by a key that he has."""
    forged = refusal_of(store)
    return forged.key("test"), Ledger(store, "test", "x", float, HIS).bytes_of(forged)


def from_another_place(store):
    """What the coordinator did sign, of another round."""
    data = store.get(topology.round_key("test", 2, "opened"))
    return topology.round_key("test", 4, "opened"), data


@pytest.mark.parametrize("forge", [of_somebody, by_his_key, from_another_place])
def test_what_somebody_plants_while_no_coordinator_runs_is_not_taken_in(tmp_path, forge):
    """The next one names the record and stops; once it is away, the run ends as it would have."""
    config, place = planted(tmp_path, KEY, forge)
    words = found(tmp_path, Expected(KEY.public, demanded=True))
    assert place in words[0]
    with pytest.raises(LedgerDamagedError, match=place):
        federations.run(config, tmp_path)
    store_of(tmp_path).delete(place)
    alone = federations.run(federations.config(), tmp_path / "alone")
    assert federations.run(config, tmp_path).adapter_sha == alone.adapter_sha
    assert verify(tmp_path, expected=KNOWN).findings == []


def test_a_first_record_that_somebody_planted_begins_no_run(tmp_path):
    """Neither unsigned, nor with the coordinator's name on it and another's signature."""
    config = federations.config(trust=TRUST)
    KEY.save(tmp_path / "coordinator.key")
    federations.run(config, tmp_path / "his", keys=None)
    first = topology.federation_key("test")
    unsigned = json.loads(store_of(tmp_path / "his").get(first))
    for values in (unsigned, unsigned | {"signed_by": KEY.public.text, "signature": "A" * 86}):
        store_of(tmp_path).put(first, canonical_json(values))
        with pytest.raises((RunExistsError, LedgerDamagedError), match=r"runs/test|Take \[trust\]"):
            federations.run(config, tmp_path)
        assert list(store_of(tmp_path).list("runs/test/chain/")) == []


# The keys of the sites --------------------------------------------------------------------------


def newest_key(store):
    """The object of the last enrolment or revocation."""
    return list(store.list(topology.site_keys_prefix(KEY.public.fingerprint)))[-1].key


@pytest.mark.parametrize("how", ["cut off", "swapped"])
def test_keys_that_are_cut_off_or_swapped_are_found_by_the_links(world, how):
    """Each link names the newest of them: who has the store cannot take a revocation back.

    Neither by cutting it off, nor where the operator's next word took its number.
    """
    store = store_of(world)
    forget(store, topology.finished_key("test"))
    assert revoke(SiteKeys(store, KEY.public), KEY, "a", "laptop lost", "me@here")
    role_in(world).coordinator.start()
    assert found(world) == (set(), "")
    gone = newest_key(store)
    store.delete(gone)
    if how == "swapped":
        assert revoke(SiteKeys(store, KEY.public), KEY, "b", "another one", "me@here")
        assert newest_key(store) == gone
    keys, words = found(world)
    assert gone in keys
    assert "newer enrolments or revocations were taken away" in words
    with pytest.raises(LedgerDamagedError, match=f"{gone}.*taken away"):
        role_in(world).coordinator.start()
