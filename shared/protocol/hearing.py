"""Who really said a message: its seal, checked by the key that its sender must have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

from shared.errors import SignatureError
from shared.protocol.events import RunAnnounced
from shared.protocol.messages import recipient_of
from shared.protocol.said import Said

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared.protocol.events import Event
    from shared.protocol.wire import Envelope
    from shared.trust.keys import PublicKey

# (sender, the public key that a seal names) -> that key, if the sender may sign by it now.
KeyOf: TypeAlias = "Callable[[str, str], PublicKey]"
# (a decoded message, its sender) -> the event, with its seal where that was checked.
Hear: TypeAlias = "Callable[[Envelope, str], Event]"


def hear_anybody(envelope: Envelope, _sender: str) -> Event:
    """Where no key is demanded: the broker's word for the sender is all there is."""
    return envelope.event


def hear_at_coordinator(key_of: KeyOf, birth: str) -> Hear:
    """Only what its sender signed for the event's run, born thus. Raises SignatureError."""

    def hear(envelope: Envelope, sender: str) -> Event:
        return _checked(envelope, sender, recipient_of(envelope.event, birth), key_of)

    return hear


def hear_at_site(site: str, coordinator: PublicKey, births: Births) -> Hear:
    """Only what the coordinator's pinned key signed for this site. Raises SignatureError.

    And in the run that it announced last by this name.
    """

    def pinned(sender: str, by: str) -> PublicKey:
        if by != coordinator.text:
            raise SignatureError(
                f"signature: expected one of {coordinator.fingerprint}, the key in "
                f"trust.coordinator, got one by {by} from {sender}; if the coordinator has another "
                "key now, have its fingerprint read out to you before you change that line"
            )
        return coordinator

    def hear(envelope: Envelope, sender: str) -> Event:
        event, seal = envelope.event, envelope.seal
        run, birth = str(getattr(event, "run", "")), births.of(getattr(event, "run", None))
        if seal is not None and isinstance(event, RunAnnounced):
            birth = seal.to.rpartition(":")[2]
        heard = _checked(envelope, sender, f"site:{site}:{birth}", pinned)
        if isinstance(event, RunAnnounced):
            births.announced(run, birth)
        return heard

    return hear


class Births(Protocol):
    """A site's memory of which run it means by a name: see ``Ledger.birth``."""

    def of(self, run: str | None) -> str:
        """The birth of the run that was announced last; empty where none was."""

    def announced(self, run: str, birth: str) -> None:
        """Keep it. Raises SignatureError where another run displaced that one already."""


def _checked(envelope: Envelope, sender: str, to: str, key_of: KeyOf) -> Event:
    found = envelope.seal
    if found is None:
        raise SignatureError(
            f"signature: expected one on a {type(envelope.event).__name__} from {sender}, got "
            "none; what is not signed counts for nothing here: give the sender its key and the "
            "release that signs"
        )
    found.check(sender, to, key_of(sender, found.by))
    return envelope.event.heard(Said.of(found))
