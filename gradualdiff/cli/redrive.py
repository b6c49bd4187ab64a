"""Dead letters back to where they came from.

A message goes back under the account that sent it first, as the broker checked it then, or not at
all: the coordinator trusts that name. This account's own messages can always go back; those of a
site only if this account may impersonate, which RabbitMQ allows by the tag ``impersonator``. What
would only be refused again stays.

Order: published, confirmed, and only then taken off. A crash in between leaves a message in both
places, and every handler takes a message twice without harm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared import topology
from shared.brokers.port import Message
from shared.errors import AccessRefusedError, DecodeError, UnroutableError
from shared.protocol import wire
from shared.protocol.events import Event, MessageRefused, SiteOnline

if TYPE_CHECKING:
    from shared.brokers.rabbitmq import RabbitConnection

_SITE = topology.site_queue("")
_COORDINATOR = topology.coordinator_queue("")


@dataclass(frozen=True)
class Kept:
    """A dead letter that stayed, and what to do about it."""

    type: str | None
    sender: str | None
    queue: str | None
    why: str


@dataclass(frozen=True)
class Redriven:
    """``sent`` went back; the others stayed in the refused queue."""

    sent: int
    kept: list[Kept]


class _StaysError(Exception):
    """A message stays; the text says why."""


def redrive(broker: RabbitConnection) -> Redriven:
    """Send back each message that is in the refused queue now, as far as it can be.

    Raises BrokerError when the broker fails on the way; repeating goes on with what is left.
    """
    return _Redrive(broker).all()


class _Redrive:
    """One pass. ``barred``: this account was told that it may not speak for others."""

    def __init__(self, broker: RabbitConnection) -> None:
        self._broker = broker
        self._barred = False

    def all(self) -> Redriven:
        sent, kept = 0, []
        with self._broker.take_from(topology.REFUSED_QUEUE) as taker:
            # What comes meanwhile can wait, so that this ends.
            for _ in range(self._broker.depth(topology.REFUSED_QUEUE)):
                taken = taker.take()
                if taken is None:
                    break
                stays = self._send(taken.body)
                if stays is None:
                    taker.settle(taken)
                    sent += 1
                else:
                    kept.append(stays)
        return Redriven(sent, kept)

    def _send(self, body: bytes) -> Kept | None:
        """None once it is confirmed; else why it stays."""
        refusal: MessageRefused | None = None
        kind: str | None = None
        try:
            refusal = _refusal(body)
            event = _inner(refusal)
            kind = type(event).__name__
            message, sender = _destination(refusal, event)
            self._publish(message, sender)
        except _StaysError as stays:
            queue, sender_then = (refusal.queue, refusal.sender) if refusal else (None, None)
            return Kept(kind, sender_then, queue, str(stays))
        return None

    def _publish(self, message: Message, sender: str) -> None:
        foreign = sender != self._broker.identity
        if foreign and self._barred:
            raise _StaysError(_only_by(sender, self._broker.identity))
        try:
            self._broker.publish_as(sender, message)
        except UnroutableError as error:
            raise _StaysError(f"{error}; gradualdiff setup declares it") from None
        except AccessRefusedError:
            if not foreign:
                raise
            self._barred = True
            raise _StaysError(_only_by(sender, self._broker.identity)) from None


def _only_by(sender: str, account: str) -> str:
    return (
        f"only {sender} can send it again, since {account} may not speak for others (it lacks the "
        f"tag impersonator): restart the participant of {sender}, and the coordinator sends "
        "everything that is pending again; then purge"
    )


def _refusal(body: bytes) -> MessageRefused:
    try:
        event = wire.decode(body).event
    except DecodeError as error:
        raise _StaysError(f"it is no refusal of ours: {error}; look at it, then purge") from None
    if not isinstance(event, MessageRefused):
        raise _StaysError(f"expected a MessageRefused, got a {type(event).__name__}")
    return event


def _inner(refusal: MessageRefused) -> Event:
    if len(refusal.data) >= topology.REFUSED_BYTES:
        raise _StaysError("it was cut to fit into the refusal; have it sent again by its sender")
    try:
        event = wire.decode(refusal.data).event
    except DecodeError as error:
        raise _StaysError(f"it would only be refused again: {error}") from None
    if isinstance(event, MessageRefused):
        raise _StaysError("it is itself a refusal; there is nothing to send back")
    return event


def _destination(refusal: MessageRefused, event: Event) -> tuple[Message, str]:
    """Where it goes and under which name. The key is built anew, from the checked sender."""
    queue, sender, data = refusal.queue, refusal.sender, refusal.data
    if refusal.reported_by is not None:
        raise _StaysError(
            f"{refusal.reported_by} reported it, and a site's word for a sender counts for "
            f"nothing: restart the participant of {refusal.reported_by}, and the coordinator sends "
            "it again"
        )
    if sender is None:
        raise _StaysError("nobody knows who sent it, so nobody would take it")
    if queue.startswith(_SITE):
        return Message(topology.SITES_EXCHANGE, queue.removeprefix(_SITE), data), sender
    if queue.startswith(_COORDINATOR):
        _check_proven(refusal.routing_key, sender)
        run = queue.removeprefix(_COORDINATOR)
        scope = topology.ANY_RUN if isinstance(event, SiteOnline) else run
        key = topology.event_key(scope, sender, event.word)
        return Message(topology.EVENTS_EXCHANGE, key, data), sender
    raise _StaysError(f"{queue} is no queue of a site or a coordinator")


def _check_proven(routing_key: str | None, sender: str) -> None:
    """A site may publish under its own key only, whatever sender was made of its message."""
    if routing_key is None:
        raise _StaysError(
            f"an earlier release did not note its routing key, so that it came from {sender} is "
            f"not proven: restart the participant of {sender}, and the coordinator sends it again"
        )
    claimed = topology.site_of_key(routing_key)
    if claimed != sender:
        raise _StaysError(
            f"its routing key is that of {claimed or 'nobody'} and its sender {sender}: one of "
            "them is forged, so nobody proved who sent it; look at it, then purge"
        )
