"""What every ``Broker`` adapter must do. An adapter's test class inherits and gives ``bus``.

Nothing here looks inside an adapter or takes it to be instant: what must come is waited for up to
``PATIENCE_SECONDS``, what must not come is watched for ``quiet_seconds``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import pytest

from shared.brokers.port import MAX_MESSAGE_BYTES, Broker, Consumer, Delivery, Message
from shared.errors import (
    AccessRefusedError,
    BrokerError,
    BrokerUnavailableError,
    StaleDeliveryError,
    UnroutableError,
)
from shared.topology import (
    COORDINATOR,
    EVENTS_EXCHANGE,
    REFUSED_EXCHANGE,
    SITES_EXCHANGE,
    Binding,
    Exchange,
    Queue,
    Rights,
    Topology,
    coordinator_queue,
    run_topology,
    site_queue,
    site_rights,
)
from tests.patience import PATIENCE_SECONDS, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

SITES = ("site-a", "site-b")
EVERYTHING = Rights(*(re.compile(r"^.*$") for _ in range(4)))  # to declare queues of any name


class Bus(Protocol):
    """A blank broker for one test."""

    def connect(self, identity: str, rights: Rights) -> Broker:
        """A new connection of this identity with exactly these rights."""

    def cut(self, identity: str) -> None:
        """Break this identity's connections as a failing network would."""


def one_queue(queue: Queue, *keys: str, exchange: Exchange | None = None) -> Topology:
    """A topology of one queue bound by ``keys``."""
    exchange = exchange or Exchange(EVENTS_EXCHANGE, "topic")
    bindings = tuple(Binding(exchange.name, queue.name, key) for key in keys)
    return Topology((exchange,), (queue,), bindings)


def event(key: str, body: bytes = b"x") -> Message:
    """A message to the events exchange."""
    return Message(EVENTS_EXCHANGE, key, body)


class BrokerContract:
    """The suite. Adapters override ``bus`` and, if they are slow, the two times."""

    quiet_seconds = 0.05

    @pytest.fixture
    def bus(self) -> Bus:
        raise NotImplementedError

    @pytest.fixture
    def coordinator(self, bus: Bus) -> Broker:
        """A connection that may do everything, with run ``r1`` of two sites declared."""
        broker = bus.connect(COORDINATOR, EVERYTHING)
        broker.declare(run_topology("r1", SITES))
        return broker

    def expect(self, consumer: Consumer) -> Delivery:
        delivery = consumer.receive(PATIENCE_SECONDS)
        assert delivery is not None, "nothing was delivered in time"
        return delivery

    def expect_nothing(self, consumer: Consumer) -> None:
        delivery = consumer.receive(self.quiet_seconds)
        assert delivery is None, f"unexpected {delivery}"

    def eventually(self, holds: Callable[[], bool]) -> None:
        wait_until(holds, "what this test waits for")

    def expect_cut(self, consumer: Consumer) -> None:
        """Wait until the consumer has noticed that its connection is gone."""

        def is_gone() -> bool:
            try:
                consumer.receive(0.05)
            except BrokerUnavailableError:
                return True
            return False

        self.eventually(is_gone)

    # Delivery ----------

    def test_a_message_arrives_as_it_was_published(self, bus, coordinator):
        """Body, key, queue, the checked sender, and 1 as the attempt of a first delivery."""
        body = bytes(range(256))
        with bus.connect("site-a", site_rights("site-a")) as site:
            site.publish([event("r1.site-a.ready", body)])
        delivery = self.expect(coordinator.consume(coordinator_queue("r1")))
        assert delivery.body == body
        assert delivery.routing_key == "r1.site-a.ready"
        assert delivery.queue == coordinator_queue("r1")
        assert delivery.sender == "site-a"
        assert delivery.attempt == 1

    def test_a_batch_keeps_its_order(self, coordinator):
        """One publisher, one queue: first in, first out."""
        bodies = [b"%d" % number for number in range(20)]
        coordinator.publish([event("r1.site-a.ready", body) for body in bodies])
        consumer = coordinator.consume(coordinator_queue("r1"))
        received = []
        for _ in bodies:
            delivery = self.expect(consumer)
            received.append(delivery.body)
            delivery.acknowledge()
        assert received == bodies

    def test_reviving_leaves_alone_what_answers(self, coordinator):
        """Also queues that somebody consumes from; what a probe was handed keeps its place."""
        coordinator.publish([event("r1.site-a.ready", b"%d" % number) for number in range(3)])
        assert coordinator.revive(run_topology("r1", SITES)) == ()
        consumer = coordinator.consume(coordinator_queue("r1"))
        assert coordinator.revive(run_topology("r1", SITES)) == ()
        for number in range(3):
            delivery = self.expect(consumer)
            assert delivery.body == b"%d" % number
            delivery.acknowledge()

    def test_an_empty_batch_is_no_error(self, coordinator):
        """Nothing to publish, nothing published."""
        coordinator.publish([])
        assert coordinator.depth(coordinator_queue("r1")) == 0

    def test_a_message_reaches_every_queue_its_key_is_bound_to(self, coordinator):
        """Two runs hear of a site that comes online; each has a copy of its own."""
        coordinator.declare(run_topology("r2", SITES))
        coordinator.publish([event("any.site-a.online")])
        for run in ("r1", "r2"):
            self.expect(coordinator.consume(coordinator_queue(run))).acknowledge()

    def test_two_bindings_that_both_match_give_one_copy(self, coordinator):
        """A queue has a message once, however many of its bindings take the key."""
        coordinator.declare(one_queue(Queue("q"), "a.*", "*.b", "a.b"))
        coordinator.publish([event("a.b")])
        assert coordinator.depth("q") == 1

    def test_publishing_delivers_to_nobody_before_they_receive(self, coordinator):
        """A consumer on the very connection that publishes sees the message when it asks."""
        consumer = coordinator.consume(coordinator_queue("r1"))
        coordinator.publish([event("r1.site-a.ready")])
        assert self.expect(consumer).routing_key == "r1.site-a.ready"

    def test_receiving_from_an_empty_queue_gives_none(self, coordinator):
        """An idle queue is no error, so that a loop can look after its other duties."""
        consumer = coordinator.consume(coordinator_queue("r1"))
        assert consumer.receive() is None
        self.expect_nothing(consumer)

    @pytest.mark.parametrize(
        ("pattern", "takes", "leaves"),
        [
            ("r1.*.*", "r1.site-a.ready", "r1.ready"),
            ("r1.*.*", "r1.site-a.online", "r1.site-a.is.online"),
            ("any.*.online", "any.site-b.online", "any.site-b.offline"),
            ("r1.#", "r1", "r2"),
            ("r1.#", "r1.a.b.c", "x.r1"),
            ("#.end", "a.b.end", "end.a"),
            ("a.#.z", "a.z", "a.b"),
            ("#", "what.ever", None),
            ("r1", "r1", "r1.a"),
        ],
    )
    def test_topic_patterns_match_by_words(self, coordinator, pattern, takes, leaves):
        """``*`` is exactly one word, ``#`` none or more, and words are whole."""
        coordinator.declare(one_queue(Queue("q"), pattern, exchange=Exchange("t", "topic")))
        coordinator.publish([Message("t", takes, b"x")])
        assert coordinator.depth("q") == 1
        if leaves is not None:
            with pytest.raises(UnroutableError):
                coordinator.publish([Message("t", leaves, b"x")])

    def test_a_direct_exchange_takes_a_star_for_a_letter(self, coordinator):
        """Only topic exchanges know patterns."""
        coordinator.declare(one_queue(Queue("q"), "*", exchange=Exchange("d", "direct")))
        with pytest.raises(UnroutableError):
            coordinator.publish([Message("d", "site-a", b"x")])
        coordinator.publish([Message("d", "*", b"x")])
        assert coordinator.depth("q") == 1

    # Refused publishes ----------

    def test_an_unroutable_message_is_an_error_that_names_the_key(self, coordinator):
        """No queue took it: the publisher hears of it before the call returns."""
        with pytest.raises(UnroutableError, match="site-z"):
            coordinator.publish([Message(SITES_EXCHANGE, "site-z", b"x")])

    def test_an_unroutable_message_among_others_fails_the_batch(self, coordinator):
        """One returned message in a batch of confirmed ones is not overlooked."""
        good = Message(SITES_EXCHANGE, "site-a", b"x")
        with pytest.raises(UnroutableError, match="site-z"):
            coordinator.publish([good, Message(SITES_EXCHANGE, "site-z", b"x"), good])

    def test_a_missing_exchange_is_an_error(self, coordinator):
        """Named, and not taken for an unroutable key."""
        with pytest.raises(BrokerError, match="nowhere"):
            coordinator.publish([Message("nowhere", "site-a", b"x")])

    def test_a_message_over_the_size_limit_is_an_error(self, coordinator):
        """The limit itself passes; one byte more does not, and nothing of its batch arrives."""
        full = event("r1.site-a.ready", bytes(MAX_MESSAGE_BYTES))
        coordinator.publish([full])
        assert coordinator.depth(coordinator_queue("r1")) == 1
        over = event("r1.site-a.ready", bytes(MAX_MESSAGE_BYTES + 1))
        with pytest.raises(BrokerError, match=str(MAX_MESSAGE_BYTES)):
            coordinator.publish([full, over])
        assert coordinator.depth(coordinator_queue("r1")) == 1

    def test_a_connection_and_its_consumers_outlive_a_refused_publish(self, coordinator):
        """An error of one message is not an error of the connection."""
        consumer = coordinator.consume(coordinator_queue("r1"))
        for wrong in (Message(SITES_EXCHANGE, "site-z", b"x"), Message("nowhere", "k", b"x")):
            with pytest.raises(BrokerError):
                coordinator.publish([wrong])
        coordinator.publish([event("r1.site-a.ready")])
        self.expect(consumer).acknowledge()

    # Acknowledging and coming back ----------

    def test_prefetch_is_one(self, coordinator):
        """No second delivery before the first is settled."""
        coordinator.publish([event("r1.a.ready", b"1"), event("r1.a.ready", b"2")])
        consumer = coordinator.consume(coordinator_queue("r1"))
        first = self.expect(consumer)
        self.expect_nothing(consumer)
        first.acknowledge()
        assert self.expect(consumer).body == b"2"

    def test_prefetch_is_what_is_asked_for(self, coordinator):
        """So many are handed over unsettled; settled together, the next ones come."""
        bodies = [b"%d" % number for number in range(5)]
        coordinator.publish([event("r1.a.ready", body) for body in bodies])
        consumer = coordinator.consume(coordinator_queue("r1"), 3)
        first = [self.expect(consumer) for _ in range(3)]
        assert [one.body for one in first] == bodies[:3]
        self.expect_nothing(consumer)
        consumer.acknowledge(first)
        rest = [self.expect(consumer) for _ in range(2)]
        assert [one.body for one in rest] == bodies[3:]
        consumer.acknowledge(rest)
        self.expect_nothing(consumer)
        assert coordinator.depth(coordinator_queue("r1")) == 0

    def test_acknowledging_some_leaves_the_ones_between(self, bus, coordinator):
        """Only those that were named are off the queue."""
        coordinator.publish([event("r1.a.ready", b"%d" % number) for number in range(4)])
        reader = bus.connect("reader", EVERYTHING)
        consumer = reader.consume(coordinator_queue("r1"), 4)
        held = [self.expect(consumer) for _ in range(4)]
        consumer.acknowledge([held[0], held[2]])
        consumer.acknowledge([])
        reader.close()
        again = coordinator.consume(coordinator_queue("r1"), 4)
        assert [self.expect(again).body for _ in range(2)] == [b"1", b"3"]
        self.expect_nothing(again)

    @pytest.mark.parametrize("how", ["requeue", "close"])
    def test_what_is_given_back_together_comes_again_in_its_order(self, bus, coordinator, how):
        """Ahead of the rest, one attempt more each."""
        coordinator.publish([event("r1.a.ready", b"%d" % number) for number in range(5)])
        reader = bus.connect("reader", EVERYTHING)
        consumer = reader.consume(coordinator_queue("r1"), 3)
        held = [self.expect(consumer) for _ in range(3)]
        if how == "requeue":
            consumer.requeue(held)
        else:
            reader.close()
            consumer = coordinator.consume(coordinator_queue("r1"), 5)
        again = [self.expect(consumer) for _ in range(3)]
        assert [one.body for one in again] == [one.body for one in held]
        assert all(one.attempt > 1 for one in again)
        consumer.acknowledge(again)
        rest = [self.expect(consumer) for _ in range(2)]
        assert [(one.body, one.attempt) for one in rest] == [(b"3", 1), (b"4", 1)]

    @pytest.mark.parametrize("settle", ["acknowledge", "requeue"])
    def test_one_stale_delivery_among_others_settles_none(self, coordinator, settle):
        """StaleDeliveryError, and the others can be settled after that."""
        coordinator.publish([event("r1.a.ready", b"%d" % number) for number in range(2)])
        consumer = coordinator.consume(coordinator_queue("r1"), 2)
        stale, other = self.expect(consumer), self.expect(consumer)
        stale.acknowledge()
        with pytest.raises(StaleDeliveryError):
            getattr(consumer, settle)([other, stale])
        other.acknowledge()
        self.expect_nothing(consumer)

    def test_an_acknowledged_message_never_comes_again(self, bus, coordinator):
        """Not even to the next connection."""
        coordinator.publish([event("r1.a.ready")])
        with bus.connect("reader", EVERYTHING) as reader:
            self.expect(reader.consume(coordinator_queue("r1"))).acknowledge()
        self.expect_nothing(coordinator.consume(coordinator_queue("r1")))

    def test_a_requeued_message_comes_first_and_counts_up(self, coordinator):
        """At the head again, one attempt more."""
        coordinator.publish([event("r1.a.ready", b"1"), event("r1.a.ready", b"2")])
        consumer = coordinator.consume(coordinator_queue("r1"))
        self.expect(consumer).requeue()
        again = self.expect(consumer)
        assert (again.body, again.attempt) == (b"1", 2)
        again.acknowledge()
        last = self.expect(consumer)
        assert (last.body, last.attempt) == (b"2", 1)

    @pytest.mark.parametrize("first", ["acknowledge", "requeue"])
    @pytest.mark.parametrize("second", ["acknowledge", "requeue"])
    def test_a_delivery_is_settled_once(self, coordinator, first, second):
        """Whatever was done first, a second touch is stale."""
        coordinator.publish([event("r1.a.ready")])
        delivery = self.expect(coordinator.consume(coordinator_queue("r1")))
        getattr(delivery, first)()
        with pytest.raises(StaleDeliveryError):
            getattr(delivery, second)()

    def test_an_old_delivery_does_not_settle_a_newer_one(self, coordinator):
        """Stale, though its consumer holds another; that other is still there to be settled."""
        coordinator.publish([event("r1.a.ready", b"1"), event("r1.a.ready", b"2")])
        consumer = coordinator.consume(coordinator_queue("r1"))
        old = self.expect(consumer)
        old.acknowledge()
        newer = self.expect(consumer)
        for touch in (old.acknowledge, old.requeue):
            with pytest.raises(StaleDeliveryError):
                touch()
        newer.acknowledge()
        self.expect_nothing(consumer)

    @pytest.mark.parametrize("ended", ["consumer", "connection"])
    def test_an_unsettled_delivery_comes_again_when_its_reader_ends(self, bus, coordinator, ended):
        """With a higher attempt, ahead of the rest; the old delivery is stale."""
        coordinator.publish([event("r1.a.ready", b"1"), event("r1.a.ready", b"2")])
        reader = bus.connect("reader", EVERYTHING)
        consumer = reader.consume(coordinator_queue("r1"))
        held = self.expect(consumer)
        (consumer if ended == "consumer" else reader).close()
        again = self.expect(coordinator.consume(coordinator_queue("r1")))
        assert again.body == b"1"
        assert again.attempt > held.attempt
        for touch in (held.acknowledge, held.requeue):
            with pytest.raises(StaleDeliveryError):
                touch()
        again.acknowledge()

    def test_a_cut_connection_returns_its_delivery(self, bus, coordinator):
        """The reader gets BrokerUnavailableError, its delivery is stale and comes to the next."""
        coordinator.publish([event("r1.a.ready")])
        reader = bus.connect("reader", EVERYTHING)
        consumer = reader.consume(coordinator_queue("r1"))
        held = self.expect(consumer)
        bus.cut("reader")
        self.expect_cut(consumer)
        with pytest.raises(StaleDeliveryError):
            held.acknowledge()
        with pytest.raises(BrokerUnavailableError):
            reader.publish([event("r1.a.ready")])
        again = self.expect(coordinator.consume(coordinator_queue("r1")))
        assert again.attempt > held.attempt

    def test_a_message_that_came_back_too_often_is_dropped(self, coordinator):
        """Limit 2: delivered three times, never a fourth; what stands behind it goes on."""
        coordinator.declare(one_queue(Queue("q", delivery_limit=2), "k"))
        coordinator.publish([event("k", b"bad"), event("k", b"good")])
        consumer = coordinator.consume("q")
        attempts = []
        while (delivery := self.expect(consumer)).body == b"bad":
            attempts.append(delivery.attempt)
            delivery.requeue()
        assert attempts == [1, 2, 3], attempts
        assert delivery.body == b"good"

    # Limits ----------

    def test_a_full_queue_drops_its_oldest(self, coordinator):
        """The newest ``max_length`` messages are kept, in order."""
        coordinator.declare(one_queue(Queue("q", max_length=3), "k"))
        coordinator.publish([event("k", b"%d" % number) for number in range(6)])
        self.eventually(lambda: coordinator.depth("q") == 3)
        consumer = coordinator.consume("q")
        for body in (b"3", b"4", b"5"):
            delivery = self.expect(consumer)
            assert delivery.body == body
            delivery.acknowledge()

    def test_an_expired_message_leaves_its_queue(self, coordinator):
        """One with a short life goes, one without stays."""
        coordinator.declare(one_queue(Queue("q"), "k"))
        coordinator.publish([replace(event("k", b"old"), expires_seconds=0.05), event("k", b"new")])
        self.eventually(lambda: coordinator.depth("q") == 1)
        assert self.expect(coordinator.consume("q")).body == b"new"

    # Several consumers ----------

    def test_consumers_of_a_plain_queue_share_its_messages(self, bus, coordinator):
        """Two messages, two readers with one unsettled delivery each: each has another one."""
        coordinator.declare(one_queue(Queue("q"), "k"))
        readers = [bus.connect(f"reader-{n}", EVERYTHING) for n in range(2)]
        consumers = [reader.consume("q") for reader in readers]
        coordinator.publish([event("k", b"1"), event("k", b"2")])
        assert {self.expect(consumer).body for consumer in consumers} == {b"1", b"2"}

    @pytest.mark.parametrize("how", ["consumer", "connection", "cut"])
    def test_a_standby_takes_over_in_silence(self, bus, coordinator, how):
        """Single active consumer: first come, only served; then the next in line, unasked."""
        readers = [bus.connect(f"reader-{n}", EVERYTHING) for n in range(3)]
        consumers = [reader.consume(coordinator_queue("r1")) for reader in readers]
        coordinator.publish([event("r1.a.ready", b"1"), event("r1.a.ready", b"2")])
        for standby in consumers[1:]:
            self.expect_nothing(standby)
        assert self.expect(consumers[0]).body == b"1"
        for standby in consumers[1:]:
            self.expect_nothing(standby)
        if how == "cut":
            bus.cut("reader-0")
        else:
            (consumers[0] if how == "consumer" else readers[0]).close()
        self.expect_taken_over(consumers[1])
        self.expect_nothing(consumers[2])

    def expect_taken_over(self, consumer: Consumer) -> None:
        again = self.expect(consumer)
        assert again.body == b"1"
        assert again.attempt > 1
        again.acknowledge()
        assert self.expect(consumer).body == b"2"

    # Declaring ----------

    def test_declaring_again_changes_nothing(self, coordinator):
        """Same arguments: no error, and the messages that wait are still there."""
        coordinator.publish([event("r1.a.ready")])
        coordinator.declare(run_topology("r1", SITES))
        assert coordinator.depth(coordinator_queue("r1")) == 1

    @pytest.mark.parametrize(
        ("field", "other"),
        [
            ("max_length", Queue("q", max_length=6)),
            ("single_active_consumer", Queue("q", max_length=5, single_active_consumer=True)),
            ("delivery_limit", Queue("q", max_length=5, delivery_limit=3)),
        ],
    )
    def test_a_queue_is_not_redeclared_with_other_arguments(self, bus, coordinator, field, other):
        """BrokerError naming queue and field; the queue stays as it was."""
        coordinator.declare(one_queue(Queue("q", max_length=5), "k"))
        with (
            bus.connect("other", EVERYTHING) as broker,
            pytest.raises(BrokerError, match=rf"\bq\b.*{field}"),
        ):
            broker.declare(one_queue(other, "k"))
        coordinator.declare(one_queue(Queue("q", max_length=5), "k"))

    def test_an_exchange_is_not_redeclared_with_another_kind(self, bus, coordinator):
        """BrokerError naming exchange and field."""
        with (
            bus.connect("other", EVERYTHING) as broker,
            pytest.raises(BrokerError, match=rf"{EVENTS_EXCHANGE}.*kind"),
        ):
            broker.declare(Topology((Exchange(EVENTS_EXCHANGE, "direct"),), (), ()))

    @pytest.mark.parametrize(
        "binding",
        [Binding("nowhere", site_queue("site-a"), "k"), Binding(EVENTS_EXCHANGE, "no", "k")],
    )
    def test_a_binding_needs_both_its_ends(self, coordinator, binding):
        """BrokerError for an exchange or a queue that is not there."""
        with pytest.raises(BrokerError):
            coordinator.declare(Topology((), (), (binding,)))

    def test_consumers_are_counted(self, bus, coordinator):
        """Of each queue that was asked for, as they come and go; any account may ask."""
        queues = [site_queue(site) for site in SITES]
        site = bus.connect("site-a", site_rights("site-a"))
        assert site.consumers(queues) == dict.fromkeys(queues, 0)
        site.consume(site_queue("site-a"))
        assert coordinator.consumers(queues) == {queues[0]: 1, queues[1]: 0}
        site.close()
        self.eventually(lambda: coordinator.consumers(queues) == dict.fromkeys(queues, 0))
        assert coordinator.consumers([]) == {}

    def test_a_missing_queue_has_no_consumer_and_no_depth(self, coordinator):
        """BrokerError naming the queue, three times."""
        with pytest.raises(BrokerError, match="no-such-queue"):
            coordinator.consumers([coordinator_queue("r1"), "no-such-queue"])
        with pytest.raises(BrokerError, match="no-such-queue"):
            coordinator.consume("no-such-queue")
        with pytest.raises(BrokerError, match="no-such-queue"):
            coordinator.depth("no-such-queue")

    # Rights ----------

    @pytest.mark.parametrize(
        ("exchange", "key"),
        [
            (EVENTS_EXCHANGE, "r1.site-b.ready"),
            (EVENTS_EXCHANGE, "r1.coordinator.tick"),
            (EVENTS_EXCHANGE, "r1.site-a.ready.more"),
            (EVENTS_EXCHANGE, "r1.site-a.READY"),
            (SITES_EXCHANGE, "site-a"),
            (SITES_EXCHANGE, "site-b"),
            (REFUSED_EXCHANGE, "refused"),
        ],
    )
    def test_a_site_publishes_as_nobody_else(self, bus, coordinator, exchange, key):
        """Only events under its own name; all other exchanges are closed to it."""
        site = bus.connect("site-a", site_rights("site-a"))
        with pytest.raises(AccessRefusedError):
            site.publish([Message(exchange, key, b"x")])
        site.publish([event("r1.site-a.ready")])

    @pytest.mark.parametrize("queue", [site_queue("site-b"), coordinator_queue("r1")])
    def test_a_site_reads_no_queue_but_its_own(self, bus, coordinator, queue):
        """Its own can be read on the same connection, after the refusal."""
        coordinator.publish([Message(SITES_EXCHANGE, "site-a", b"x")])
        site = bus.connect("site-a", site_rights("site-a"))
        with pytest.raises(AccessRefusedError):
            site.consume(queue)
        self.expect(site.consume(site_queue("site-a"))).acknowledge()

    def test_a_site_declares_nothing(self, bus, coordinator):
        """Not even what is there already."""
        site = bus.connect("site-a", site_rights("site-a"))
        with pytest.raises(AccessRefusedError):
            site.declare(run_topology("r1", SITES))
        with pytest.raises(AccessRefusedError):
            site.declare(one_queue(Queue(site_queue("site-a-2")), "k"))

    def test_a_site_may_see_how_deep_a_queue_is(self, bus, coordinator):
        """Depth needs no right on any broker; documented, not relied upon."""
        site = bus.connect("site-a", site_rights("site-a"))
        assert site.depth(coordinator_queue("r1")) == 0

    # Closing ----------

    def test_a_closed_connection_refuses_everything(self, coordinator):
        """BrokerUnavailableError from every method of connection and consumer; closing repeats."""
        consumer = coordinator.consume(coordinator_queue("r1"))
        coordinator.close()
        coordinator.close()
        consumer.close()
        for call in (
            lambda: coordinator.declare(run_topology("r1", SITES)),
            lambda: coordinator.publish([event("r1.a.ready")]),
            lambda: coordinator.publish([]),
            lambda: coordinator.consume(coordinator_queue("r1")),
            lambda: coordinator.depth(coordinator_queue("r1")),
            lambda: coordinator.consumers([coordinator_queue("r1")]),
            consumer.receive,
        ):
            with pytest.raises(BrokerUnavailableError):
                call()

    def test_a_closed_consumer_receives_no_more(self, coordinator):
        """BrokerUnavailableError from it, while its connection goes on; closing repeats."""
        consumer = coordinator.consume(coordinator_queue("r1"))
        consumer.close()
        consumer.close()
        with pytest.raises(BrokerUnavailableError):
            consumer.receive()
        assert coordinator.depth(coordinator_queue("r1")) == 0

    def test_leaving_the_with_block_closes(self, bus, coordinator):
        """And says before that whose connection it is."""
        with bus.connect("site-a", site_rights("site-a")) as site:
            assert site.identity == "site-a"
        with pytest.raises(BrokerUnavailableError):
            site.publish([event("r1.site-a.ready")])

    def test_messages_outlive_the_connection_that_published_them(self, bus, coordinator):
        """They belong to the queue."""
        with bus.connect("site-a", site_rights("site-a")) as site:
            site.publish([event("r1.site-a.ready")])
        assert coordinator.depth(coordinator_queue("r1")) == 1
