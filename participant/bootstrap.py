"""A participant's composition root: from broker, transfer and learner to a running role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from participant.handlers import Participant, sender_of
from participant.site import NOBODY_SIGNS
from shared import topology
from shared.protocol.dispatch import Dispatcher
from shared.protocol.events import MessageRefused
from shared.protocol.hearing import hear_anybody, hear_at_site
from shared.protocol.messages import to_coordinator

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from participant.site import Site, Trust
    from shared.brokers.port import Broker, Delivery
    from shared.protocol.dispatch import Handler
    from shared.protocol.events import Event


@dataclass(frozen=True)
class ParticipantRole:
    """A participant connected to its queue."""

    participant: Participant
    dispatcher: Dispatcher


def build_participant(site: Site, broker: Broker) -> ParticipantRole:
    """Subscribe to the site's queue; nothing is said before ``participant.start()``."""
    participant = Participant(site)
    heard = participant.meter.heard
    return ParticipantRole(
        participant,
        subscribe(site.name, broker, participant.handlers, site.clock, heard, site.trust),
    )


def subscribe(
    name: str,
    broker: Broker,
    handlers: Mapping[type[Event], Handler],
    clock: Callable[[], float],
    heard: Callable[[str | None, int], None] = lambda _run, _size: None,
    trust: Trust = NOBODY_SIGNS,
) -> Dispatcher:
    """The loop over the queue of site ``name``. What it cannot use goes back as a refusal.

    ``heard``: told the run and the bytes of each message that came.
    """
    pinned = trust.coordinator

    def checked(delivery: Delivery, event: Event) -> str:
        heard(getattr(event, "run", None), len(delivery.body))
        return sender_of(delivery, event)

    def refuse(delivery: Delivery, reason: str) -> None:
        event = MessageRefused(
            queue=delivery.queue,
            sender=delivery.sender,
            reason=reason,
            data=delivery.body[: topology.REFUSED_BYTES],
        )
        broker.publish([to_coordinator(name, event, clock(), key=trust.key)])

    return Dispatcher(
        broker.consume(topology.site_queue(name)),
        handlers,
        checked,
        refuse,
        hear=hear_anybody if pinned is None else hear_at_site(name, pinned),
    )
