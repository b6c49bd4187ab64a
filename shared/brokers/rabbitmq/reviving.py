"""Queues that came back damaged: found, deleted, declared again.

A RabbitMQ (seen: 3.10.8) that is killed within about a second of a quorum queue's declaration may
come back with that queue listed and declared without a complaint, and yet nobody leads it: whoever
consumes from it or publishes into it waits for ever, or has its whole connection closed with
INTERNAL_ERROR. Only deleting it helps. What was in it is told again from the ledger.

A question that such a queue leaves open may break its connection later, when the queue is deleted.
So what is probed and what is fixed have connections of their own.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import pika.exceptions

from shared.brokers.rabbitmq.consumer import skip_cancel
from shared.brokers.rabbitmq.futures import answer, fail
from shared.brokers.rabbitmq.translation import translate
from shared.errors import BrokerSilentError, BrokerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pika.channel import Channel

    from shared.brokers.rabbitmq.io_thread import IoThread

PROBE_SECONDS = 10.0  # a healthy queue answers in milliseconds, an election takes a few seconds
PROBES_AT_ONCE = 500  # of the 2,047 channels that a connection may have
CONNECTIONS_AT_ONCE = 16


def dead_queues(connect: Callable[[], IoThread], queues: list[str]) -> list[str]:
    """Those that answer nobody. Raises BrokerUnavailableError when the broker as a whole does."""
    dead: list[str] = []
    for start in range(0, len(queues), PROBES_AT_ONCE):
        dead += silent(connect, queues[start : start + PROBES_AT_ONCE], PROBE_SECONDS)
    return dead


def silent(connect: Callable[[], IoThread], queues: list[str], seconds: float) -> list[str]:
    """Those that let nobody consume in that time. What a probe is handed goes back to its place.

    One that breaks the connection takes the answers of all others with it: then each of them is
    asked over a connection of its own.
    """
    dead, broken = _asked(connect, queues, seconds)
    if len(queues) > 1:
        with ThreadPoolExecutor(CONNECTIONS_AT_ONCE) as pool:
            for more in pool.map(lambda queue: silent(connect, [queue], seconds), broken):
                dead += more
        return dead
    for queue, error in broken.items():
        if not isinstance(error, BrokerSilentError):
            raise error
        dead.append(queue)
    return dead


def _asked(
    connect: Callable[[], IoThread], queues: list[str], seconds: float
) -> tuple[list[str], dict[str, BaseException]]:
    """Those that did not answer in time, and those whose connection was lost, with the reason."""
    answers: dict[str, Future[None]] = {queue: Future() for queue in queues}
    with connect() as io:
        for queue, future in answers.items():
            try:
                io.hand_over(_probe(io, queue, future))
            except BrokerUnavailableError as error:
                fail(future, error)
        in_time = wait(answers.values(), seconds).done  # what is open fails when this is closed
    lost = {queue: future.exception() for queue, future in answers.items() if future in in_time}
    silent_ones = [queue for queue, future in answers.items() if future not in in_time]
    return silent_ones, {queue: error for queue, error in lost.items() if error is not None}


def _probe(io: IoThread, queue: str, future: Future[None]) -> Callable[[], None]:
    def on_open(channel: Channel) -> None:
        channel.basic_qos(prefetch_count=1, callback=lambda _: consume(channel))

    def consume(channel: Channel) -> None:
        channel.basic_consume(queue, _ignore, callback=lambda _: done(channel))

    def done(channel: Channel) -> None:
        answer(future, None)
        if channel.is_open:
            skip_cancel(channel)
            channel.close()

    def on_close(_channel: Channel, reason: BaseException) -> None:
        # A refusal closes the channel, and is an answer too.
        if isinstance(reason, pika.exceptions.ChannelClosed):
            answer(future, None)
        else:
            fail(future, translate(reason, io.address))

    def start() -> None:
        io.new_channel(on_open).add_on_close_callback(on_close)

    return start


def _ignore(_channel: Channel, _method: Any, _properties: Any, _body: bytes) -> None:
    """Not acknowledged: it goes back when the channel is closed."""
