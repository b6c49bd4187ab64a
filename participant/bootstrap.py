"""A participant's composition root: from broker, transfer and learner to a running role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from participant.handlers import Participant, Site, sender_of
from shared import topology, wire
from shared.broker import Message
from shared.dispatch import Dispatcher
from shared.events import MessageRefused

if TYPE_CHECKING:
    from shared.broker import Delivery


@dataclass(frozen=True)
class ParticipantRole:
    """A participant connected to its queue."""

    participant: Participant
    dispatcher: Dispatcher


def build_participant(site: Site) -> ParticipantRole:
    """Subscribe to the site's queue; nothing is said before ``participant.start()``."""
    participant = Participant(site)

    def refuse(delivery: Delivery, reason: str) -> None:
        event = MessageRefused(
            queue=delivery.queue,
            sender=delivery.sender,
            reason=reason,
            data=delivery.body[: topology.REFUSED_BYTES],
        )
        key = topology.event_key(topology.ANY_RUN, site.name, event.word)
        body = wire.encode(event, site.clock())
        site.broker.publish([Message(topology.EVENTS_EXCHANGE, key, body)])

    consumer = site.broker.consume(topology.site_queue(site.name))
    return ParticipantRole(
        participant, Dispatcher(consumer, participant.handlers, sender_of, refuse)
    )
