"""The coordinator's composition root: from config, store and broker to a running role."""

from __future__ import annotations

import itertools
import math
import uuid
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from coordinator.admission import admit
from coordinator.batching import PREFETCH, Outbox
from coordinator.effects import Effects
from coordinator.handlers import Coordinator
from coordinator.intake import Intake
from coordinator.key_book import KeyBook
from coordinator.linking import Links
from shared import topology
from shared.errors import BrokerError, BrokerUnavailableError, MessageRejectedError
from shared.failpoints import failpoint
from shared.log import get_logger
from shared.protocol.dispatch import NO_PATIENCE, Dispatcher, Patience
from shared.protocol.events import CoordinatorTick, MessageRefused
from shared.protocol.hearing import hear_anybody, hear_at_coordinator
from shared.protocol.ledger import Ledger
from shared.protocol.messages import to_coordinator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shared.brokers.port import Broker, Delivery
    from shared.config import FederationConfig
    from shared.stores.port import ObjectStore
    from shared.trust.keys import SigningKey

TICK_SECONDS = 5.0
LOOKED_AT = 500  # queues of awaited sites that are asked about with one tick, in turn


@dataclass(frozen=True)
class CoordinatorRole:
    """A coordinator connected to its queue. ``look``: write down what people may see of it.

    ``tick``: publish the time; whether the queue took it. ``leave``: sweep what sites sent in
    vain and delete its queue, once nothing is to be heard any more: both would only fill up.
    """

    coordinator: Coordinator
    dispatcher: Dispatcher
    tick: Callable[[], bool]
    look: Callable[[], None]
    leave: Callable[[], None]


def build_coordinator(
    config: FederationConfig,
    store: ObjectStore,
    broker: Broker,
    spool: Path,
    clock: Callable[[], float],
    patience: Patience = NO_PATIENCE,
    timer: Callable[[], float] | None = None,
    key: SigningKey | None = None,
) -> CoordinatorRole:
    """Declare the run's queues, record or find the run, subscribe.

    ``timer``: seconds that only grow, for the limit on a site's messages; None: there is none.
    ``key``: what the coordinator signs with; None: nothing is signed, and nobody has to.

    The role starts with its first delivery; with a single active consumer that is when the
    coordinator before it is gone. Raises RunExistsError, ConfigError.
    """
    run = config.run.name
    writer = f"{topology.COORDINATOR}-{uuid.uuid4().hex[:12]}"
    ledger = Ledger(store, run, writer, clock, key)
    intake = Intake(store, spool / run)
    book = KeyBook(store, key.public) if key else None
    links = Links(ledger, book.keys if book else None)
    effects = Effects(config, ledger, Outbox(broker, links.link), intake, clock)
    coordinator = Coordinator(config, ledger, intake, effects, links, clock)
    failpoint("queues.before")
    broker.declare(topology.run_topology(run, config.run.participants))
    failpoint("queues.after")
    coordinator.begin()
    hear = hear_at_coordinator(book.key_of, ledger.birth) if book else hear_anybody
    consumer = broker.consume(topology.coordinator_queue(run), PREFETCH)
    dispatcher = Dispatcher(
        consumer,
        coordinator.handlers,
        partial(admit, run, frozenset(config.run.participants)),
        partial(_refuse, effects, run),
        patience.seconds,
        patience.pause,
        partial(_admits, coordinator, timer),
        coordinator,
        coordinator.most,
        hear,
    )
    return CoordinatorRole(
        coordinator,
        dispatcher,
        tick=partial(_tick, broker, ledger, clock),
        look=partial(_look, broker, coordinator, clock, itertools.count()),
        leave=partial(_leave, broker, intake, run),
    )


def _tick(broker: Broker, ledger: Ledger, clock: Callable[[], float]) -> bool:
    now = clock()
    event = CoordinatorTick(run=ledger.run, writer=ledger.writer, now=now)
    me = topology.COORDINATOR
    try:
        broker.publish([to_coordinator(me, event, now, TICK_SECONDS, ledger.voice)])
    except MessageRejectedError as error:
        if not broker.depth(topology.coordinator_queue(ledger.run)):
            raise  # it is not full, it is broken
        get_logger().warning("tick.rejected", reason=str(error))
        return False
    return True


def _look(
    broker: Broker, coordinator: Coordinator, clock: Callable[[], float], turns: Iterator[int]
) -> None:
    own = topology.coordinator_queue(coordinator.state.config.run.name)
    waiting = coordinator.state.waiting_for
    shares = max(1, math.ceil(len(waiting) / LOOKED_AT))
    queues = {site: topology.site_queue(site) for site in waiting[next(turns) % shares :: shares]}
    try:
        consumers = broker.consumers([own, *queues.values()])
    except BrokerUnavailableError:
        raise
    except BrokerError as error:  # somebody deleted a queue: then nobody can say
        get_logger().debug("consumers.unknown", reason=str(error))
        consumers = {}
    if not consumers.get(own):
        consumers = {}  # RabbitMQ says 0 as well when a queue's leader gives it no answer
    now = clock()
    told = {site: consumers[queue] for site, queue in queues.items() if queue in consumers}
    coordinator.liveness.counted(told, waiting, now)
    coordinator.liveness.write(coordinator.state, now)


def _refuse(effects: Effects, run: str, delivery: Delivery, reason: str) -> None:
    event = MessageRefused(
        run=run,
        queue=delivery.queue,
        routing_key=delivery.routing_key,
        sender=delivery.sender,
        reason=reason,
        data=delivery.body[: topology.REFUSED_BYTES],
    )
    effects.keep_refused(event)


def _leave(broker: Broker, intake: Intake, run: str) -> None:
    # A late word of a site still goes somewhere: the mirror queue drops its oldest.
    failpoint("leave.before")
    intake.arrivals.sweep_run(run)
    failpoint("leave.swept")
    broker.delete(topology.coordinator_queue(run))
    failpoint("leave.after")


def _admits(
    coordinator: Coordinator, timer: Callable[[], float] | None, delivery: Delivery
) -> bool:
    # The broker checks whom a key speaks for, whatever else the message says.
    site = topology.site_of_key(delivery.routing_key)
    if timer is None or site == topology.COORDINATOR:
        return True
    return coordinator.limits.admits(site, timer())
