"""Taking messages off a queue one by one, and publishing in another account's name.

For people's tools, not for roles: a role consumes. What was taken and not settled goes back to its
place when the channel ends, however it ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import pika

from shared.brokers.rabbitmq.decoding import as_text
from shared.brokers.rabbitmq.futures import answer, fail
from shared.brokers.rabbitmq.translation import translate
from shared.errors import AccessRefusedError, BrokerError, BrokerUnavailableError, UnroutableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from pika.channel import Channel

    from shared.brokers.port import Message
    from shared.brokers.rabbitmq.io_thread import IoThread


@dataclass(frozen=True)
class Taken:
    """A message that is held until it is settled or its taker is closed."""

    routing_key: str
    sender: str | None
    body: bytes
    tag: int


class Taker:
    """Takes from one queue on a channel of its own; a context manager.

    A taken message is not taken again by the same taker, so it sees each one once.
    """

    def __init__(self, io: IoThread, queue: str) -> None:
        self._io = io
        self._queue = queue
        self._asked: Future[Any] | None = None
        self._channel: Channel | None = None
        io.ask(self._open)

    def take(self) -> Taken | None:
        """The next message, None when there is no more. Raises AccessRefusedError, BrokerError."""
        taken: Taken | None = self._io.ask(self._get)
        return taken

    def settle(self, taken: Taken) -> None:
        """Take it off the queue for good."""
        channel = self._channel
        assert channel is not None  # it took this
        self._io.hand_over(lambda: channel.basic_ack(taken.tag) if channel.is_open else None)

    def close(self) -> None:
        """Give back what was not settled. What was settled before is off the queue by then."""
        channel, self._channel = self._channel, None

        def end(future: Future[None]) -> None:
            if channel is None or not channel.is_open:
                answer(future, None)
                return
            channel.add_on_close_callback(lambda *_: answer(future, None))
            channel.close()

        self._io.ask(end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # The I/O thread's side ---------------------------------------------------------------------

    def _open(self, future: Future[None]) -> None:
        def on_open(channel: Channel) -> None:
            channel.add_callback(self._on_empty, [pika.spec.Basic.GetEmpty], one_shot=False)
            answer(future, None)

        def on_close(_channel: object, reason: BaseException) -> None:
            error = translate(reason, self._io.address)
            for waiting in (future, self._asked):
                if waiting is not None:
                    fail(waiting, error)

        self._channel = self._io.new_channel(on_open)
        self._channel.add_on_close_callback(on_close)

    def _get(self, future: Future[Taken | None]) -> None:
        channel = self._channel
        if channel is None or not channel.is_open:
            raise BrokerUnavailableError(f"{self._queue}: the channel is closed; begin again")
        self._asked = future
        channel.basic_get(self._queue, self._on_message)

    def _on_message(self, _channel: object, method: Any, properties: Any, body: bytes) -> None:
        assert self._asked is not None  # it asked
        taken = Taken(as_text(method.routing_key), properties.user_id, body, method.delivery_tag)
        answer(self._asked, taken)

    def _on_empty(self, _frame: object) -> None:
        assert self._asked is not None  # it asked
        answer(self._asked, None)


def send_as(
    channel: Channel, done: Callable[[object], None], message: Message, sender: str
) -> None:
    """Publish with ``sender`` as ``user_id``; ``done`` hears the frame that decided.

    None for confirmed, Basic.Return for no queue, Basic.Nack for not stored.
    """
    returned: list[object] = []

    def on_confirm(frame: Any) -> None:
        nacked = isinstance(frame.method, pika.spec.Basic.Nack)
        done(returned[0] if returned else frame.method if nacked else None)

    def publish(_frame: object) -> None:
        channel.basic_publish(
            message.exchange,
            message.routing_key,
            message.body,
            pika.BasicProperties(delivery_mode=2, user_id=sender),
            mandatory=True,
        )

    channel.add_on_return_callback(lambda _channel, method, *_: returned.append(method))
    channel.confirm_delivery(on_confirm, callback=publish)


def check_sent(decided: object, message: Message) -> None:
    """Raise UnroutableError or BrokerUnavailableError unless the message was confirmed."""
    if isinstance(decided, pika.spec.Basic.Return):
        raise UnroutableError(
            f"{message.routing_key}: no queue is bound for this key; its reader has to be "
            "declared first"
        )
    if decided is not None:
        raise BrokerUnavailableError("the broker could not store a message")


def not_in_that_name(error: BrokerError, account: str, sender: str) -> BrokerError:
    """RabbitMQ answers 406 to a ``user_id`` that is not the account's own."""
    if "user_id" not in str(error):
        return error
    return AccessRefusedError(
        f"{account} may not publish in the name of {sender}; for that its account needs the tag "
        "impersonator on the broker"
    )
