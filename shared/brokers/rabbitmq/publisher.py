"""Publishing: one batch at a time, persistent, mandatory, confirmed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pika

from shared.brokers.rabbitmq.futures import answer, fail
from shared.brokers.rabbitmq.translation import translate
from shared.errors import MessageRejectedError, UnroutableError
from shared.failpoints import failpoint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from pika.channel import Channel

    from shared.brokers.port import Message
    from shared.brokers.rabbitmq.io_thread import IoThread


class Publisher:
    """The publishing channel of one connection; all of it runs in the I/O thread."""

    def __init__(self, io: IoThread) -> None:
        self._io = io
        self._channel: Channel | None = None
        self._batch: _Batch | None = None
        self._last_tag = 0

    def send(self, messages: Sequence[Message], future: Future[None]) -> None:
        """Publish one batch, which answers ``future``; the next may come after that."""
        self._batch = _Batch(messages, future)
        if self._channel is not None and self._channel.is_open:
            self._send_on(self._channel)
            return

        def on_open(channel: Channel) -> None:
            self._last_tag = 0
            channel.add_on_return_callback(self._on_return)
            channel.confirm_delivery(self._on_confirm, callback=lambda _: self._send_on(channel))

        # An error of a message closes the channel: the next batch has a new one.
        self._channel = self._io.new_channel(on_open)
        self._channel.add_on_close_callback(self._on_closed)

    def _send_on(self, channel: Channel) -> None:
        assert self._batch is not None  # publishes come one batch at a time
        tags = range(self._last_tag + 1, self._last_tag + 1 + len(self._batch.messages))
        self._batch.outstanding, self._last_tag = set(tags), tags[-1]
        for message in self._batch.messages:
            if not channel.is_open:
                return
            expires = message.expires_seconds
            channel.basic_publish(
                message.exchange,
                message.routing_key,
                bytes(message.body),
                pika.BasicProperties(
                    delivery_mode=2,
                    user_id=self._io.address.account,
                    expiration=None if expires is None else str(max(1, round(expires * 1000))),
                ),
                mandatory=True,
            )

    def _on_return(self, _channel: object, method: Any, _properties: object, _body: bytes) -> None:
        if self._batch is not None:
            self._batch.returned.append(method.routing_key)

    def _on_confirm(self, frame: Any) -> None:
        batch = self._batch
        if batch is None:
            return
        tag = frame.method.delivery_tag
        batch.rejected |= isinstance(frame.method, pika.spec.Basic.Nack)
        if frame.method.multiple:
            batch.outstanding = {other for other in batch.outstanding if other > tag}
        else:
            batch.outstanding.discard(tag)
        if not batch.outstanding:
            # The broker has all of it, and whoever published does not know that yet.
            for word in dict.fromkeys(message.event for message in batch.messages):
                failpoint("publish.sent", word)
            self._batch = None
            batch.finish()

    def _on_closed(self, _channel: object, reason: BaseException) -> None:
        batch, self._batch = self._batch, None
        if batch is not None:
            fail(batch.future, translate(reason, self._io.address))


@dataclass
class _Batch:
    """Messages published together, until the broker has confirmed each."""

    messages: Sequence[Message]
    future: Future[None]
    returned: list[str] = field(default_factory=list)
    outstanding: set[int] = field(default_factory=set)
    rejected: bool = False

    def finish(self) -> None:
        if self.returned:
            keys = ", ".join(sorted(set(self.returned)))
            error = UnroutableError(
                f"{keys}: no queue is bound for this key; its reader has to be declared first"
            )
            fail(self.future, error)
        elif self.rejected:
            full = "the broker did not take a message: a queue is full, or it cannot store now"
            fail(self.future, MessageRejectedError(full))
        else:
            answer(self.future, None)
