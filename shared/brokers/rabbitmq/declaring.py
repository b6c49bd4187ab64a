"""A topology on a real broker: exchanges, queues with their limits, bindings."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

from shared.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pika.channel import Channel

    from shared.topology import Binding, Exchange, Queue

    Done = Callable[[object], None]

Some = TypeVar("Some")

MOST_AT_ONCE = 500  # queues: a broker makes a few hundred in the time that one question has


def parts(queues: Sequence[Some]) -> Iterator[Sequence[Some]]:
    """The same in several sequences, each for one question."""
    for start in range(0, len(queues), MOST_AT_ONCE):
        yield queues[start : start + MOST_AT_ONCE]


def in_parts(topology: Topology) -> Iterator[Topology]:
    """The same in several topologies of at most ``MOST_AT_ONCE`` queues, each with its bindings."""
    bindings: dict[str, list[Binding]] = {}
    for binding in topology.bindings:
        bindings.setdefault(binding.queue, []).append(binding)
    if topology.exchanges:
        yield Topology(topology.exchanges, (), ())
    for queues in parts(topology.queues):
        bound = [one for queue in queues for one in bindings.pop(queue.name, ())]
        yield Topology((), tuple(queues), tuple(bound))
    if bindings:
        yield Topology((), (), tuple(one for several in bindings.values() for one in several))


def declare(channel: Channel, done: Done, topology: Topology) -> None:
    """Send it all at once; the broker answers in order, and the last answer is the one."""
    steps: list[Callable[[Done], None]] = [
        *(partial(_declare_exchange, channel, item) for item in topology.exchanges),
        *(partial(_declare_queue, channel, item) for item in topology.queues),
        *(partial(_bind, channel, item) for item in topology.bindings),
    ]
    if not steps:
        done(None)
        return
    for step in steps[:-1]:
        step(_nothing)
    steps[-1](done)


def _declare_exchange(channel: Channel, spec: Exchange, done: Done) -> None:
    channel.exchange_declare(spec.name, spec.kind, durable=True, callback=done)


def _declare_queue(channel: Channel, spec: Queue, done: Done) -> None:
    arguments: dict[str, object] = {}
    if spec.delivery_limit is None:
        arguments["x-queue-type"] = "classic"
    else:
        arguments["x-queue-type"] = "quorum"
        arguments["x-delivery-limit"] = spec.delivery_limit
    if spec.max_length is not None:
        arguments["x-max-length"] = spec.max_length
        arguments["x-overflow"] = "reject-publish" if spec.refuses else "drop-head"
    if spec.max_bytes is not None:
        arguments["x-max-length-bytes"] = spec.max_bytes
    if spec.single_active_consumer:
        arguments["x-single-active-consumer"] = True
    channel.queue_declare(spec.name, durable=True, arguments=arguments, callback=done)


def _bind(channel: Channel, spec: Binding, done: Done) -> None:
    channel.queue_bind(spec.queue, spec.exchange, spec.routing_key, callback=done)


def _nothing(_answer: object) -> None:
    """For the answers nobody waits for: the last one comes after them."""
