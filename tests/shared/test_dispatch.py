"""What becomes of a delivery is decided by the type of the error, and by nothing else."""

from __future__ import annotations

import pytest

from shared import topology
from shared.brokers.embedded import EmbeddedBroker
from shared.brokers.port import Message
from shared.errors import (
    AccessRefusedError,
    BrokerUnavailableError,
    DeltaRefusedError,
    FencedError,
    ProtocolError,
    StoreUnavailableError,
)
from shared.protocol import wire
from shared.protocol.dispatch import MAX_ATTEMPTS, Dispatcher
from shared.protocol.events import RoundClosed, SiteOnline

QUEUE = topology.coordinator_queue("test")


class Stage:
    """One coordinator queue, one site that speaks, and what the dispatcher did."""

    def __init__(self, handler, patience=0.0, sender_of=lambda d, e: d.sender):
        server = self.server = EmbeddedBroker()
        self.coordinator = server.connect("coordinator", topology.coordinator_rights())
        self.coordinator.declare(topology.run_topology("test", ("a",)))
        self.site = server.connect("a", topology.site_rights("a"))
        self.refusals = []
        self.pauses = []
        self.dispatcher = Dispatcher(
            consumer=self.coordinator.consume(QUEUE),
            handlers={SiteOnline: handler},
            sender_of=sender_of,
            refuse=lambda delivery, reason: self.refusals.append((delivery.body, reason)),
            patience_seconds=patience,
            pause=self.pauses.append,
        )

    def send(self, event=None, body=None):
        body = body if body is not None else wire.encode(event or SiteOnline(), 1.0)
        key = topology.event_key("test", "a", "online")
        self.site.publish([Message(topology.EVENTS_EXCHANGE, key, body)])
        return body


def failing(error):
    def handler(event, sender):
        raise error

    return handler


def test_a_handled_message_is_acknowledged():
    """No error: the delivery is gone and nothing was refused."""
    seen = []
    stage = Stage(lambda event, sender: seen.append(sender))
    stage.send()
    assert stage.dispatcher.drain() == 1
    assert (seen, stage.refusals, stage.coordinator.depth(QUEUE)) == (["a"], [], 0)


@pytest.mark.parametrize(
    "error", [ProtocolError("wrong"), DeltaRefusedError("wrong"), ValueError("a bug")]
)
def test_an_error_about_the_message_refuses_it_with_its_bytes(error):
    """Refused, acknowledged, and the loop goes on, even for an error nobody foresaw."""
    stage = Stage(failing(error))
    body = stage.send()
    stage.send()
    assert stage.dispatcher.drain() == 2
    assert stage.refusals[0][0] == body
    assert str(error) in stage.refusals[0][1]


@pytest.mark.parametrize("body", [b"", b"\x00\xff", b"{}"])
def test_bytes_that_are_no_event_are_refused(body):
    """Garbage never reaches a handler."""
    stage = Stage(failing(AssertionError("must not be called")))
    stage.send(body=body)
    assert stage.dispatcher.drain() == 1
    assert stage.refusals[0][0] == body


def test_an_event_for_somebody_else_is_refused():
    """A queue has its events; others are named in the reason."""
    stage = Stage(failing(AssertionError("must not be called")))
    stage.send(RoundClosed(run="test", round=1, result_sha="0" * 64))
    stage.dispatcher.drain()
    assert "RoundClosed" in stage.refusals[0][1]


def test_a_retryable_error_is_waited_out_with_growing_pauses(monkeypatch):
    """The store was away for a moment: the same delivery succeeds, nothing is requeued."""
    monkeypatch.setattr("random.uniform", lambda *_: 1.0)
    errors = [StoreUnavailableError("full"), StoreUnavailableError("full")]

    def handler(event, sender):
        if errors:
            raise errors.pop()

    stage = Stage(handler, patience=10.0)
    stage.send()
    assert stage.dispatcher.drain() == 1
    assert stage.pauses == [0.5, 1.0]


def test_a_retryable_error_beyond_patience_requeues_and_goes_on_up():
    """Whoever runs the loop learns of it, and the message is still there."""
    stage = Stage(failing(StoreUnavailableError("full")))
    stage.send()
    with pytest.raises(StoreUnavailableError):
        stage.dispatcher.drain()
    assert stage.coordinator.depth(QUEUE) == 1
    assert stage.refusals == []


@pytest.mark.parametrize("error", [FencedError("other writer"), KeyboardInterrupt()])
def test_an_error_that_is_not_the_messages_fault_keeps_the_message(error):
    """A fenced writer or a person's interrupt loses nothing."""
    stage = Stage(failing(error))
    stage.send()
    with pytest.raises(type(error)):
        stage.dispatcher.drain()
    assert stage.coordinator.depth(QUEUE) == 1


def test_a_lost_connection_is_named_and_not_the_delivery_it_took_along():
    """The broker has the message back; what goes up is why."""
    stage = Stage(lambda event, sender: None)

    def cut(event, sender):
        assert stage.server.cut("coordinator") == 1
        raise BrokerUnavailableError("the connection is gone")

    stage.dispatcher.handlers[SiteOnline] = cut
    stage.send()
    with pytest.raises(BrokerUnavailableError, match="the connection is gone"):
        stage.dispatcher.drain()


def test_a_message_that_came_back_too_often_is_refused():
    """A poisonous message does not go round for ever."""
    stage = Stage(failing(StoreUnavailableError("full")))
    stage.send()
    for _ in range(MAX_ATTEMPTS):
        with pytest.raises(StoreUnavailableError):
            stage.dispatcher.drain()
    assert stage.dispatcher.drain() == 1
    assert "without success" in stage.refusals[0][1]


def test_a_sender_that_does_not_match_the_key_is_refused():
    """The coordinator takes a routing key's word for nothing."""
    from coordinator.admission import sender_of

    stage = Stage(failing(AssertionError("must not be called")), sender_of=sender_of)
    body = wire.encode(SiteOnline(), 1.0)
    forged = Message(topology.EVENTS_EXCHANGE, topology.event_key("test", "b", "online"), body)
    with pytest.raises(AccessRefusedError):
        stage.site.publish([forged])
    stage.coordinator.publish([forged])  # an account whose rights allow it is caught all the same
    stage.dispatcher.drain()
    assert "expected the account 'b'" in stage.refusals[0][1]
