"""A subscription and its deliveries, under the ``Consumer`` and ``Delivery`` ports."""

from __future__ import annotations

import contextlib
import functools
import math
import queue as arrivals
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from shared.brokers.rabbitmq.decoding import as_text
from shared.brokers.rabbitmq.futures import answer, fail, guarded
from shared.brokers.rabbitmq.translation import translate
from shared.errors import BrokerUnavailableError, StaleDeliveryError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from pika.channel import Channel

    from shared.brokers.port import Delivery
    from shared.brokers.rabbitmq.io_thread import IoThread

_MOST_DELIVERIES = 2**31
_COUNTS = ("x-delivery-count", "x-acquired-count")


class RabbitConsumer:
    """A subscription: the ``Consumer`` port. Made by :meth:`RabbitConnection.consume`."""

    def __init__(self, io: IoThread, queue: str, prefetch: int) -> None:
        self._io = io
        self._queue = queue
        self._prefetch = prefetch
        self._arrived: arrivals.Queue[RabbitDelivery | None] = arrivals.Queue()
        self._channel: Channel | None = None
        self._held: dict[RabbitDelivery, int] = {}  # to its tag, oldest first
        self._lock = threading.Lock()
        self._open = True
        self._why = ""

    def subscribe(self, future: Future[None]) -> None:
        """In the I/O thread: a channel of its own, ``prefetch`` unsettled messages at a time."""

        def on_open(channel: Channel) -> None:
            channel.basic_qos(prefetch_count=self._prefetch, callback=lambda _: begin(channel))

        def begin(channel: Channel) -> None:
            # A queue that was deleted cancels its consumers.
            channel.add_on_cancel_callback(lambda _: self._end("its queue was deleted"))
            guarded(
                future,
                self._io.address,
                lambda: channel.basic_consume(
                    self._queue, self._on_message, callback=lambda _: answer(future, None)
                ),
            )

        def on_close(_channel: object, reason: BaseException) -> None:
            fail(future, translate(reason, self._io.address))
            self._end(str(translate(reason, self._io.address)))

        self._channel = self._io.new_channel(on_open)
        self._channel.add_on_close_callback(on_close)

    def receive(self, timeout_seconds: float = 0.0) -> RabbitDelivery | None:
        """The next delivery, or None when none came in time. Raises BrokerUnavailableError."""
        self._check_open()
        try:
            if timeout_seconds > 0:
                delivery = self._arrived.get(timeout=timeout_seconds)
            else:
                delivery = self._arrived.get_nowait()
        except arrivals.Empty:
            return None
        self._check_open()
        if delivery is not None:
            with self._lock:
                self._held[delivery] = delivery.tag
        return delivery

    def close(self) -> None:
        """End the subscription; an unacknowledged delivery comes again to another consumer."""
        if not self._open:
            return
        self._end("it was closed")
        channel = self._channel
        with contextlib.suppress(BrokerUnavailableError):
            if channel is not None:
                self._io.ask(functools.partial(_close_channel, channel))

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Take them off the queue together. Raises StaleDeliveryError if one was settled."""
        tags, oldest = self._settled(deliveries)
        if tags and max(tags) < oldest:  # nothing that is held lies between them: one frame
            self._tell(lambda channel: channel.basic_ack(max(tags), multiple=True))
        else:
            self._tell(lambda channel: [channel.basic_ack(tag) for tag in tags])

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        """Put them back at the head in the order given. Raises StaleDeliveryError."""
        tags, _ = self._settled(deliveries)
        self._tell(lambda channel: [channel.basic_nack(tag, requeue=True) for tag in tags])

    def _settled(self, deliveries: Sequence[Delivery]) -> tuple[list[int], float]:
        """Their tags, and the lowest of those that stay held. All of them, or an error and none."""
        with self._lock:
            for delivery in deliveries:
                if delivery not in self._held or not self._open:
                    raise StaleDeliveryError(
                        f"{self._queue}: this delivery ({delivery.routing_key}) was acknowledged "
                        "or rejected before, or its connection is closed; receive it again"
                    )
            tags = [self._held.pop(cast("RabbitDelivery", one)) for one in deliveries]
            return tags, min(self._held.values(), default=math.inf)

    def _tell(self, call: Callable[[Channel], object]) -> None:
        channel = self._channel
        assert channel is not None  # it delivered what is settled

        def told() -> None:
            if channel.is_open:
                call(channel)

        try:
            self._io.hand_over(told)
        except BrokerUnavailableError as error:
            raise StaleDeliveryError(f"{self._queue}: {error}") from None

    def skip_cancel(self) -> None:
        """In the I/O thread: the connection is about to be closed."""
        if self._channel is not None:
            skip_cancel(self._channel)

    def end(self, why: str) -> None:
        """The connection is gone."""
        self._end(why)

    def _end(self, why: str) -> None:
        with self._lock:
            if self._open:
                self._open, self._why = False, why
        self._arrived.put(None)  # wakes a waiting receive

    def _check_open(self) -> None:
        if not self._open:
            raise BrokerUnavailableError(
                f"{self._queue}: the subscription is closed: {self._why}; consume again"
            )

    def _on_message(self, _channel: object, method: Any, properties: Any, body: bytes) -> None:
        headers = properties.headers or {}
        # 4.x counts takes that were not given back on purpose in a header of their own.
        came_back = max(_count(headers.get(name)) for name in _COUNTS)
        self._arrived.put(
            RabbitDelivery(
                queue=self._queue,
                routing_key=as_text(method.routing_key),
                body=body,
                sender=properties.user_id,
                attempt=1 + max(came_back, int(method.redelivered)),
                tag=method.delivery_tag,
                consumer=self,
            )
        )


def _count(value: object) -> int:
    """The broker counts in whole numbers; anything else is a sender's, and says nothing."""
    if isinstance(value, int) and 0 <= value < _MOST_DELIVERIES:
        return int(value)  # pika's own kind of whole number too
    return 0


@dataclass(frozen=True, eq=False)
class RabbitDelivery:
    """One message handed to a consumer: the ``Delivery`` port."""

    queue: str
    routing_key: str
    body: bytes
    sender: str | None
    attempt: int
    tag: int
    consumer: RabbitConsumer

    def acknowledge(self) -> None:
        """Take it off the queue. Raises StaleDeliveryError."""
        self.consumer.acknowledge([self])

    def requeue(self) -> None:
        """Put it back at the head of the queue. Raises StaleDeliveryError."""
        self.consumer.requeue([self])


def _close_channel(channel: Channel, future: Future[None]) -> None:
    if channel.is_open:
        channel.add_on_close_callback(lambda *_: answer(future, None))
        skip_cancel(channel)
        channel.close()
    else:
        answer(future, None)


def skip_cancel(channel: Channel) -> None:
    """Let the broker be told of the closing alone.

    pika cancels a channel's consumers first, and then the next message would overtake the one that
    is held.
    """
    channel._cancelled.update(channel._consumers)  # noqa: SLF001 - pika has no other way
