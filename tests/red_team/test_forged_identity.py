"""Who has a password but not the key: a stolen kit, another site, a stolen broker, a revoked key.

Over a real RabbitMQ, between a coordinator and sites that sign.
"""

from __future__ import annotations

import time

import msgpack
import pytest

from coordinator.announcing import announcement
from coordinator.bootstrap import build_coordinator
from coordinator.runs.deletion import delete_run
from coordinator.site_keys import SiteKeys, enrol, revoke
from participant.bootstrap import build_participant
from participant.heads import read_heads
from participant.site import Site, Trust
from participant.workspace import Workspace
from shared import topology
from shared.brokers.port import Message
from shared.errors import LedgerDamagedError
from shared.protocol import wire
from shared.protocol.events import RoundStarted, RunDeclined, RunFinished, SiteOnline, WireTraining
from shared.protocol.ledger import Ledger
from shared.protocol.messages import Voice, to_coordinator, to_site
from shared.protocol.record import SaidRecord
from shared.protocol.records import DeclinedRecord, MemberRecord
from shared.stores.directory import DirectoryTransfer
from shared.trust.keys import SigningKey
from tests import federations
from tests.contracts.test_rabbitmq import RabbitBus
from tests.numpy_learner import NumpyLearner
from tests.patience import PATIENCE_SECONDS
from tests.steering import records, store_of

SITES = ("a", "b")
TRUST = {"key_file": "coordinator.key"}
DECLINE = RunDeclined(run="test", reason="not I")


class Stand:
    """A coordinator and two sites, each with its key, on one broker; whoever attacks is beside."""

    def __init__(self, server, vhost, folder):
        self.bus = RabbitBus(server, vhost)
        self.folder, self.store = folder, store_of(folder)
        self.config = federations.config(SITES, rounds=2, trust=TRUST)
        self.key = SigningKey.generate()
        self.keys = {site: SigningKey.generate() for site in SITES}
        self.known = SiteKeys(self.store, self.key.public)
        for site, key in self.keys.items():
            enrol(self.known, self.key, site, key.public, "added", "me@here")
        self.office = self.bus.connect(topology.COORDINATOR, topology.coordinator_rights())
        self.role = self.coordinator(self.office)
        self.lines = {site: self.bus.connect(site, topology.site_rights(site)) for site in SITES}

    def coordinator(self, connection):
        """A coordinator of the run, active from its first delivery."""
        return build_coordinator(
            self.config, self.store, connection, self.folder / "spool", time.time, key=self.key
        )

    def site(self, name):
        """A site's real code over its own connection."""
        line = self.lines[name]
        site = Site(
            name=name,
            outbox=line,
            transfer=DirectoryTransfer(self.store),
            workspace=Workspace(self.folder / "sites" / name),
            learner=NumpyLearner(name),
            clock=time.time,
            accept=None,
            trust=Trust(self.keys[name], self.key.public),
        )
        return build_participant(site, line)

    def say(self, site, event, key, *, sender=None, routing=None):
        """Publish over a site's connection what ``sender`` signs by ``key``; handle it."""
        voice = key and Voice(key, self.role.coordinator.ledger.birth)
        message = to_coordinator(sender or site, event, time.time(), voice=voice)
        self.put(site, message.body, routing or topology.event_key("test", site, event.word))

    def word(self, site, event):
        """The bytes of what a site says and signs."""
        voice = Voice(self.keys[site], self.role.coordinator.ledger.birth)
        return to_coordinator(site, event, time.time(), voice=voice).body

    def put(self, site, body, routing):
        """Publish bytes over a site's connection; have the coordinator handle them."""
        self.lines[site].publish([Message(topology.EVENTS_EXCHANGE, routing, body)])
        assert self.role.dispatcher.handle_next(PATIENCE_SECONDS) == 1

    @property
    def letters(self):
        """Why each message was refused, oldest first."""
        found = self.office.peek(topology.REFUSED_QUEUE, 100)
        return [wire.decode(body).event for _, _, body in found]

    def run(self, *sites):
        """Everybody at work until the run ends."""
        for site in sites:
            site.participant.start("test")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.role.coordinator.state.finished is None:
            assert time.monotonic() < deadline, "the run stands still"
            self.role.dispatcher.handle_next(0.05)
            for site in sites:
                site.dispatcher.drain()
                while site.participant.has_work:
                    site.participant.work()
        return self.role.coordinator.state


@pytest.fixture
def stand(rabbit_server, vhost, tmp_path):
    """Coordinator and sites, before anything was said."""
    made = Stand(rabbit_server, vhost, tmp_path)
    yield made
    made.bus.close()


def test_a_stolen_password_says_nothing_without_the_key(stand):
    """Downgrade: an unsigned word is refused by name, and nothing is on record of the site."""
    stand.say("a", DECLINE, None)
    (letter,) = stand.letters
    assert letter.reason.startswith("signature: expected one on a RunDeclined from a, got none")
    assert records(stand.folder, DeclinedRecord) == []


@pytest.mark.parametrize("whose", ["b", "nobody"])
def test_a_stolen_password_says_nothing_with_another_key(stand, whose):
    """Another site's enrolled key is as little the site's as one that was just made."""
    key = stand.keys["b"] if whose == "b" else SigningKey.generate()
    stand.say("a", DECLINE, key)
    (letter,) = stand.letters
    assert letter.reason.startswith("signature: expected one by the key enrolled for a, got one by")
    assert records(stand.folder, DeclinedRecord) == []
    stand.say("a", DECLINE, stand.keys["a"])
    assert [record.site for record in records(stand.folder, DeclinedRecord)] == ["a"]


def test_what_another_site_signed_cannot_be_said_again(stand):
    """Site b has the bytes that a signed; under its own name they prove nothing."""
    body = stand.word("a", DECLINE)
    stand.put("b", body, "test.b.declined")
    (letter,) = stand.letters
    assert letter.reason.startswith("signature: expected one by the key enrolled for b")
    assert records(stand.folder, DeclinedRecord) == []


def test_what_was_signed_for_another_run_is_refused_in_this_one(stand):
    """Replay: the run is in what is signed, and so is for whom it was said."""
    other = RunDeclined(run="other", reason="too many steps")
    stand.say("a", other, stand.keys["a"])
    body = stand.word("a", SiteOnline(run="test"))
    flipped = bytearray(body)
    flipped[body.index(b"run:any")] ^= 1
    stand.put("a", bytes(flipped), "any.a.online")
    replayed, altered = stand.letters
    assert replayed.reason == "run: expected test, got other from a"
    assert altered.reason.startswith("to: expected run:any, got ")
    assert records(stand.folder, DeclinedRecord) == []


def test_a_bit_of_it_altered_on_the_way_is_refused(stand):
    """A broker that changes what a site signed changes nothing but that it is refused."""
    body = bytearray(stand.word("a", DECLINE))
    body[body.index(b"not I")] ^= 1
    stand.put("a", bytes(body), "test.a.declined")
    (letter,) = stand.letters
    assert letter.reason.startswith("signature: expected one of ")
    assert records(stand.folder, DeclinedRecord) == []


def test_a_revoked_key_is_dead_at_a_coordinator_that_runs_and_at_the_next(stand):
    """Zombie: nothing is started again, and no letter before the one that says so."""
    stand.say("a", SiteOnline(), stand.keys["a"], routing="any.a.online")
    assert stand.letters == []
    assert revoke(stand.known, stand.key, "a", "laptop lost", "me@here") is not None
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not stand.letters:
        assert time.monotonic() < deadline, "the coordinator never heard of it"
        stand.say("a", SiteOnline(), stand.keys["a"], routing="any.a.online")
    stand.say("a", DECLINE, stand.keys["a"])
    assert {letter.reason.partition(" of a ")[2] for letter in stand.letters} == {
        "was revoked (laptop lost); it counts for nothing since"
    }
    assert records(stand.folder, DeclinedRecord) == []
    new = SigningKey.generate()
    enrol(stand.known, stand.key, "a", new.public, "new laptop", "me@here")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not records(stand.folder, DeclinedRecord):
        assert time.monotonic() < deadline, "the coordinator never heard of the new key"
        stand.say("a", DECLINE, new)


def forged():
    """What somebody who has the broker would tell a site."""
    training = WireTraining(local_steps=1000, cpu_threads=1)
    started = RoundStarted(
        run="test",
        round=1,
        source_sha="0" * 64,
        get_url="https://evil.example/k",
        expires_at=time.time() + 1000,
        training=training,
        progress_from=0.0,
        progress_to=0.5,
        seed=1,
        codec="fp32",
    )
    finished = RunFinished(run="test", round=2, sha=None, reason="go home")
    return [started, finished]


def test_a_stolen_broker_tells_a_site_nothing(stand, tmp_path):
    """Forged rounds and ends are refused, the site goes on, and the run ends as it would have.

    The thief has the very account that sites hear: what he lacks is the key.
    """
    thief, now = stand.office, time.time()
    birth = stand.role.coordinator.ledger.birth
    for event in forged():
        thief.publish([to_site("a", event, now)])
        thief.publish([to_site("a", event, now, Voice(SigningKey.generate(), birth))])
        thief.publish([to_site("a", event, now, Voice(stand.keys["b"], birth))])
        # this one is real, and for b
        thief.publish([to_site("b", event, now, Voice(stand.key, birth))])
    replayed = [body for _, _, body in thief.peek(topology.site_queue("b"), 10)]
    assert len(replayed) == 2
    thief.purge(topology.site_queue("b"))
    for body in replayed:
        thief.publish([Message(topology.SITES_EXCHANGE, "a", body)])
    site = stand.site("a")
    assert sum(site.dispatcher.handle_next(PATIENCE_SECONDS) for _ in range(8)) == 8
    assert site.participant.finished is None
    assert not site.participant.has_work
    left = 8
    while left:
        handled = stand.role.dispatcher.handle_next(PATIENCE_SECONDS)
        assert handled, "a refusal never came"
        left -= handled
    told = [letter.reason for letter in stand.letters]
    assert [letter.reported_by for letter in stand.letters] == ["a"] * 8
    assert sum("got none" in reason for reason in told) == 2
    assert sum("the key in trust.coordinator, got one by" in reason for reason in told) == 4
    assert sum("to: expected site:a:, got site:b:" in reason for reason in told) == 2
    ended = stand.run(site, stand.site("b"))
    alone = federations.run(federations.config(SITES, rounds=2), tmp_path / "alone")
    assert ended.adapter_sha == alone.adapter_sha
    assert len(records(stand.folder, MemberRecord)) == 2


# The name of a deleted run ----------------------------------------------------------------------


def sealed(said):
    """A word that somebody kept, as it travelled."""
    seal = said.seal()
    outer = {"sealed": seal.data, "to": seal.to, "by": seal.by, "signature": seal.signature}
    return msgpack.packb(outer if seal.head is None else {**outer, "head": seal.head})


def test_what_was_signed_in_a_deleted_run_says_nothing_in_the_next_of_its_name(stand, tmp_path):
    """Same name, settings and keys: words of sites and coordinator, records and links are over.

    Whoever replays them kept every byte of the old run, and has the broker and the store.
    """
    first = stand.run(*(site := {name: stand.site(name) for name in SITES}).values())
    store, prefix = stand.store, topology.run_prefix("test")
    old = {info.key: store.get(info.key) for info in store.list(prefix)}
    ledger = Ledger(store, "test", "me", time.time)
    words = [ledger.read(place.kind, place.key) for place in ledger.places()]
    words = [record.said for record in words if isinstance(record, SaidRecord)]
    told = [
        line.said for line in read_heads(Workspace(stand.folder / "sites/a").heads_path("test"))
    ]
    birth, announced = ledger.birth, announcement(stand.config, "a")
    for name in SITES:
        while site[name].participant.finished is None or site[name].participant.has_work:
            site[name].dispatcher.handle_next(0.05)
            site[name].participant.work()
        stand.role.dispatcher.drain()
        stand.office.purge(topology.site_queue(name))
    stand.role.leave()
    delete_run(ledger, "me@here")
    stand.role = stand.coordinator(stand.office)
    assert stand.role.coordinator.ledger.birth != birth

    assert len(words) >= 2 + 4  # members, and deltas of two rounds
    for said in words:
        name = type(wire.decode(sealed(said)).event)
        by = next(s for s, key in stand.keys.items() if key.public.text == said.by)
        stand.put(by, sealed(said), topology.event_key("test", by, name.word))
    reasons = [letter.reason for letter in stand.letters]
    assert len(reasons) == len(words)
    assert all(f"got run:test:{birth}" in reason for reason in reasons)
    assert records(stand.folder, SaidRecord) == []

    stand.office.purge(topology.REFUSED_QUEUE)
    site["a"].participant.start("test")  # it is told of the new run
    assert stand.role.dispatcher.handle_next(PATIENCE_SECONDS)
    assert site["a"].dispatcher.handle_next(PATIENCE_SECONDS)
    again = to_site("a", announced, time.time(), Voice(stand.key, birth)).body
    replayed = [again, *(sealed(said) for said in told)]
    assert len(told) >= 2
    stand.office.publish([Message(topology.SITES_EXCHANGE, "a", body) for body in replayed])
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(stand.letters) < len(replayed):
        assert time.monotonic() < deadline, "a refusal never came"
        site["a"].dispatcher.handle_next(0.05)
        stand.role.dispatcher.handle_next(0.05)
    reasons = [letter.reason for letter in stand.letters]
    assert len(reasons) == len(replayed)
    assert "displaced" in reasons[0]
    assert all(f"got site:a:{birth}" in reason for reason in reasons[1:])

    number = len(list(store.list(topology.links_prefix("test"))))
    for key in (topology.link_key("test", number + 1), topology.declined_key("test", "b")):
        store.create(key, old.get(key, old[topology.member_key("test", "b")]))
        with pytest.raises(LedgerDamagedError, match=key):
            stand.role.coordinator.reload()
        store.delete(key)
    stand.role.coordinator.reload()
    assert stand.run(*site.values()).adapter_sha == first.adapter_sha
