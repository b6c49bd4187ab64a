"""Who a site is and what it works with: the values that its participant is built from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from shared.config import AcceptSection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from participant.learner.port import Learner, Progress
    from participant.workspace import Workspace
    from shared.brokers.port import Message
    from shared.stores.port import Transfer
    from shared.trust.keys import PublicKey, SigningKey


def _ignore(site: str, round_number: int | None, progress: Progress) -> None:
    """The default for ``report``: nobody watches."""


class Publishing(Protocol):
    """The part of a broker's connection that work needs; the listening side has the rest."""

    def publish(self, messages: Sequence[Message]) -> None:
        """See ``Broker.publish``."""


@dataclass(frozen=True)
class Trust:
    """``key``: what this site signs with; None: nothing is signed.

    ``coordinator``: the key whose owner alone is heard; None: the broker's word for it is enough.
    """

    key: SigningKey | None = None
    coordinator: PublicKey | None = None


NOBODY_SIGNS = Trust()


@dataclass(frozen=True)
class Site:
    """``report(site, round, progress)`` feeds a display; ``refused(run)`` counts useless updates.

    ``accept``: what this site takes part in; None where coordinator and site are one owner's.
    """

    name: str
    outbox: Publishing
    transfer: Transfer
    workspace: Workspace
    learner: Learner
    clock: Callable[[], float]
    accept: AcceptSection | None = field(default_factory=AcceptSection)
    should_stop: Callable[[], bool] = lambda: False
    report: Callable[[str, int | None, Progress], None] = _ignore
    refused: Callable[[str], None] = lambda _run: None
    trust: Trust = NOBODY_SIGNS
