"""Who may say what to a coordinator: the broker's word for the sender, and this run's list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.errors import ProtocolError
from shared.protocol.events import CoordinatorTick, SiteOnline
from shared.topology import COORDINATOR, site_of_key

if TYPE_CHECKING:
    from shared.brokers.port import Delivery
    from shared.protocol.events import Event


def admit(run: str, participants: frozenset[str], delivery: Delivery, event: Event) -> str:
    """The sender, if it may speak to this run at all. Raises ProtocolError.

    A site that comes online speaks to every run; all else is for one run, from its participants.
    """
    sender = sender_of(delivery, event)
    meant = getattr(event, "run", None)
    if isinstance(event, SiteOnline):
        return sender
    if meant is not None and meant != run:
        raise ProtocolError(f"run: expected {run}, got {meant} from {sender}")
    if sender not in participants and sender != COORDINATOR:
        raise ProtocolError(f"sender: {sender} is not a participant of {run}")
    return sender


def sender_of(delivery: Delivery, event: Event) -> str:
    """The site (or the coordinator itself) behind a delivery. Raises ProtocolError.

    The routing key is free text to the broker; what counts is that it names the account which
    the broker checked.
    """
    claimed = site_of_key(delivery.routing_key)
    if delivery.sender is None or delivery.sender != claimed:
        raise ProtocolError(
            f"sender: expected the account {claimed!r} of the routing key, "
            f"got {delivery.sender or 'none'}"
        )
    if isinstance(event, CoordinatorTick) != (claimed == COORDINATOR):
        raise ProtocolError(f"sender: {claimed} may not send a {type(event).__name__}")
    return claimed
