"""The embedded broker under the contract, and what only it has: a told clock, faults, threads."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from shared.brokers.embedded import EmbeddedBroker
from shared.brokers.embedded_state import topic_matches
from shared.brokers.port import Message
from shared.errors import AccessRefusedError, BrokerUnavailableError
from shared.topology import (
    EVENTS_EXCHANGE,
    Exchange,
    Queue,
    Rights,
    Topology,
    site_rights,
)
from tests.contracts.broker_contract import EVERYTHING, BrokerContract, event, one_queue


class TestEmbeddedBroker(BrokerContract):
    """The suite, unchanged."""

    @pytest.fixture
    def bus(self):
        return EmbeddedBroker()


class Clock:
    """A clock that stands until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def bus(clock):
    return EmbeddedBroker(clock)


@pytest.fixture
def broker(bus):
    broker = bus.connect("coordinator", EVERYTHING)
    broker.declare(one_queue(Queue("q"), "k"))
    return broker


def test_a_message_expires_at_its_time_and_not_before(broker, clock):
    """Kept until just before ``expires_seconds`` have passed, gone at that moment."""
    broker.publish([Message(EVENTS_EXCHANGE, "k", b"x", expires_seconds=5.0)])
    clock.now += 4.999
    assert broker.depth("q") == 1
    clock.now += 0.001
    assert broker.depth("q") == 0
    assert broker.consume("q").receive() is None


def test_a_held_delivery_does_not_expire_but_a_returned_one_does(broker, clock):
    """Expiry is about waiting in the queue."""
    broker.publish([Message(EVENTS_EXCHANGE, "k", b"x", expires_seconds=5.0)])
    consumer = broker.consume("q")
    delivery = consumer.receive()
    clock.now += 10
    assert delivery is not None
    delivery.requeue()
    assert consumer.receive() is None


def test_an_expired_message_makes_room_in_a_full_queue(broker, clock):
    """Expired ones go before living ones are dropped."""
    broker.declare(one_queue(Queue("short", max_length=2), "s"))
    broker.publish([event("s", b"keep"), Message(EVENTS_EXCHANGE, "s", b"tick", 1.0)])
    clock.now += 2
    broker.publish([event("s", b"new")])
    consumer = broker.consume("short")
    first = consumer.receive()
    assert first is not None
    assert first.body == b"keep"


def test_a_dropped_message_is_logged(broker):
    """The delivery limit loses a message on purpose, and says so once, without its body."""
    broker.declare(one_queue(Queue("strict", delivery_limit=0), "s"))
    broker.publish([event("s", b"body")])
    delivery = broker.consume("strict").receive()
    assert delivery is not None
    with capture_logs() as logs:
        delivery.requeue()
    assert logs == [
        {
            "event": "message.dropped",
            "log_level": "warning",
            "queue": "strict",
            "routing_key": "s",
            "sender": "coordinator",
            "attempt": 1,
            "reason": "delivery limit",
        }
    ]
    assert broker.depth("strict") == 0


def test_deliveries_of_one_connection_come_back_in_their_old_order(bus, broker):
    """Several consumers, one cut: the oldest message is in front again."""
    broker.publish([event("k", b"%d" % number) for number in range(4)])
    reader = bus.connect("reader", EVERYTHING)
    held = [reader.consume("q").receive() for _ in range(3)]
    assert all(held)
    assert bus.cut("reader") == 1
    consumer = broker.consume("q")
    for body in (b"0", b"1", b"2", b"3"):
        delivery = consumer.receive()
        assert delivery is not None
        assert delivery.body == body
        delivery.acknowledge()


def test_a_cut_meets_every_connection_of_one_identity_and_no_other(bus, broker):
    """And tells how many there were, so that a test knows that its fault fired."""
    others = [bus.connect("site-a", site_rights("site-a")) for _ in range(2)]
    assert bus.cut("site-a") == 2
    assert bus.cut("site-a") == 0
    for other in others:
        with pytest.raises(BrokerUnavailableError):
            other.depth("q")
    assert broker.depth("q") == 0
    assert bus.connect("site-a", site_rights("site-a")).depth("q") == 0


def test_a_connection_cut_before_the_confirm_leaves_the_publisher_in_doubt(bus, broker):
    """The batch is there, the publisher does not know; only its next publish is hit."""
    site = bus.connect("publisher", EVERYTHING)
    bus.cut_before_confirm("publisher")
    with pytest.raises(BrokerUnavailableError):
        site.publish([event("k", b"1"), event("k", b"2")])
    assert broker.depth("q") == 2
    bus.connect("publisher", EVERYTHING).publish([event("k", b"1")])
    assert broker.depth("q") == 3


def test_messages_before_a_refused_one_have_arrived(bus, broker):
    """A batch is no transaction, as on a real broker."""
    site = bus.connect("site-a", site_rights("site-a"))
    broker.declare(one_queue(Queue("events"), "#"))
    mine, foreign = event("r1.site-a.ready"), event("r1.site-b.ready")
    with pytest.raises(AccessRefusedError):
        site.publish([mine, foreign, mine])
    assert broker.depth("events") == 1


def test_a_right_is_a_pattern_for_the_whole_name(bus, broker):
    """A pattern without anchors does not open every name that begins with it."""
    only_q = Rights(*(re.compile("q") for _ in range(4)))
    broker.declare(one_queue(Queue("q-2"), "k"))
    reader = bus.connect("reader", only_q)
    reader.consume("q")
    with pytest.raises(AccessRefusedError):
        reader.consume("q-2")


def test_what_is_published_is_a_copy_of_bytes(broker):
    """Only bytes travel: an object is refused, and a buffer altered later changes nothing."""
    buffer = bytearray(b"before")
    broker.publish([event("k", cast("bytes", buffer))])
    buffer[:] = b"after!"
    delivery = broker.consume("q").receive()
    assert delivery is not None
    assert delivery.body == b"before"
    with pytest.raises(TypeError):
        broker.publish([event("k", cast("bytes", ["an object"]))])


@pytest.mark.parametrize("end", ["publish", "cut", "close"])
def test_a_waiting_receive_is_woken(bus, broker, end):
    """By a message, by a cut and by its own close: nobody waits for a timeout that is far away."""
    reader = bus.connect("reader", EVERYTHING)
    consumer = reader.consume("q")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(consumer.receive, 60.0)
        if end == "publish":
            broker.publish([event("k", b"x")])
            assert waiting.result(10).body == b"x"
            return
        bus.cut("reader") if end == "cut" else consumer.close()
        with pytest.raises(BrokerUnavailableError):
            waiting.result(10)


def test_many_threads_settle_each_message_once(bus, broker):
    """Four publishers, four readers, some requeueing: each message is acknowledged exactly once."""
    done: list[bytes] = []
    finished = threading.Event()

    def read() -> None:
        consumer = bus.connect("reader", EVERYTHING).consume("q")
        while not finished.is_set():
            delivery = consumer.receive(0.05)
            if delivery is None:
                continue
            if delivery.attempt == 1 and delivery.body.endswith(b"7"):
                delivery.requeue()
                continue
            done.append(delivery.body)
            delivery.acknowledge()
            if len(done) >= 200:
                finished.set()

    def publish(number: int) -> None:
        connection = bus.connect("publisher", EVERYTHING)
        for index in range(50):
            connection.publish([event("k", b"%d-%d" % (number, index))])

    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(read) for _ in range(4)]
        for task in [pool.submit(publish, number) for number in range(4)]:
            task.result(30)
        for task in readers:
            task.result(30)
    assert sorted(done) == sorted(b"%d-%d" % (n, i) for n in range(4) for i in range(50))
    assert broker.depth("q") == 0


def test_a_queue_bound_twice_over_two_exchanges_is_one_queue(broker):
    """Bindings are per exchange; messages of both end in the same queue."""
    broker.declare(one_queue(Queue("q"), "k", exchange=Exchange("direct", "direct")))
    broker.declare(Topology((), (), ()))
    broker.publish([event("k"), Message("direct", "k", b"y")])
    assert broker.depth("q") == 2


WORDS = st.lists(st.sampled_from(["a", "b", "r1"]), min_size=1, max_size=5)


@given(words=WORDS, data=st.data())
def test_a_pattern_made_from_a_key_matches_it(words, data):
    """Replace any word by ``*``, any stretch by ``#``: the key still matches."""
    stars = [data.draw(st.sampled_from([word, "*"])) for word in words]
    assert topic_matches(".".join(stars), ".".join(words))
    start = data.draw(st.integers(0, len(words)))
    end = data.draw(st.integers(start, len(words)))
    assert topic_matches(".".join([*stars[:start], "#", *stars[end:]]), ".".join(words))
    assert not topic_matches(".".join([*stars, "*"]), ".".join(words))
