"""An event as a message of the broker: its bytes, and the exchange and key that take it there."""

from __future__ import annotations

from shared import topology
from shared.brokers.port import Message
from shared.protocol import wire
from shared.protocol.events import Event, MessageRefused, SiteOnline


def to_site(site: str, event: Event, now: float) -> Message:
    """From the coordinator to one site's queue."""
    return _message(topology.SITES_EXCHANGE, site, event, now)


def to_coordinator(
    sender: str, event: Event, now: float, expires_seconds: float | None = None
) -> Message:
    """To the coordinator of the event's run. A site that comes online speaks to every run."""
    run = None if isinstance(event, SiteOnline) else getattr(event, "run", None)
    key = topology.event_key(run or topology.ANY_RUN, sender, event.word)
    return _message(topology.EVENTS_EXCHANGE, key, event, now, expires_seconds)


def to_refused(event: MessageRefused, now: float) -> Message:
    """To the queue of what could not be used, where people look."""
    return _message(topology.REFUSED_EXCHANGE, topology.REFUSED_KEY, event, now)


def _message(
    exchange: str, key: str, event: Event, now: float, expires_seconds: float | None = None
) -> Message:
    name = type(event).__name__
    return Message(exchange, key, wire.encode(event, now), expires_seconds, name)
