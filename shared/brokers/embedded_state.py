"""What the embedded broker knows: exchanges, queues, bindings and waiting messages. Time is told.

A queue does as a RabbitMQ quorum queue does: a message that comes back stands at the head again
with a higher attempt, is dropped once it came back more often than the delivery limit, and expires
only while it waits. Beyond ``max_length`` waiting messages the oldest is dropped, or the newest is
refused. Bytes are not counted: all of it is in this process's own memory.

No lock, no clock, no identity's rights: those are in :mod:`shared.brokers.embedded`.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from shared.errors import BrokerError, MessageRejectedError, QueueMissingError, UnroutableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.brokers.port import Message
    from shared.topology import Binding, Exchange, Queue, Topology


@dataclass(frozen=True)
class StoredMessage:
    """A message in one queue. ``expires_at``: on the broker's clock; None never expires."""

    sequence: int
    routing_key: str
    body: bytes
    sender: str
    expires_at: float | None
    attempt: int = 1


@dataclass(eq=False)
class QueueState:
    """The waiting messages, oldest first, and the subscribers in the order they came."""

    spec: Queue
    waiting: deque[StoredMessage] = field(default_factory=deque)
    subscribers: list[object] = field(default_factory=list)

    def append(self, message: StoredMessage, now: float) -> None:
        """Put a new message at the end."""
        self.waiting.append(message)
        self._shorten(now)

    def give_back(self, message: StoredMessage, now: float) -> bool:
        """Put a delivered message back at the head; False if it came back too often for that."""
        limit = self.spec.delivery_limit
        if limit is not None and message.attempt > limit:
            return False
        self.waiting.appendleft(replace(message, attempt=message.attempt + 1))
        self._shorten(now)
        return True

    def depth(self, now: float) -> int:
        """Messages that wait and have not expired at ``now``."""
        self._expire(now)
        return len(self.waiting)

    def is_full(self, now: float) -> bool:
        """Whether it takes no new message at ``now``."""
        limit = self.spec.max_length
        return self.spec.refuses and limit is not None and self.depth(now) >= limit

    def feeds(self, subscriber: object, now: float) -> bool:
        """Whether ``subscriber`` would be given a message at ``now``."""
        if not self.depth(now):
            return False
        return not self.spec.single_active_consumer or self.subscribers[0] is subscriber

    def _expire(self, now: float) -> None:
        if any(_is_over(message, now) for message in self.waiting):
            self.waiting = deque(m for m in self.waiting if not _is_over(m, now))

    def _shorten(self, now: float) -> None:
        limit = self.spec.max_length
        if limit is None or self.spec.refuses or len(self.waiting) <= limit:
            return
        self._expire(now)
        while len(self.waiting) > limit:
            self.waiting.popleft()


class BrokerState:
    """Names to exchanges and queues, and which key leads where."""

    def __init__(self) -> None:
        self._exchanges: dict[str, Exchange] = {}
        self._queues: dict[str, QueueState] = {}
        self._bindings: dict[Binding, None] = {}
        self._sequence: Iterator[int] = itertools.count()

    def declare(self, topology: Topology) -> None:
        """Make what is not there yet; what precedes a failing part stays. Raises BrokerError."""
        for exchange in topology.exchanges:
            _check_same("exchange", self._exchanges.setdefault(exchange.name, exchange), exchange)
        for queue in topology.queues:
            state = self._queues.setdefault(queue.name, QueueState(queue))
            _check_same("queue", state.spec, queue)
        for binding in topology.bindings:
            self.exchange(binding.exchange)
            self.queue(binding.queue)
            self._bindings[binding] = None

    def store(self, message: Message, sender: str, now: float) -> None:
        """Put a message into every queue its key is bound to.

        Raises UnroutableError, and MessageRejectedError if one of them is full.
        """
        exchange = self.exchange(message.exchange)
        # A dict and not a set: one copy per queue however many bindings match, in a fixed order.
        names = {
            binding.queue: None
            for binding in self._bindings
            if binding.exchange == exchange.name
            and _takes(exchange, binding.routing_key, message.routing_key)
        }
        if not names:
            raise UnroutableError(
                f"{message.routing_key}: no queue is bound to {exchange.name} for this key; "
                "its reader has to be declared first"
            )
        expires_at = None if message.expires_seconds is None else now + message.expires_seconds
        # By way of memoryview: what is not bytes is a TypeError, and a bytearray is copied.
        body = memoryview(message.body).tobytes()
        full = {name for name in names if self._queues[name].is_full(now)}
        for name in (name for name in names if name not in full):
            stored = StoredMessage(
                next(self._sequence), message.routing_key, body, sender, expires_at
            )
            self._queues[name].append(stored, now)
        if full:
            raise MessageRejectedError(
                "the broker did not take a message: a queue is full, or it cannot store now"
            )

    def delete(self, name: str) -> None:
        """Delete a queue with all that is in it. Repeatable."""
        self._queues.pop(name, None)
        self._bindings = {one: None for one in self._bindings if one.queue != name}

    def exchange(self, name: str) -> Exchange:
        """The exchange of this name. Raises BrokerError."""
        if name not in self._exchanges:
            raise BrokerError(f"exchange {name}: does not exist; declare the topology first")
        return self._exchanges[name]

    def queue(self, name: str) -> QueueState:
        """The queue of this name. Raises BrokerError."""
        if name not in self._queues:
            raise QueueMissingError(f"queue {name}: does not exist; declare the topology first")
        return self._queues[name]


def topic_matches(pattern: str, routing_key: str) -> bool:
    """Whether a topic binding takes this key: ``*`` is one word, ``#`` any number of them."""
    return _words_match(_words(pattern), _words(routing_key))


def _takes(exchange: Exchange, pattern: str, routing_key: str) -> bool:
    if exchange.kind == "topic":
        return topic_matches(pattern, routing_key)
    return pattern == routing_key


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(".")) if text else ()


def _words_match(pattern: tuple[str, ...], words: tuple[str, ...]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_words_match(pattern[1:], words[skip:]) for skip in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _words_match(pattern[1:], words[1:])


def _is_over(message: StoredMessage, now: float) -> bool:
    return message.expires_at is not None and now >= message.expires_at


def _check_same(what: str, there: Exchange | Queue, asked: Exchange | Queue) -> None:
    for item in fields(there):
        old, new = getattr(there, item.name), getattr(asked, item.name)
        if old != new:
            raise BrokerError(
                f"{what} {there.name}: {item.name}: was declared with {old!r}, asked for {new!r}; "
                "delete it on the broker or ask for what is there"
            )
