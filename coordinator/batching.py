"""What a batch of messages leaves for its end: calls to make beside each other, words to say.

Handlers run one after another in the order of delivery, so the state is what it would be without
batches. What waits for the store (an object read, a record written, an upload begun) is independent
from one site to the next and runs on a few threads; its results are folded in the order of
delivery, whatever came first.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from shared.brokers.port import Broker, Message

BATCH = 32
PREFETCH = 2 * BATCH  # the next batch comes over the line while one is worked at
BATCH_BYTES = 256 * 1024 * 1024  # of deltas; meanwhile nobody is answered and no time is told
THREADS = 4
MOST_AT_ONCE = 500  # messages: what is published together is all in memory until it is confirmed

Result = TypeVar("Result")
# A message, once it is known which link is the newest.
Draft: TypeAlias = "Callable[[str | None], Message]"


@dataclass(frozen=True)
class Task(Generic[Result]):
    """Of ``site``: ``do`` at any time beside those of others, ``then`` in the order of delivery."""

    site: str
    do: Callable[[], Result]
    then: Callable[[Result], None]


def at_once(calls: Sequence[Callable[[], Result]]) -> list[Future[Result]]:
    """Make the calls beside each other and wait for all; what each gave or raised, in order."""
    if not calls:
        return []
    with ThreadPoolExecutor(min(THREADS, len(calls)), "batch") as pool:
        return [pool.submit(copy_context().run, call) for call in calls]


class Outbox:
    """Messages of a batch, which go out as one confirmed publish, or as several where it is long.

    What thousands of sites are told goes out as it is made: whatever is said was true already.
    ``before``: called before anything goes out; it gives the head that each message is to name.
    """

    def __init__(self, broker: Broker, before: Callable[[], str | None] = lambda: None) -> None:
        self._broker = broker
        self._before = before
        self._drafts: list[Draft] = []

    def put(self, drafts: Iterable[Draft]) -> None:
        """Have them published with the others, after those that are here. Raises as ``flush``."""
        for draft in drafts:
            self._drafts.append(draft)
            if len(self._drafts) >= MOST_AT_ONCE:
                self.flush()

    def flush(self) -> None:
        """Publish and wait for the confirms. Raises as ``Broker.publish``; then they are gone.

        Whoever meets that error connects anew, and a start says all of it again. Also raises what
        ``before`` does; then they stay.
        """
        head = self._before()
        drafts, self._drafts = self._drafts, []
        if drafts:
            self._broker.publish([draft(head) for draft in drafts])
