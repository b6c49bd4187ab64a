"""A kit in bad hands tries to fill what others need: records, the queue, the store, the spool."""

from __future__ import annotations

import pytest

from coordinator.bootstrap import build_coordinator
from coordinator.limits import Limits
from shared import topology
from shared.brokers.embedded import EmbeddedBroker
from shared.brokers.port import Message
from shared.config import LimitsSection
from shared.protocol import wire
from shared.protocol.events import (
    DeltaAnswered,
    DeltaSubmitted,
    ParticipantReady,
    TrainingFailed,
    UploadRequested,
)
from shared.protocol.manifest import LocalMetrics
from shared.protocol.records import FailedRecord, RefusedRecord
from shared.stores.directory import DirectoryStore
from tests import federations
from tests.numpy_learner import MANIFEST, NUMERICS
from tests.steering import ask, records, store_of

LIMITS = LimitsSection()


class Stand:
    """A coordinator of sites a and b whose first round is open, and a's kit in bad hands."""

    def __init__(self, folder, timer=None):
        self.config = federations.config(sites=("a", "b"))
        self.server = EmbeddedBroker()
        self.store = DirectoryStore(folder / "store")
        self.folder, self.timer = folder, timer
        self.broker = None
        self.restart()
        for site in "ab":
            self.say(
                ParticipantReady(
                    run="test",
                    config_digest=self.config.digest,
                    manifest=MANIFEST,
                    fingerprint="f" * 64,
                    numerics=NUMERICS,
                    examples=1,
                ),
                site,
            )
        self.role.dispatcher.drain()
        assert self.role.coordinator.state.open_round is not None

    def restart(self):
        """Another coordinator takes over."""
        if self.broker is not None:
            self.broker.close()
        self.broker = self.server.connect("coordinator", topology.coordinator_rights())
        self.role = build_coordinator(
            self.config, self.store, self.broker, self.folder, lambda: 1.0, timer=self.timer
        )
        self.role.coordinator.start()

    def say(self, event, site="a"):
        """Publish as a site."""
        connection = self.server.connect(site, topology.site_rights(site))
        key = topology.event_key("test", site, event.word)
        connection.publish([Message(topology.EVENTS_EXCHANGE, key, wire.encode(event, 1.0))])
        connection.close()

    def answers(self):
        """What a is told, oldest first."""
        consumer = self.broker.consume(topology.site_queue("a"))
        told = []
        while (delivery := consumer.receive()) is not None:
            told.append(wire.decode(delivery.body).event)
            delivery.acknowledge()
        consumer.close()
        return told


def submitted(number):
    """A delta that was never uploaded, under a sha that was made up."""
    return DeltaSubmitted(
        run="test",
        round=1,
        source_sha="0" * 64,
        sha=f"{number:064x}",
        size=9,
        examples=1,
        tokens=1,
        metrics=LocalMetrics(steps=1),
    )


def test_made_up_deltas_leave_few_records_also_after_a_restart(tmp_path):
    """Each is answered, and a restarted coordinator goes on counting where the ledger stands."""
    stand = Stand(tmp_path)
    stand.answers()
    for turn in range(2):
        for number in range(50):
            stand.say(submitted(1000 * turn + number))
        stand.role.dispatcher.drain()
        told = [event for event in stand.answers() if isinstance(event, DeltaAnswered)]
        assert len(told) == 50
        assert {event.verdict for event in told} == {"refused"}
        assert len(records(tmp_path, RefusedRecord)) == LIMITS.records
        assert stand.role.coordinator.limits.over["a"]["records"] in (50 - LIMITS.records, 50)
        stand.restart()


def test_failures_beyond_the_allowed_attempts_leave_no_record(tmp_path):
    """A site that reports one failure after another is given up, and no longer written down."""
    stand = Stand(tmp_path)
    for attempt in range(1, 40):
        stand.say(TrainingFailed(run="test", round=1, attempt=attempt, reason="no", retryable=True))
        stand.role.dispatcher.drain()
    assert len(records(tmp_path, FailedRecord)) == stand.config.policy.max_attempts
    assert stand.role.coordinator.state.troubles["a"].attempts == stand.config.policy.max_attempts


def test_a_site_is_granted_few_deltas_in_a_round(tmp_path):
    """Whoever asks for one sha after another gets no more URLs; those granted go on being so."""
    stand = Stand(tmp_path)
    stand.answers()
    for number in range(30):
        stand.say(UploadRequested(run="test", round=1, sha=f"{number:064x}", size=9))
    stand.say(UploadRequested(run="test", round=1, sha=f"{0:064x}", size=9))
    stand.role.dispatcher.drain()
    told = stand.answers()
    refused = [event for event in told if isinstance(event, DeltaAnswered)]
    assert len(told) - len(refused) == LIMITS.uploads + 1
    assert len(refused) == 30 - LIMITS.uploads
    assert "limits.uploads" in refused[0].reason
    assert stand.role.coordinator.limits.over["a"] == {"uploads": len(refused)}


def chunk(number, site="a", run="test"):
    """Where a site may upload, whatever it announces afterwards."""
    return topology.inbox_key(run, number, site, "c" * 64, 0)


def inbox(folder):
    """What lies there."""
    return [info.key for info in store_of(folder).list(topology.INBOX)]


@pytest.mark.parametrize("restarts", [False, True])
def test_what_a_site_uploaded_goes_when_it_is_taken_out(tmp_path, restarts):
    """At once; also if the coordinator that noticed the word died before it came to that."""
    stand = Stand(tmp_path)
    others = [chunk(1, "b"), chunk(1, "a", run="other")]
    for key in (chunk(1), *others):
        stand.store.put(key, b"never submitted")
    ask(tmp_path, "exclude", site="a")
    if restarts:
        stand.restart()
    else:
        assert stand.role.coordinator.notice_controls()
    assert inbox(tmp_path) == sorted(others)


def test_a_close_sweeps_the_rounds_before_it_too(tmp_path):
    """A URL outlives its round: what came by it lies there until the next close."""
    config = federations.config()
    sites = federations.learners(config)
    late = {2: [chunk(1), chunk(2)], 3: [chunk(2), chunk(4)]}

    def upload(task):
        for key in late.get(task.round, ()):
            store_of(tmp_path).put(key, b"never submitted")

    sites["b"].fault = upload
    federations.run(config, tmp_path, sites)
    assert inbox(tmp_path) == [chunk(4)]


def test_a_close_leaves_what_may_still_count(tmp_path):
    """Where late deltas are carried, an upload may be under way for an earlier round."""
    policy = {"kind": "quorum", "quorum": 3, "deadline_seconds": 9.0}
    config = federations.config(policy={**policy, "late": "carry", "max_staleness": 1})
    sites = federations.learners(config)

    def upload(task):
        for number in range(1, task.round + 1):
            store_of(tmp_path).put(chunk(number), b"under way")

    sites["b"].fault = upload
    federations.run(config, tmp_path, sites)
    assert inbox(tmp_path) == [chunk(3)]


def test_one_sites_flood_takes_nothing_from_another(tmp_path):
    """Beyond its rate a site's messages are taken off unread; the other site's are all handled."""
    stand = Stand(tmp_path, timer=lambda: 7.0)
    for _ in range(LIMITS.burst + 200):
        connection = stand.server.connect("a", topology.site_rights("a"))
        connection.publish([Message(topology.EVENTS_EXCHANGE, "test.a.ready", b"junk")])
        connection.close()
    stand.say(TrainingFailed(run="test", round=1, attempt=1, reason="no", retryable=True), "b")
    stand.role.dispatcher.drain()
    assert stand.role.coordinator.limits.over == {"a": {"messages": 201}}
    assert [record.site for record in records(tmp_path, FailedRecord)] == ["b"]


@pytest.mark.parametrize(("later", "more"), [(0.0, 0), (1.0, 50), (3600.0, 500)])
def test_the_rate_allows_so_many_again_as_time_passes(later, more):
    """A bucket that is empty fills by the second, and never above its brim."""
    limits = Limits(LIMITS)
    assert sum(limits.admits("a", 5.0) for _ in range(1000)) == LIMITS.burst
    assert sum(limits.admits("a", 5.0 + later) for _ in range(1000)) == more
