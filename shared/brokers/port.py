"""The ``Broker`` port: one connection of one identity to a message broker.

What any adapter must do is written as tests in ``tests/contracts/broker_contract.py``. In short:

- A message that was published without an error is in every queue that its key is bound to. No
  queue: UnroutableError. It may be delivered more than once, late and out of order.
- ``publish`` never calls a consumer; a handler runs only when somebody calls ``receive``.
- A delivery that was neither acknowledged nor requeued when its connection ends comes again, with
  a higher ``attempt``. Touching it afterwards is a StaleDeliveryError.
- A single-active-consumer queue feeds the consumer that came first; when that one ends the next
  takes over, without being told.
- ``Delivery.sender`` is the connection's identity as the broker checked it, never the body's word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shared.topology import Topology

MAX_MESSAGE_BYTES = 1_048_576


@dataclass(frozen=True)
class Message:
    """One message to publish. ``expires_seconds``: dropped from its queues after that time.

    ``event``: what its body is called, for failpoints; it does not travel.
    """

    exchange: str
    routing_key: str
    body: bytes
    expires_seconds: float | None = None
    event: str = "unknown"


class Delivery(Protocol):
    """One message handed to a consumer."""

    @property
    def queue(self) -> str:
        """The queue it came from."""

    @property
    def routing_key(self) -> str:
        """The key it was published with."""

    @property
    def body(self) -> bytes:
        """The bytes as published."""

    @property
    def sender(self) -> str | None:
        """The identity that published it, as checked by the broker; None when there is none."""

    @property
    def attempt(self) -> int:
        """1 on first delivery, one more each time it came back."""

    def acknowledge(self) -> None:
        """Take it off the queue. Raises StaleDeliveryError."""

    def requeue(self) -> None:
        """Put it back at the head of the queue. Raises StaleDeliveryError."""


class Consumer(Protocol):
    """A subscription to one queue, with at most ``prefetch`` unsettled deliveries at a time."""

    def receive(self, timeout_seconds: float = 0.0) -> Delivery | None:
        """The next delivery, or None when none came in time. Raises BrokerUnavailableError."""

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Take them off the queue together. Raises StaleDeliveryError if one was settled."""

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        """Put them back at the head in the order given. Raises StaleDeliveryError."""

    def close(self) -> None:
        """End the subscription; an unacknowledged delivery comes again to another consumer."""


class Broker(Protocol):
    """One connection. Raises BrokerUnavailableError from every method once it is closed."""

    @property
    def identity(self) -> str:
        """The account this connection was made with."""

    def declare(self, topology: Topology) -> None:
        """Make exchanges, queues and bindings. Repeatable; other arguments are a BrokerError."""

    def revive(self, topology: Topology) -> tuple[str, ...]:
        """Delete and declare anew the queues that answer nobody; their names. Others stay."""

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish and wait until the broker confirmed all. Raises UnroutableError and others."""

    def consume(self, queue: str, prefetch: int = 1) -> Consumer:
        """Subscribe. Raises AccessRefusedError when this identity may not read the queue."""

    def depth(self, queue: str) -> int:
        """Messages ready in the queue."""

    def consumers(self, queues: Sequence[str]) -> dict[str, int]:
        """How many consumers each of these queues has. Raises BrokerError when one is missing."""

    def delete(self, queue: str) -> None:
        """Delete a queue with all that is in it; its consumers are cancelled. Repeatable."""

    def close(self) -> None:
        """End the connection and its consumers. Repeatable."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...
