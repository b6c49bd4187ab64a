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
from shared.protocol.messages import Voice, to_coordinator

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from participant.births import Births
    from participant.site import Site, Trust
    from shared.brokers.port import Broker, Delivery
    from shared.protocol.dispatch import Handler
    from shared.protocol.events import Event
    from shared.protocol.hearing import Hear


@dataclass(frozen=True)
class ParticipantRole:
    """A participant connected to its queue."""

    participant: Participant
    dispatcher: Dispatcher


def build_participant(site: Site, broker: Broker) -> ParticipantRole:
    """Subscribe to the site's queue; nothing is said before ``participant.start()``."""
    participant = Participant(site)
    heard, births = participant.meter.heard, participant.births
    return ParticipantRole(
        participant,
        subscribe(site.name, broker, participant.handlers, site.clock, heard, site.trust, births),
    )


def subscribe(
    name: str,
    broker: Broker,
    handlers: Mapping[type[Event], Handler],
    clock: Callable[[], float],
    heard: Callable[[str | None, int], None] = lambda _run, _size: None,
    trust: Trust = NOBODY_SIGNS,
    births: Births | None = None,
) -> Dispatcher:
    """The loop over the queue of site ``name``. What it cannot use goes back as a refusal.

    ``heard``: told the run and the bytes of each message that came. ``births``: the site's, where
    only its coordinator's key is heard.
    """
    hear: Hear = hear_anybody
    if trust.coordinator is not None:
        assert births is not None  # whoever pins a key has them
        hear = hear_at_site(name, trust.coordinator, births)

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
        voice = None if trust.key is None else Voice(trust.key)  # it names no run
        broker.publish([to_coordinator(name, event, clock(), voice=voice)])

    return Dispatcher(
        broker.consume(topology.site_queue(name)),
        handlers,
        checked,
        refuse,
        hear=hear,
    )
