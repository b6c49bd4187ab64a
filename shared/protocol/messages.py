"""An event as a message of the broker: its bytes, and the exchange and key that take it there."""

from __future__ import annotations

from shared import topology
from shared.brokers.port import Message
from shared.protocol import wire
from shared.protocol.events import Event, MessageRefused, SiteOnline


def to_site(site: str, event: Event, now: float) -> Message:
    """From the coordinator to one site's queue."""
    return Message(topology.SITES_EXCHANGE, site, wire.encode(event, now))


def to_coordinator(
    sender: str, event: Event, now: float, expires_seconds: float | None = None
) -> Message:
    """To the coordinator of the event's run. A site that comes online speaks to every run."""
    run = None if isinstance(event, SiteOnline) else getattr(event, "run", None)
    key = topology.event_key(run or topology.ANY_RUN, sender, event.word)
    return Message(topology.EVENTS_EXCHANGE, key, wire.encode(event, now), expires_seconds)


def to_refused(event: MessageRefused, now: float) -> Message:
    """To the queue of what could not be used, where people look."""
    return Message(topology.REFUSED_EXCHANGE, topology.REFUSED_KEY, wire.encode(event, now))
