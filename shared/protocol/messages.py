"""An event as a message of the broker: its bytes, and the exchange and key that take it there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared import topology
from shared.brokers.port import MAX_MESSAGE_BYTES, Message
from shared.errors import DecodeError
from shared.protocol import wire
from shared.protocol.events import Event, MessageRefused, SiteOnline
from shared.trust.seal import seal

if TYPE_CHECKING:
    from shared.trust.keys import SigningKey


@dataclass(frozen=True)
class Voice:
    """What signs in a run. ``birth``: of the run that is meant; empty as long as none is known."""

    key: SigningKey
    birth: str = ""


def to_site(
    site: str, event: Event, now: float, voice: Voice | None = None, head: str | None = None
) -> Message:
    """From the coordinator to one site's queue, signed by ``voice`` if there is one.

    ``head``: the newest link of the run's records, signed with it.
    """
    body = wire.encode(event, now)
    if voice is not None:
        to = f"site:{site}:{voice.birth}"
        body = _sealed(body, topology.COORDINATOR, to, voice.key, head)
    return _message(topology.SITES_EXCHANGE, site, event, body)


def to_coordinator(
    sender: str,
    event: Event,
    now: float,
    expires_seconds: float | None = None,
    voice: Voice | None = None,
) -> Message:
    """To the coordinator of the event's run. A site that comes online speaks to every run."""
    body = wire.encode(event, now)
    if voice is not None:
        body = _sealed(body, sender, recipient_of(event, voice.birth), voice.key)
    routing_key = topology.event_key(_run_of(event), sender, event.word)
    return _message(topology.EVENTS_EXCHANGE, routing_key, event, body, expires_seconds)


def to_refused(event: MessageRefused, now: float) -> Message:
    """To the queue of what could not be used, where people look."""
    body = wire.encode(event, now)
    return _message(topology.REFUSED_EXCHANGE, topology.REFUSED_KEY, event, body)


def recipient_of(event: Event, birth: str) -> str:
    """For whom an event to a coordinator is signed: its run, or any."""
    run = _run_of(event)
    return f"run:{run}" if run == topology.ANY_RUN else to_run(run, birth)


def to_run(run: str, birth: str) -> str:
    """For a run as what is said in it is signed: by its name, and by its first record's sha256."""
    return f"run:{run}:{birth}"


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
