"""A connection: the threads that ask, and the one thread that owns the socket."""

from __future__ import annotations

import contextlib
import functools
import logging
import ssl
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Self, TypeVar

import pika
import pika.exceptions

from shared.brokers.port import MAX_MESSAGE_BYTES
from shared.brokers.rabbitmq import decoding
from shared.brokers.rabbitmq.consumer import RabbitConsumer
from shared.brokers.rabbitmq.declaring import declare
from shared.brokers.rabbitmq.futures import answer, fail, guarded
from shared.brokers.rabbitmq.publisher import Publisher, spoken
from shared.brokers.rabbitmq.reviving import revive
from shared.brokers.rabbitmq.sockets import Sockets
from shared.brokers.rabbitmq.taking import Taker, check_sent, not_in_that_name, send_as
from shared.brokers.rabbitmq.translation import because, translate
from shared.errors import BrokerError, BrokerSilentError, BrokerUnavailableError, ConfigError
from shared.failpoints import failpoint
from shared.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pika.channel import Channel

    from shared.brokers.port import Message
    from shared.credentials import BrokerAddress
    from shared.topology import Topology

HEARTBEAT_SECONDS = 30
CONNECT_SECONDS = 15.0
ANSWER_SECONDS = 60.0  # for one question, or for the confirms of one batch
CLOSE_SECONDS = 5.0

Answer = TypeVar("Answer")

# pika logs every lost connection with a traceback; what it knows is in our errors.
logging.getLogger("pika").addHandler(logging.NullHandler())
logging.getLogger("pika").propagate = False
decoding.install()


def connect(address: BrokerAddress, heartbeat_seconds: int = HEARTBEAT_SECONDS) -> RabbitConnection:
    """Connect and log in. Raises BrokerUnavailableError, AccessRefusedError, BrokerError.

    A side that is silent for two heartbeats is taken to be gone by the other.
    """
    return RabbitConnection(address, heartbeat_seconds)


class RabbitConnection:
    """One identity's connection: the ``Broker`` port. Made by :func:`connect`."""

    def __init__(self, address: BrokerAddress, heartbeat_seconds: int) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._pending: set[Future[Any]] = set()
        self._consumers: list[RabbitConsumer] = []
        self._publishing = threading.Lock()
        self._publisher = Publisher(self)
        self._blocked: str | None = None
        self._ended: BaseException | None = None
        self._opened: Future[None] = Future()
        self._pending.add(self._opened)
        self._sockets = Sockets()
        self._connection: pika.SelectConnection
        self._thread = threading.Thread(
            target=self._run,
            args=(_parameters(address, heartbeat_seconds),),
            name="rabbitmq",
            daemon=True,
        )
        self._thread.start()
        try:
            self._opened.result(CONNECT_SECONDS)
        except TimeoutError:
            self._abort()
            raise BrokerUnavailableError(
                f"broker {address}: no answer within {CONNECT_SECONDS:.0f} s; check broker.url and "
                "the network"
            ) from None

    @property
    def address(self) -> BrokerAddress:
        """Where this connection leads."""
        return self._address

    @property
    def version(self) -> str:
        """The server's own word for its version."""
        properties = self._connection.server_properties or {}
        return str(properties.get("version", "unknown"))

    @property
    def identity(self) -> str:
        """The account this connection was made with."""
        return self._address.account

    def declare(self, topology: Topology) -> None:
        """Make exchanges, queues and bindings, in this order; what precedes a failing one stays.

        A queue that an earlier release declared with other limits is made anew if it may be.
        """
        remade = {queue.name for queue in topology.queues if queue.remade}
        while True:
            try:
                self._on_own_channel(functools.partial(declare, topology=topology))
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
        """Delete and declare anew the queues that answer nobody: see ``reviving``; their names."""
        return revive(self, topology)

    def again(self) -> RabbitConnection:
        """One more connection of the same identity."""
        return RabbitConnection(self._address, HEARTBEAT_SECONDS)

    def delete(self, queue: str) -> None:
        """Delete a queue with all that is in it. Repeatable."""
        self._on_own_channel(lambda channel, done: channel.queue_delete(queue, callback=done))

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish all and wait for the broker's confirms of the whole batch.

        Sizes are checked first; one message that is too large stops the whole batch. Raises
        UnroutableError, AccessRefusedError, BrokerError, BrokerUnavailableError; then any message
        of the batch may have arrived.
        """
        self._check_open()
        for message in messages:
            if len(message.body) > MAX_MESSAGE_BYTES:
                raise BrokerError(
                    f"{message.routing_key}: expected at most {MAX_MESSAGE_BYTES} bytes, "
                    f"got {len(message.body)}; put large data into the store"
                )
        if messages:
            subject = functools.partial(spoken, messages)
            failpoint("publish.before", subject)
            with self._publishing:
                self._ask(lambda future: self._publisher.send(messages, future))
            failpoint("publish.confirmed", subject)

    def consume(self, queue: str) -> RabbitConsumer:
        """Subscribe. Raises AccessRefusedError when this identity may not read the queue."""
        consumer = RabbitConsumer(self, queue)
        with self._lock:
            self._consumers.append(consumer)  # before it is asked for: the end may come meanwhile
        self._ask(consumer.subscribe)
        return consumer

    def depth(self, queue: str) -> int:
        """Messages ready in the queue. Needs no right on any RabbitMQ."""
        return self.count(queue)[0]

    def count(self, queue: str) -> tuple[int, int]:
        """Messages ready in the queue, and how many consumers it has."""
        found: Any = self._on_own_channel(
            lambda channel, done: channel.queue_declare(queue, passive=True, callback=done)
        )
        return found.method.message_count, found.method.consumer_count

    def consumers(self, queues: Sequence[str]) -> dict[str, int]:
        """How many consumers each of these queues has. Raises BrokerError when one is missing.

        On one channel: a federation of a thousand sites asks for all of them every few seconds.
        """
        found: dict[str, int] = {}

        def start(channel: Channel, done: Callable[[object], None]) -> None:
            def take(frame: Any) -> None:
                found[frame.method.queue] = frame.method.consumer_count
                if len(found) == len(wanted):
                    done(None)

            for queue in wanted:
                channel.queue_declare(queue, passive=True, callback=take)

        wanted = set(queues)
        if wanted:
            self._on_own_channel(start)
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

        self._on_own_channel(start)
        return found

    def purge(self, queue: str) -> int:
        """Drop all messages that are ready; how many they were."""
        found: Any = self._on_own_channel(
            lambda channel, done: channel.queue_purge(queue, callback=done)
        )
        count: int = found.method.message_count
        return count

    def take_from(self, queue: str) -> Taker:
        """Take messages one by one and settle each, or let it go back. Close it when done."""
        return Taker(self, queue)

    def publish_as(self, sender: str, message: Message) -> None:
        """Publish one message in ``sender``'s name and wait for the confirm.

        Raises AccessRefusedError unless ``sender`` is this account or it may impersonate, else as
        ``publish``.
        """
        send = functools.partial(send_as, message=message, sender=sender)
        try:
            decided = self._on_own_channel(send)
        except BrokerError as error:
            raise not_in_that_name(error, self.identity, sender) from None
        check_sent(decided, message)

    def close(self) -> None:
        """End the connection and its consumers. Repeatable."""
        if self._ended is None:
            self._hand_over(self._close)
            self._thread.join(CLOSE_SECONDS)
            self._abort()
        self._thread.join(CLOSE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Other threads' side -----------------------------------------------------------------------

    def ask(self, start: Callable[[Future[Answer]], None]) -> Answer:
        """For this connection's consumers: see ``_ask``."""
        return self._ask(start)

    def hand_over(self, call: Callable[[], None]) -> None:
        """Run ``call`` in the I/O thread, some time. Raises BrokerUnavailableError."""
        self._check_open()
        self._hand_over(call)

    def new_channel(self, on_open: Callable[[Channel], None]) -> Channel:
        """In the I/O thread: a channel for one consumer."""
        return self._connection.channel(on_open_callback=on_open)

    def _hand_over(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(Exception):  # its loop has just ended; _ended says so
            self._sockets.loop.add_callback_threadsafe(call)

    def _ask(self, start: Callable[[Future[Answer]], None]) -> Answer:
        """Run ``start`` in the I/O thread and wait until somebody answers its future."""
        future: Future[Answer] = Future()
        with self._lock:
            self._check_open()
            self._pending.add(future)
        self._hand_over(lambda: guarded(future, self._address, lambda: start(future)))
        try:
            return future.result(ANSWER_SECONDS)
        except TimeoutError:
            # What was asked may still happen; on a new connection it cannot be mixed up.
            blocked = self._blocked
            self._abort()
            if blocked:
                raise BrokerUnavailableError(
                    f"broker {self._address}: takes no messages: {blocked}; free memory or disk "
                    "there"
                ) from None
            raise BrokerSilentError(
                f"broker {self._address}: no answer within {ANSWER_SECONDS:.0f} s"
            ) from None
        finally:
            with self._lock:
                self._pending.discard(future)

    def _on_own_channel(self, start: Callable[[Channel, Callable[[object], None]], None]) -> object:
        """``start(channel, done)`` on a channel of its own, which an error may close."""

        def open_channel(future: Future[object]) -> None:
            results: list[object] = []

            def done(result: object) -> None:
                # Answered once it is closed: what it held is back in its queue by then.
                results.append(result)
                if channel.is_open:
                    channel.close()

            channel = self._connection.channel(
                on_open_callback=lambda opened: guarded(
                    future, self._address, lambda: start(opened, done)
                )
            )

            def on_close(_channel: object, reason: BaseException) -> None:
                if results:
                    answer(future, results[0])
                else:
                    fail(future, translate(reason, self._address))

            channel.add_on_close_callback(on_close)

        return self._ask(open_channel)

    def _check_open(self) -> None:
        if self._ended is not None:
            raise BrokerUnavailableError(
                f"{self.identity}: the connection to the broker is closed"
                f"{because(self._ended)}; connect again"
            )

    def _abort(self) -> None:
        """End without the other side."""
        self._end(pika.exceptions.ConnectionClosedByClient(200, "given up"))
        self._hand_over(self._stop)

    # The I/O thread's side ---------------------------------------------------------------------

    def _run(self, parameters: pika.ConnectionParameters) -> None:
        try:
            self._connection = pika.SelectConnection(
                parameters,
                on_open_callback=self._on_open,
                on_open_error_callback=lambda _, error: self._finish(error),
                on_close_callback=lambda _, reason: self._finish(reason),
                custom_ioloop=self._sockets,
            )
            self._sockets.loop.start()
        except Exception as error:  # noqa: BLE001 - a dead I/O thread must not leave anyone waiting
            self._end(error)
        finally:
            self._sockets.close()

    def _on_open(self, connection: pika.SelectConnection) -> None:
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(self._on_unblocked)
        answer(self._opened, None)

    def _on_blocked(self, _connection: object, frame: Any) -> None:
        self._blocked = f"{frame.method.reason} (its memory or disk alarm)"
        get_logger().warning("broker.blocked", broker=str(self._address), reason=self._blocked)

    def _on_unblocked(self, _connection: object, _frame: object) -> None:
        self._blocked = None
        get_logger().warning("broker.unblocked", broker=str(self._address))

    def _close(self) -> None:
        for consumer in self._consumers:
            consumer.skip_cancel()
        if self._connection.is_open:
            self._connection.close()
        else:
            self._stop()

    def _stop(self) -> None:
        self._sockets.loop.stop()

    def _finish(self, error: BaseException) -> None:
        self._end(error)
        self._stop()

    def _end(self, error: BaseException) -> None:
        with self._lock:
            if self._ended is None:
                self._ended = error
            pending, self._pending = self._pending, set()
        for future in pending:
            fail(future, translate(error, self._address))
        for consumer in self._consumers:
            consumer.end(f"the connection is gone{because(error)}")


def _parameters(address: BrokerAddress, heartbeat_seconds: int) -> pika.ConnectionParameters:
    options = None
    if address.tls:
        try:
            context = ssl.create_default_context(
                cafile=None if address.ca_file is None else str(address.ca_file)
            )
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"broker.ca_file: expected certificates (PEM) in {address.ca_file}, got: {error}"
            ) from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        options = pika.SSLOptions(context, address.host)
    return pika.ConnectionParameters(
        host=address.host,
        port=address.port,
        virtual_host=address.vhost,
        credentials=pika.PlainCredentials(address.account, address.password),
        heartbeat=heartbeat_seconds,
        connection_attempts=1,
        socket_timeout=CONNECT_SECONDS,
        stack_timeout=CONNECT_SECONDS,
        ssl_options=options,
        client_properties={"connection_name": f"gradualdiff {address.account}"},
    )
