"""Queues that came back without a leader: found, deleted, declared anew.

A RabbitMQ (seen: 3.10.8) that is killed within about a second of a quorum queue's declaration may
come back with that queue listed and declared without a complaint, and yet nobody leads it: whoever
consumes from it or publishes into it waits for ever. Only deleting it helps. What was in it is told
again from the ledger.
"""

from __future__ import annotations

from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from shared.log import get_logger
from shared.rabbitmq.consumer import skip_cancel
from shared.rabbitmq.futures import answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from pika.channel import Channel

    from shared.rabbitmq.connection import RabbitConnection
    from shared.topology import Topology

PROBE_SECONDS = 10.0  # a healthy queue answers in milliseconds, an election takes a few seconds
PROBES_AT_ONCE = 500  # of the 2,047 channels that a connection may have


def revive(connection: RabbitConnection, topology: Topology) -> tuple[str, ...]:
    """Make anew those of the topology's queues that answer nobody; their names.

    Raises BrokerUnavailableError when the broker as a whole does not answer: then nothing is made.
    """
    suspects = [queue.name for queue in topology.queues if queue.delivery_limit is not None]
    dead: list[str] = []
    for start in range(0, len(suspects), PROBES_AT_ONCE):
        dead += silent(connection, suspects[start : start + PROBES_AT_ONCE], PROBE_SECONDS)
    if not dead:
        return ()
    connection.depth(dead[0])  # answered from the broker's own table: is the line still there?
    for queue in dead:
        get_logger().warning(
            "queue.revived",
            queue=queue,
            reason=f"it gave no answer within {PROBE_SECONDS:.0f} s, as after a kill of the broker "
            "just when it was declared; made anew",
        )
        connection.delete(queue)
    connection.declare(topology)
    return tuple(dead)


def silent(connection: RabbitConnection, queues: list[str], seconds: float) -> list[str]:
    """Those that let nobody consume in that time. What a probe is handed goes back to its place."""
    answers: dict[str, Future[None]] = {queue: Future() for queue in queues}
    for queue, future in answers.items():
        connection.hand_over(_probe(connection, queue, future))
    wait(answers.values(), seconds)
    return [queue for queue, future in answers.items() if not future.done()]


def _probe(connection: RabbitConnection, queue: str, future: Future[None]) -> Callable[[], None]:
    def on_open(channel: Channel) -> None:
        channel.basic_qos(prefetch_count=1, callback=lambda _: consume(channel))

    def consume(channel: Channel) -> None:
        channel.basic_consume(queue, _ignore, callback=lambda _: done(channel))

    def done(channel: Channel) -> None:
        answer(future, None)
        if channel.is_open:
            skip_cancel(channel)
            channel.close()

    def start() -> None:
        # A refusal closes the channel, and is an answer too.
        channel = connection.new_channel(on_open)
        channel.add_on_close_callback(lambda *_: answer(future, None))

    return start


def _ignore(_channel: Channel, _method: Any, _properties: Any, _body: bytes) -> None:
    """Not acknowledged: it goes back when the channel is closed."""
