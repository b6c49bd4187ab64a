"""The broker inside this process: the ``Broker`` port without a server.

It carries wire bytes only, runs under the same contract tests as RabbitMQ and copies what is
unkind about it: checked rights, returned deliveries, a delivery limit, dropped heads, expiry. All
of it is forgotten when the process ends; the coordinator announces it again from the ledger.

Invariants: one lock guards everything, and no caller's code but the clock runs while it is held;
nothing is delivered but by ``receive``. What it must not know: events, runs, sites.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self, cast

from shared.brokers.embedded_state import BrokerState, QueueState, StoredMessage
from shared.brokers.port import MAX_MESSAGE_BYTES
from shared.errors import (
    AccessRefusedError,
    BrokerError,
    BrokerUnavailableError,
    StaleDeliveryError,
)
from shared.log import get_logger

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Sequence

    from shared.brokers.port import Delivery, Message
    from shared.topology import Rights, Topology


@dataclass(eq=False)
class _Server:
    """What all connections share. ``changed`` is the one lock, told of whatever may wake one."""

    clock: Callable[[], float]
    state: BrokerState = field(default_factory=BrokerState)
    changed: threading.Condition = field(default_factory=threading.Condition)
    connections: list[EmbeddedConnection] = field(default_factory=list)
    unconfirmed: set[str] = field(default_factory=set)


class EmbeddedBroker:
    """The server's side: connections are made here, and faults.

    ``clock``: seconds, monotonic; messages expire by it. Waiting in ``receive`` goes by real time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._server = _Server(clock)

    def connect(self, identity: str, rights: Rights) -> EmbeddedConnection:
        """A connection of ``identity``, which may have several."""
        return EmbeddedConnection(self._server, identity, rights)

    def cut(self, identity: str) -> int:
        """Fault: drop this identity's connections as a cut network would; how many there were."""
        with self._server.changed:
            gone = [c for c in self._server.connections if c.identity == identity]
            for connection in gone:
                connection.close()
        return len(gone)

    def cut_before_confirm(self, identity: str) -> None:
        """Fault: the next publish of this identity arrives whole, and its connection dies then.

        The publisher gets a BrokerUnavailableError and cannot know; it has to publish again.
        """
        with self._server.changed:
            self._server.unconfirmed.add(identity)


class EmbeddedConnection:
    """One identity's connection: the ``Broker`` port. Made by :meth:`EmbeddedBroker.connect`."""

    def __init__(self, server: _Server, identity: str, rights: Rights) -> None:
        self._server = server
        self._identity = identity
        self._rights = rights
        self._consumers: list[EmbeddedConsumer] = []
        self._open = True
        with server.changed:
            server.connections.append(self)

    @property
    def identity(self) -> str:
        """The account this connection was made with."""
        return self._identity

    def declare(self, topology: Topology) -> None:
        """Make exchanges, queues and bindings, in this order; what precedes a failing one stays."""
        with self._server.changed:
            self._check_open()
            for exchange in topology.exchanges:
                self._check_right(self._rights.configure, "configure", exchange.name)
            for queue in topology.queues:
                self._check_right(self._rights.configure, "configure", queue.name)
            for binding in topology.bindings:
                self._check_right(self._rights.write, "write", binding.queue)
                self._check_right(self._rights.read, "read", binding.exchange)
            self._server.state.declare(topology)

    def revive(self, topology: Topology) -> tuple[str, ...]:
        """Nothing to do: a queue in this process always answers."""
        del topology
        with self._server.changed:
            self._check_open()
        return ()

    def delete(self, queue: str) -> None:
        """Delete a queue with all that is in it. Repeatable."""
        with self._server.changed:
            self._check_open()
            self._check_right(self._rights.configure, "configure", queue)
            self._server.state.delete(queue)

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish in order, or raise: then any message before the failing one may have arrived.

        Sizes are checked first; one message that is too large stops the whole batch. Raises
        UnroutableError, AccessRefusedError, BrokerError, BrokerUnavailableError.
        """
        server = self._server
        with server.changed:
            self._check_open()
            for message in messages:
                _check_size(message)
            for message in messages:
                self._check_publish(message)
                server.state.store(message, self._identity, server.clock())
                server.changed.notify_all()
            if messages and self._identity in server.unconfirmed:
                server.unconfirmed.remove(self._identity)
                self.close()
                self._check_open()

    def consume(self, queue: str, prefetch: int = 1) -> EmbeddedConsumer:
        """Subscribe. Raises AccessRefusedError when this identity may not read the queue."""
        with self._server.changed:
            self._check_open()
            self._check_right(self._rights.read, "read", queue)
            consumer = EmbeddedConsumer(self._server, self._server.state.queue(queue), prefetch)
            self._consumers.append(consumer)
            return consumer

    def depth(self, queue: str) -> int:
        """Messages ready in the queue. Needs no right, as a passive declare needs none."""
        with self._server.changed:
            self._check_open()
            return self._server.state.queue(queue).depth(self._server.clock())

    def consumers(self, queues: Sequence[str]) -> dict[str, int]:
        """How many consumers each of these queues has. Raises BrokerError when one is missing."""
        with self._server.changed:
            self._check_open()
            return {queue: len(self._server.state.queue(queue).subscribers) for queue in queues}

    def close(self) -> None:
        """End the connection and its consumers. Repeatable."""
        with self._server.changed:
            if not self._open:
                return
            self._open = False
            self._server.connections.remove(self)
            # Newest first, as each goes to the head: the oldest stands in front again.
            for consumer in sorted(self._consumers, key=lambda c: c.held_sequence, reverse=True):
                consumer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._open:
            raise BrokerUnavailableError(
                f"{self._identity}: the connection to the broker is closed; connect again"
            )

    def _check_publish(self, message: Message) -> None:
        self._check_right(self._rights.write, "write", message.exchange)
        if self._server.state.exchange(message.exchange).kind == "topic":
            self._check_right(self._rights.topic_write, "topic write", message.routing_key)

    def _check_right(self, right: re.Pattern[str], verb: str, name: str) -> None:
        if not right.fullmatch(name):
            raise AccessRefusedError(
                f"{name}: {verb} is not allowed to {self._identity} (only {right.pattern}); "
                "use its own queue and key, or give the account this right"
            )


class EmbeddedConsumer:
    """A subscription: the ``Consumer`` port. Made by :meth:`EmbeddedConnection.consume`."""

    def __init__(self, server: _Server, queue: QueueState, prefetch: int) -> None:
        self._server = server
        self._queue = queue
        self._prefetch = prefetch
        self._open = True
        self._held: dict[EmbeddedDelivery, StoredMessage] = {}  # oldest first
        queue.subscribers.append(self)

    @property
    def held_sequence(self) -> int:
        """Age of the oldest unsettled delivery, lower is older; -1 without one."""
        return next((stored.sequence for stored in self._held.values()), -1)

    def receive(self, timeout_seconds: float = 0.0) -> EmbeddedDelivery | None:
        """The next delivery, or None when none came in time. Raises BrokerUnavailableError."""
        with self._server.changed:
            self._server.changed.wait_for(self._must_wake, timeout_seconds)
            if not self._open:
                raise BrokerUnavailableError(
                    f"{self._queue.spec.name}: the subscription is closed; consume again"
                )
            if not self._is_fed():
                return None
            stored = self._queue.waiting.popleft()
            delivery = EmbeddedDelivery(
                queue=self._queue.spec.name,
                routing_key=stored.routing_key,
                body=stored.body,
                sender=stored.sender,
                attempt=stored.attempt,
                consumer=self,
            )
            self._held[delivery] = stored
            return delivery

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Take them off the queue together. Raises StaleDeliveryError if one was settled."""
        self._settled(deliveries)

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        """Put them back at the head in the order given. Raises StaleDeliveryError."""
        with self._server.changed:
            taken = self._settled(deliveries)
            for delivery, stored in zip(reversed(deliveries), reversed(taken), strict=True):
                if not self._queue.give_back(stored, self._server.clock()):
                    get_logger().warning(
                        "message.dropped",
                        queue=delivery.queue,
                        routing_key=delivery.routing_key,
                        sender=delivery.sender,
                        attempt=delivery.attempt,
                        reason="delivery limit",
                    )

    def close(self) -> None:
        """End the subscription; an unacknowledged delivery comes again to another consumer."""
        with self._server.changed:
            if not self._open:
                return
            self._open = False
            self._queue.subscribers.remove(self)
            self.requeue(list(self._held))

    def _settled(self, deliveries: Sequence[Delivery]) -> list[StoredMessage]:
        """What the deliveries are of; they are held no more. All of them, or an error and none."""
        with self._server.changed:
            for delivery in deliveries:
                if delivery not in self._held:
                    raise StaleDeliveryError(
                        f"{delivery.queue}: this delivery ({delivery.routing_key}) was "
                        "acknowledged or rejected before, or its connection is closed; receive it "
                        "again"
                    )
            self._server.changed.notify_all()
            return [self._held.pop(cast("EmbeddedDelivery", one)) for one in deliveries]

    def _must_wake(self) -> bool:
        return not self._open or self._is_fed()

    def _is_fed(self) -> bool:
        return len(self._held) < self._prefetch and self._queue.feeds(self, self._server.clock())


@dataclass(frozen=True, eq=False)
class EmbeddedDelivery:
    """One message handed to a consumer: the ``Delivery`` port."""

    queue: str
    routing_key: str
    body: bytes
    sender: str | None
    attempt: int
    consumer: EmbeddedConsumer

    def acknowledge(self) -> None:
        """Take it off the queue. Raises StaleDeliveryError."""
        self.consumer.acknowledge([self])

    def requeue(self) -> None:
        """Put it back at the head of the queue. Raises StaleDeliveryError."""
        self.consumer.requeue([self])


def _check_size(message: Message) -> None:
    if len(message.body) > MAX_MESSAGE_BYTES:
        raise BrokerError(
            f"{message.routing_key}: expected at most {MAX_MESSAGE_BYTES} bytes, "
            f"got {len(message.body)}; put large data into the store"
        )
