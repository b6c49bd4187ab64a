"""An event as a message of the broker: its bytes, and the exchange and key that take it there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared import topology
from shared.brokers.port import MAX_MESSAGE_BYTES, Message
from shared.errors import DecodeError
from shared.protocol import wire
from shared.protocol.events import Event, MessageRefused, SiteOnline
from shared.trust.seal import seal

if TYPE_CHECKING:
    from shared.trust.keys import SigningKey


def to_site(
    site: str, event: Event, now: float, key: SigningKey | None = None, head: str | None = None
) -> Message:
    """From the coordinator to one site's queue, signed by ``key`` if there is one.

    ``head``: the newest link of the run's records, signed with it.
    """
    body = wire.encode(event, now)
    if key is not None:
        body = _sealed(body, topology.COORDINATOR, f"site:{site}", key, head)
    return _message(topology.SITES_EXCHANGE, site, event, body)


def to_coordinator(
    sender: str,
    event: Event,
    now: float,
    expires_seconds: float | None = None,
    key: SigningKey | None = None,
) -> Message:
    """To the coordinator of the event's run. A site that comes online speaks to every run."""
    body = wire.encode(event, now)
    if key is not None:
        body = _sealed(body, sender, recipient_of(event), key)
    routing_key = topology.event_key(_run_of(event), sender, event.word)
    return _message(topology.EVENTS_EXCHANGE, routing_key, event, body, expires_seconds)


def to_refused(event: MessageRefused, now: float) -> Message:
    """To the queue of what could not be used, where people look."""
    body = wire.encode(event, now)
    return _message(topology.REFUSED_EXCHANGE, topology.REFUSED_KEY, event, body)


def recipient_of(event: Event) -> str:
    """For whom an event to a coordinator is signed: its run, or any."""
    return f"run:{_run_of(event)}"


def _run_of(event: Event) -> str:
    run = None if isinstance(event, SiteOnline) else getattr(event, "run", None)
    return run or topology.ANY_RUN


def _sealed(body: bytes, sender: str, to: str, key: SigningKey, head: str | None = None) -> bytes:
    data = seal(body, sender, to, key, head)
    if len(data) > MAX_MESSAGE_BYTES:
        raise DecodeError(
            f"expected at most {MAX_MESSAGE_BYTES} bytes with the signature, got {len(data)}; "
            "large data belongs into the store"
        )
    return data


def _message(
    exchange: str,
    routing_key: str,
    event: Event,
    body: bytes,
    expires_seconds: float | None = None,
) -> Message:
    return Message(exchange, routing_key, body, expires_seconds, type(event).__name__)
