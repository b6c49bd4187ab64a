"""Faults of the messages: copies of real ones, again and in another order, in the sender's name.

A queue beside the others keeps copies of everything; an account that may speak for others
publishes them again, as a broker may after a crash between a confirm and its arrival.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING

from shared.brokers.port import Message
from shared.brokers.rabbitmq import connect
from shared.credentials import BrokerAddress
from shared.errors import BrokerError, UnroutableError
from shared.topology import EVENTS_EXCHANGE, SITES_EXCHANGE, Binding, Queue, Topology
from tests.chaos.names import PASSWORD, SITES
from tests.chaos.servers import BROKER, alone

if TYPE_CHECKING:
    from shared.brokers.rabbitmq import RabbitConnection
    from tests.chaos.schedule import Fault
    from tests.chaos.stand import Stand

COPIES = "chaos.copies"
KEPT = 60


class Copier:
    """Collects what went over the broker in the present run, and sends some of it again."""

    def __init__(self, stand: Stand) -> None:
        self._stand = stand
        self._seen: deque[tuple[str, Message]] = deque(maxlen=KEPT)
        self._run: str | None = None

    def watch(self) -> None:
        """Copy from now on; repeatable, and needed again after a wipe. Forgets an older run."""
        with self._connection() as broker:
            self._declare(broker)
            self._collect(broker)
        run = self._stand.run.name if self._stand.run else None
        if run != self._run:
            self._seen.clear()
            self._run = run

    def send_again(self, count: int, *, backwards: bool) -> int:
        """Publish ``count`` of the newest again; how many the broker confirmed."""
        with self._connection() as broker:
            self._declare(broker)
            self._collect(broker)
            chosen = list(self._seen)[-count:]
            sent = 0
            for sender, message in reversed(chosen) if backwards else chosen:
                with contextlib.suppress(UnroutableError):
                    broker.publish_as(sender, message)
                    sent += 1
        return sent

    def _connection(self) -> RabbitConnection:
        stand = self._stand
        address = BrokerAddress(
            "127.0.0.1", stand.rabbit.port, stand.vhost, "copier", PASSWORD, tls=False
        )
        return connect(address)

    @staticmethod
    def _declare(broker: RabbitConnection) -> None:
        queue = Queue(COPIES, max_length=200, delivery_limit=None)
        bindings = [Binding(EVENTS_EXCHANGE, COPIES, "#")]
        bindings += [Binding(SITES_EXCHANGE, COPIES, site) for site in SITES]
        broker.declare(Topology((), (queue,), tuple(bindings)))

    def _collect(self, broker: RabbitConnection) -> None:
        with broker.take_from(COPIES) as taker:
            while (taken := taker.take()) is not None:
                taker.settle(taken)
                # The coordinator's keys to sites are the sites' names; all others have dots.
                events = "." in taken.routing_key
                exchange = EVENTS_EXCHANGE if events else SITES_EXCHANGE
                message = Message(exchange, taken.routing_key, taken.body)
                if taken.sender and not taken.routing_key.endswith(".tick"):
                    self._seen.append((taken.sender, message))


def double(stand: Stand, fault: Fault) -> str | None:
    """The newest ones once more, in their order."""
    return _again(stand, 3 + fault.draw % 6, backwards=False)


def reorder(stand: Stand, fault: Fault) -> str | None:
    """Of up to 40, the last first: what is long over comes after what is new."""
    return _again(stand, 10 + fault.draw % 31, backwards=True)


def _again(stand: Stand, count: int, *, backwards: bool) -> str | None:
    with alone(BROKER) as free:
        if not free:
            return None
        try:
            sent = stand.copier.send_again(count, backwards=backwards)
        except BrokerError:
            return None  # it has just been cut, or its exchanges are not declared again yet
        return f"{sent} messages" if sent else None
