"""Whom the broker counts no consumer for, as the coordinator writes it down for people."""

from __future__ import annotations

import pytest

from coordinator.bootstrap import build_coordinator
from coordinator.liveness import read_status
from shared.brokers.embedded import EmbeddedBroker, EmbeddedConnection
from shared.errors import BrokerError, BrokerUnavailableError
from shared.stores.directory import DirectoryStore
from shared.topology import COORDINATOR, coordinator_rights, site_queue, site_rights
from tests import federations


@pytest.fixture
def world(tmp_path):
    """An active coordinator of sites a, b and c, of which only b listens; a clock to set."""
    broker, store = EmbeddedBroker(), DirectoryStore(tmp_path / "store")
    connection = broker.connect(COORDINATOR, coordinator_rights())
    now = [100.0]
    role = build_coordinator(
        federations.config(), store, connection, tmp_path / "spool", lambda: now[0]
    )
    role.coordinator.start()
    broker.connect("b", site_rights("b")).consume(site_queue("b"))
    return broker, store, role, now


def absent(store):
    """What people are told."""
    return read_status(store, "test").absent


def test_an_awaited_site_without_a_consumer_is_absent_since_it_was_first_seen(world):
    """One that listens is not; one that comes back is no more."""
    broker, store, role, now = world
    role.look()
    assert absent(store) == {"a": 100.0, "c": 100.0}
    now[0] = 105.0
    broker.connect("a", site_rights("a")).consume(site_queue("a"))
    role.look()
    assert absent(store) == {"c": 100.0}


@pytest.mark.parametrize("answer", ["nothing", "refusal"])
def test_nobody_is_absent_by_an_answer_that_cannot_be_right(world, monkeypatch, answer):
    """RabbitMQ says 0 for a queue whose leader is silent; the coordinator reads its own queue."""

    def consumers(_self, queues):
        if answer == "refusal":
            raise BrokerError("no queue")
        return dict.fromkeys(queues, 0)

    _, store, role, _ = world
    monkeypatch.setattr(EmbeddedConnection, "consumers", consumers)
    role.look()
    assert absent(store) == {}


def test_a_line_that_is_gone_is_no_look(world):
    """The coordinator connects anew, as after any other question."""
    broker, _, role, _ = world
    broker.cut(COORDINATOR)
    with pytest.raises(BrokerUnavailableError):
        role.look()


def test_of_many_awaited_sites_some_are_asked_about_with_each_tick(world, monkeypatch):
    """In turn, so that all are; what is known of the others stays."""
    monkeypatch.setattr("coordinator.bootstrap.LOOKED_AT", 1)
    broker, store, role, _ = world
    seen = []
    for _ in range(4):
        role.look()
        seen.append(set(absent(store)))
    assert {"a", "c"} in seen
    assert seen[0] < {"a", "c"}
    assert seen[-1] == {"a", "c"}
    broker.connect("a", site_rights("a")).consume(site_queue("a"))
    for _ in range(4):
        role.look()
    assert set(absent(store)) == {"c"}
