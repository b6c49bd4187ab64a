"""Messages handled together leave what they leave one by one: records, answers, refusals."""

from __future__ import annotations

import hashlib
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.batching import BATCH, THREADS
from coordinator.bootstrap import build_coordinator
from shared import topology
from shared.brokers.embedded import EmbeddedBroker
from shared.brokers.port import Message
from shared.errors import StoreUnavailableError
from shared.protocol import wire
from shared.protocol.events import (
    CoordinatorTick,
    DeltaSubmitted,
    MessageRefused,
    ParticipantReady,
    SiteOnline,
    TrainingFailed,
    UploadRequested,
)
from shared.protocol.manifest import LocalMetrics
from shared.protocol.records import AcceptedRecord, ClosingRecord, LinkRecord
from shared.stores.directory import DirectoryStore
from shared.tensors.codecs import get_codec
from shared.tensors.delta_file import DeltaHeader, write_delta
from tests import federations
from tests.numpy_learner import MANIFEST, NUMERICS
from tests.steering import records

SITES = ("a", "b", "c", "d")
ROUNDS = 3
POLICIES = {
    "all": {"kind": "all"},
    "exclude": {"kind": "all", "on_failure": "exclude", "max_attempts": 2},
    "quorum": {"kind": "quorum", "quorum": 2, "deadline_seconds": 10.0},
    "carry": {"kind": "quorum", "quorum": 2, "deadline_seconds": 10.0, "late": "carry"},
    "buffered": {"kind": "buffered", "buffer": 2},
}


class Stand:
    """A coordinator on an embedded broker; what sites send is put there as bytes."""

    def __init__(self, folder, policy):
        self.config = federations.config(SITES, ROUNDS, policy=policy)
        self.folder = folder
        self.store = DirectoryStore(folder / "store", lambda: 1.0)
        self.server = EmbeddedBroker()
        self.broker = self.server.connect("coordinator", topology.coordinator_rights())
        self.sites = {site: self.server.connect(site, topology.site_rights(site)) for site in SITES}
        self.sites["coordinator"] = self.broker
        self.role = build_coordinator(
            self.config, self.store, self.broker, folder / "spool", lambda: 1.0
        )
        self.role.coordinator.ledger.writer = "coordinator-1"  # it is in the records' bytes
        self.role.coordinator.start()

    @property
    def state(self):
        return self.role.coordinator.state

    def publish(self, sender, key, body):
        self.sites[sender].publish([Message(topology.EVENTS_EXCHANGE, key, body)])

    def handle(self, count):
        """Handle the next ``count`` deliveries as one batch."""
        assert replace(self.role.dispatcher, most=lambda: count).handle_next(0.0) == count

    def records(self):
        """All records since it began, byte for byte, and which objects lie there beside them."""
        first, links = topology.federation_key("test"), topology.links_prefix("test")
        keys = [info.key for info in self.store.list("runs/") if info.key != first]
        mine = [key for key in keys if not key.startswith(links)]
        return {key: self.store.get(key) if key.endswith(".json") else b"" for key in mine}

    def unlinked(self):
        """Records that no link names, and what links name that is not there."""
        ledger = self.role.coordinator.ledger
        keys = [info.key for info in self.store.list(topology.links_prefix("test"))]
        named = {name for key in keys for name in ledger.read(LinkRecord, key).records}
        there = {place.key.removeprefix("runs/test/") for place in ledger.places()}
        return named ^ (there | {"federation.json"})

    def told(self, site):
        """What a site was told, in order."""
        consumer = self.broker.consume(topology.site_queue(site))
        told = []
        while (delivery := consumer.receive()) is not None:
            event = wire.decode(delivery.body).event
            told.append((type(event).__name__, event.model_dump(exclude={"urls", "get_url"})))
            delivery.acknowledge()
        return told

    def refused(self):
        """What lies in the refused queue, in order."""
        consumer = self.broker.consume(topology.REFUSED_QUEUE)
        found = []
        while (delivery := consumer.receive()) is not None:
            event = wire.decode(delivery.body).event
            found.append((event.sender, event.reason, event.data))
            delivery.acknowledge()
        return found


def delta(folder, stand, site, number, source_sha, seed):
    """The bytes of a delta of this site, always the same for the same seed."""
    codec = get_codec(stand.config.codec.name)
    header = DeltaHeader(
        run="test", round=number, site=site, source_sha=source_sha,
        codec=codec.name, codec_version=codec.version,
    )  # fmt: skip
    draw, path = np.random.default_rng(seed), folder / "delta"
    write_delta(
        path, MANIFEST, codec.name, header,
        lambda spec: draw.standard_normal(spec.shape, np.float32), seed,
    )  # fmt: skip
    return path.read_bytes()


class Script:
    """Messages made up as the run goes, kept to be played again: steps of (puts, message)."""

    def __init__(self, folder, stand, rng):
        self.folder, self.stand, self.rng = folder, stand, rng
        self.steps = []
        self.now = 1.0
        self.put = set()

    def ready(self, site):
        event = ParticipantReady(
            run="test", config_digest=self.stand.config.digest, manifest=MANIFEST,
            fingerprint="f" * 64, numerics=NUMERICS, examples=1,
        )  # fmt: skip
        self.say(site, event)

    def submit(self, site, kind):
        """A delta for the newest round, or for the one before; uploaded, spoilt or missing."""
        state = self.stand.state
        opening = state.openings.get(state.last_round + (kind != "earlier"))
        if opening is None:
            return
        seed = 9 if kind == "missing" else self.rng.randrange(2)
        data = delta(self.folder, self.stand, site, opening.round, opening.source_sha, seed)
        if kind == "spoilt":
            data = data[:-4] + b"\xff\xff\xff\xff"
        sha, puts = hashlib.sha256(data).hexdigest(), []
        key = topology.delta_key("test", opening.round, site, sha)
        if kind == "request":
            event = UploadRequested(
                run="test", round=opening.round, sha=sha, size=len(data), creates=True
            )
            self.say(site, event)
            return
        if kind != "missing" and key not in self.put:
            self.put.add(key)
            puts.append((key, data))
        event = DeltaSubmitted(
            run="test", round=opening.round, source_sha=opening.source_sha, sha=sha,
            size=len(data), examples=self.rng.randrange(1, 9), tokens=1,
            metrics=LocalMetrics(steps=1),
        )  # fmt: skip
        self.say(site, event, puts)

    def fail(self, site):
        opened = self.stand.state.open_round
        if opened is not None:
            event = TrainingFailed(
                run="test", round=opened.round, attempt=self.rng.randrange(1, 3),
                reason="no", retryable=True,
            )  # fmt: skip
            self.say(site, event)

    def tick(self):
        self.now += self.rng.choice((1.0, 11.0))
        writer = self.stand.role.coordinator.ledger.writer
        self.say("coordinator", CoordinatorTick(run="test", writer=writer, now=self.now))

    def garbage(self, site):
        self.send(site, topology.event_key("test", site, "ready"), b"no event", [])

    def again(self):
        if self.steps:
            self.send(*self.rng.choice(self.steps)[1], [])

    def say(self, site, event, puts=()):
        run = topology.ANY_RUN if isinstance(event, SiteOnline) else "test"
        key = topology.event_key(run, site, event.word)
        self.send(site, key, wire.encode(event, 1.0), list(puts))

    def send(self, sender, key, body, puts):
        self.steps.append((puts, (sender, key, body)))
        for name, data in puts:
            self.stand.store.put(name, data)
        self.stand.publish(sender, key, body)
        self.stand.handle(1)

    def step(self):
        site = self.rng.choice(SITES)
        match self.rng.randrange(14):
            case 0 | 1 | 2 | 3 | 4:
                self.submit(site, "whole")
            case 5:
                self.submit(site, self.rng.choice(("spoilt", "missing", "earlier")))
            case 6 | 7:
                self.submit(site, "request")
            case 8:
                self.fail(site)
            case 9:
                self.tick()
            case 10:
                self.garbage(site)
            case 11:
                self.say(site, SiteOnline())
            case 12:
                self.ready(site)
            case 13:
                self.again()


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=20),
)
def test_a_batch_leaves_what_its_messages_leave_one_by_one(policy, seed, sizes):
    """Duplicates, two deltas of one site, ticks, deadlines, refusals and garbage in any batches."""
    with tempfile.TemporaryDirectory() as name:
        single, folder = Stand(Path(name) / "single", POLICIES[policy]), Path(name)
        script = Script(folder, single, random.Random(seed))
        for site in SITES:
            script.ready(site)
        for _ in range(60):
            script.step()
        many = Stand(folder / "many", POLICIES[policy])
        left, turn = list(script.steps), 0
        while left:
            size = min(sizes[turn % len(sizes)], len(left))
            batch, left, turn = left[:size], left[size:], turn + 1
            for puts, message in batch:
                for key, data in puts:
                    many.store.put(key, data)
                many.publish(*message)
            many.handle(size)
        assert many.records() == single.records()
        for site in SITES:
            assert many.told(site) == single.told(site)
        assert many.refused() == single.refused()
        assert many.state == single.state
        # Whatever was said, was linked.
        assert single.unlinked() == many.unlinked() == set()


def begun(tmp_path, policy="all"):
    """A stand whose first round is open, and the messages that submit everybody's delta."""
    stand = Stand(tmp_path / "stand", POLICIES[policy])
    script = Script(tmp_path, stand, random.Random(0))
    for site in SITES:
        script.ready(site)
    opened = stand.state.open_round
    for site in SITES:
        data = delta(tmp_path, stand, site, 1, opened.source_sha, 1)
        sha = hashlib.sha256(data).hexdigest()
        stand.store.put(topology.delta_key("test", 1, site, sha), data)
        event = DeltaSubmitted(
            run="test", round=1, source_sha=opened.source_sha, sha=sha, size=len(data),
            examples=1, tokens=1, metrics=LocalMetrics(steps=1),
        )  # fmt: skip
        stand.publish(site, topology.event_key("test", site, event.word), wire.encode(event, 1.0))
    return stand


def test_what_is_said_of_a_batch_is_one_publish_and_one_acknowledgement(tmp_path, monkeypatch):
    """All answers of it, and of the round that it closed, but those that a long step would hold."""
    stand, published, settled = begun(tmp_path), [], []
    publish = stand.broker.publish
    monkeypatch.setattr(
        stand.broker,
        "publish",
        lambda messages: (published.append(len(messages)), publish(messages)),
    )
    consumer = stand.role.dispatcher.consumer
    acknowledge = consumer.acknowledge
    monkeypatch.setattr(
        consumer, "acknowledge", lambda some: (settled.append(len(some)), acknowledge(some))
    )
    stand.handle(len(SITES))
    assert stand.state.last_round == 1
    # The answers before the aggregation; after it that the round is closed and the next one open.
    assert published == [len(SITES), 2 * len(SITES)]
    assert settled == [len(SITES)]


def test_a_store_that_fails_in_the_middle_loses_nothing(tmp_path, monkeypatch):
    """What was recorded is folded, all is delivered again, and every delta counts once."""
    stand, failed = begun(tmp_path), []
    create = stand.store.create

    def failing(key, data):
        if "accepted/b" in key and not failed:
            failed.append(key)
            raise StoreUnavailableError("away")
        return create(key, data)

    monkeypatch.setattr(stand.store, "create", failing)
    with pytest.raises(StoreUnavailableError):
        stand.handle(len(SITES))
    assert failed
    assert {site for site, _ in stand.state.uncounted} == {"a", "c", "d"}
    stand.role.dispatcher.drain()
    closing = next(iter(records(stand.folder, ClosingRecord)))
    assert [item.site for item in closing.inputs] == list(SITES)
    assert len(records(stand.folder, AcceptedRecord)) == len(SITES)


def test_patience_is_for_the_whole_batch(tmp_path, monkeypatch):
    """A store that comes back in time: the batch is handled, nothing is delivered again."""
    stand, failed = begun(tmp_path), []
    spool = stand.store.spool

    def failing(keys, path):
        if "/b-" in keys[0] and len(failed) < 2:
            failed.append(keys)
            raise StoreUnavailableError("away")
        return spool(keys, path)

    monkeypatch.setattr(stand.store, "spool", failing)
    patient = replace(
        stand.role.dispatcher, most=lambda: 9, patience_seconds=60.0, pause=lambda _seconds: None
    )
    assert patient.handle_next(0.0) == len(SITES)
    assert len(failed) == 2
    assert stand.state.last_round == 1
    assert stand.broker.depth(topology.coordinator_queue("test")) == 0


def test_an_unforeseen_error_of_one_record_refuses_its_message_alone(tmp_path, monkeypatch):
    """Nobody can say of a batch whose fault it was; one by one that is known."""
    stand, failed = begun(tmp_path), []
    create = stand.store.create

    def failing(key, data):
        if "accepted/b" in key:
            failed.append(key)
            raise ValueError("a bug")
        return create(key, data)

    monkeypatch.setattr(stand.store, "create", failing)
    stand.handle(len(SITES))
    assert failed
    assert [(sender, reason) for sender, reason, _ in stand.refused()] == [
        ("b", "ValueError: a bug")
    ]
    assert {site for site, _ in stand.state.uncounted} == {"a", "c", "d"}


def test_a_word_in_a_batch_is_refused_beside_its_neighbours(tmp_path):
    """Garbage and a site's own refusal go to the refused queue; the round closes all the same."""
    stand = begun(tmp_path)
    stand.publish("a", topology.event_key("test", "a", "ready"), b"\x00")
    refusal = MessageRefused(queue="q", sender="coordinator", reason="unreadable", data=b"y")
    stand.publish("b", topology.event_key("test", "b", refusal.word), wire.encode(refusal, 1.0))
    stand.handle(len(SITES) + 2)
    assert stand.state.last_round == 1
    assert [data for _, _, data in stand.refused()] == [b"y", b"\x00"]


def test_a_batch_of_large_deltas_is_a_small_one(tmp_path, monkeypatch):
    """Sites are answered, and time is told, while so many bytes are read; all threads have work."""
    stand = begun(tmp_path)
    coordinator = stand.role.coordinator
    assert coordinator.most() == BATCH
    monkeypatch.setattr("coordinator.deltas.BATCH_BYTES", 6 * coordinator._deltas._size_limit())
    assert coordinator.most() == 6
    monkeypatch.setattr("coordinator.deltas.BATCH_BYTES", 1)
    assert coordinator.most() == THREADS


def test_a_bug_in_what_is_done_ahead_refuses_its_message_alone(tmp_path, monkeypatch):
    """As one in a handler would; the neighbours' deltas count."""
    stand = begun(tmp_path)
    deltas = stand.role.coordinator._deltas
    waits_for = deltas._waits_for

    def broken(upload):
        if upload.site == "b":
            raise ValueError("a bug")
        return waits_for(upload)

    monkeypatch.setattr(deltas, "_waits_for", broken)
    stand.handle(len(SITES))
    assert [(sender, reason) for sender, reason, _ in stand.refused()] == [
        ("b", "ValueError: a bug")
    ]
    assert {site for site, _ in stand.state.uncounted} == {"a", "c", "d"}
