"""A connection under the ``Broker`` port, with what people's tools ask of a broker beside it."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any, Self

import pika

from shared.brokers.port import MAX_MESSAGE_BYTES
from shared.brokers.rabbitmq import decoding
from shared.brokers.rabbitmq.consumer import RabbitConsumer
from shared.brokers.rabbitmq.declaring import declare, in_parts, parts
from shared.brokers.rabbitmq.io_thread import IoThread
from shared.brokers.rabbitmq.publisher import Publisher
from shared.brokers.rabbitmq.reviving import PROBE_SECONDS, dead_queues
from shared.brokers.rabbitmq.taking import Taker, check_sent, not_in_that_name, send_as
from shared.errors import BrokerError
from shared.failpoints import failpoint
from shared.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pika.channel import Channel

    from shared.brokers.port import Message
    from shared.credentials import BrokerAddress
    from shared.topology import Topology

HEARTBEAT_SECONDS = 30


def connect(address: BrokerAddress, heartbeat_seconds: int = HEARTBEAT_SECONDS) -> RabbitConnection:
    """Connect and log in. Raises BrokerUnavailableError, AccessRefusedError, BrokerError.

    A side that is silent for two heartbeats is taken to be gone by the other.
    """
    return RabbitConnection(address, heartbeat_seconds)


class RabbitConnection:
    """One identity's connection: the ``Broker`` port. Made by :func:`connect`."""

    def __init__(self, address: BrokerAddress, heartbeat_seconds: int) -> None:
        self._address = address
        self._publishing = threading.Lock()
        self._io = IoThread(address, heartbeat_seconds)
        self._publisher = Publisher(self._io)

    @property
    def version(self) -> str:
        """The server's own word for its version."""
        return self._io.version

    @property
    def identity(self) -> str:
        """The account this connection was made with."""
        return self._address.account

    def declare(self, topology: Topology) -> None:
        """Make exchanges, queues and bindings, in this order; what precedes a failing one stays.

        A queue that an earlier release declared with other limits is made anew if it may be.
        """
        for part in in_parts(topology):
            self._declare(part)

    def _declare(self, topology: Topology) -> None:
        remade = {queue.name for queue in topology.queues if queue.remade}
        while True:
            try:
                self._io.on_own_channel(functools.partial(declare, topology=topology))
            except BrokerError as error:
                queue = error.declared_otherwise
                if queue is None or queue not in remade:
                    raise
                get_logger().warning("queue.remade", queue=queue, reason=str(error))
                remade.remove(queue)
                self.delete(queue)
            else:
                return

    def revive(self, topology: Topology) -> tuple[str, ...]:
        """Delete and declare anew the queues that answer nobody: see ``reviving``; their names.

        Raises BrokerUnavailableError when the broker as a whole does not answer: then nothing is
        made.
        """
        suspects = [queue.name for queue in topology.queues if queue.delivery_limit is not None]
        dead = dead_queues(lambda: IoThread(self._address, HEARTBEAT_SECONDS), suspects)
        if not dead:
            return ()
        self.depth(dead[0])  # answered from the broker's own table: is the line still there?
        for queue in dead:
            get_logger().warning(
                "queue.revived",
                queue=queue,
                reason=f"it gave no answer within {PROBE_SECONDS:.0f} s or broke the connection, "
                "as after a kill of the broker just when it was declared; made anew",
            )
            self.delete(queue)
        self.declare(topology)
        return tuple(dead)

    def delete(self, queue: str) -> None:
        """Delete a queue with all that is in it. Repeatable."""
        self._io.on_own_channel(lambda channel, done: channel.queue_delete(queue, callback=done))

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish all and wait for the broker's confirms of the whole batch.

        Sizes are checked first; one message that is too large stops the whole batch. Raises
        UnroutableError, AccessRefusedError, BrokerError, BrokerUnavailableError; then any message
        of the batch may have arrived.
        """
        self._io.check_open()
        for message in messages:
            if len(message.body) > MAX_MESSAGE_BYTES:
                raise BrokerError(
                    f"{message.routing_key}: expected at most {MAX_MESSAGE_BYTES} bytes, "
                    f"got {len(message.body)}; put large data into the store"
                )
        if messages:
            words = dict.fromkeys(message.event for message in messages)
            for word in words:
                failpoint("publish.before", word)
            with self._publishing:
                self._io.ask(lambda future: self._publisher.send(messages, future))
            for word in words:
                failpoint("publish.confirmed", word)

    def consume(self, queue: str, prefetch: int = 1) -> RabbitConsumer:
        """Subscribe. Raises AccessRefusedError when this identity may not read the queue."""
        consumer = RabbitConsumer(self._io, queue, prefetch)
        self._io.watch(consumer)  # before it is asked for: the end may come meanwhile
        self._io.ask(consumer.subscribe)
        return consumer

    def depth(self, queue: str) -> int:
        """Messages ready in the queue. Needs no right on any RabbitMQ."""
        return self.count(queue)[0]

    def count(self, queue: str) -> tuple[int, int]:
        """Messages ready in the queue, and how many consumers it has."""
        found: Any = self._io.on_own_channel(
            lambda channel, done: channel.queue_declare(queue, passive=True, callback=done)
        )
        return found.method.message_count, found.method.consumer_count

    def consumers(self, queues: Sequence[str]) -> dict[str, int]:
        """How many consumers each of these queues has. Raises BrokerError when one is missing.

        Hundreds on one channel: a federation of thousands asks for all of them every few seconds.
        """
        found: dict[str, int] = {}
        for some in parts(queues):
            found |= self._consumers(set(some))
        return found

    def _consumers(self, wanted: set[str]) -> dict[str, int]:
        found: dict[str, int] = {}

        def start(channel: Channel, done: Callable[[object], None]) -> None:
            def take(frame: Any) -> None:
                found[frame.method.queue] = frame.method.consumer_count
                if len(found) == len(wanted):
                    done(None)

            for queue in wanted:
                channel.queue_declare(queue, passive=True, callback=take)

        self._io.on_own_channel(start)
        return found

    def peek(self, queue: str, limit: int) -> list[tuple[str, str | None, bytes]]:
        """Routing key, sender and body of the first ``limit`` messages, which stay in the queue."""
        found: list[tuple[str, str | None, bytes]] = []

        def start(channel: Channel, done: Callable[[object], None]) -> None:
            def take(_channel: object, method: Any, properties: Any, body: bytes) -> None:
                found.append((decoding.as_text(method.routing_key), properties.user_id, body))
                more()

            def more() -> None:
                if len(found) < limit:
                    channel.basic_get(queue, take)
                else:
                    give_back()

            def give_back(_: object = None) -> None:
                channel.basic_nack(0, multiple=True, requeue=True)  # 0: all of them
                done(None)

            channel.add_callback(give_back, [pika.spec.Basic.GetEmpty])
            more()

        self._io.on_own_channel(start)
        return found

    def purge(self, queue: str) -> int:
        """Drop all messages that are ready; how many they were."""
        found: Any = self._io.on_own_channel(
            lambda channel, done: channel.queue_purge(queue, callback=done)
        )
        count: int = found.method.message_count
        return count

    def take_from(self, queue: str) -> Taker:
        """Take messages one by one and settle each, or let it go back. Close it when done."""
        return Taker(self._io, queue)

    def publish_as(self, sender: str, message: Message) -> None:
        """Publish one message in ``sender``'s name and wait for the confirm.

        Raises AccessRefusedError unless ``sender`` is this account or it may impersonate, else as
        ``publish``.
        """
        send = functools.partial(send_as, message=message, sender=sender)
        try:
            decided = self._io.on_own_channel(send)
        except BrokerError as error:
            raise not_in_that_name(error, self.identity, sender) from None
        check_sent(decided, message)

    def close(self) -> None:
        """End the connection and its consumers. Repeatable."""
        self._io.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
