"""Words to act on, for two threads: of each kind and run the newest, in the order first noted.

Of words on a delta, the newest for each delta: one that is late may be under way beside the open
round's.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, TypeVar, cast

from shared.backoff import pause_after
from shared.protocol.events import DeltaAnswered, UploadGranted

if TYPE_CHECKING:
    from participant.workspace import Submission
    from shared.protocol.events import Event

LONGEST_DEFER_SECONDS = 60.0

Word = TypeVar("Word", bound="Event")
Key = tuple[type["Event"], str, str]


class Agenda:
    """What was said and is not done yet; volatile on purpose."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._words: dict[Key, Event] = {}
        # Words that failed for now: how often, and the moment before which each waits.
        self._deferred: dict[Key, tuple[int, float]] = {}

    def note(self, word: Event) -> None:
        """Unless a newer word of its kind stands there."""
        key = _key(word)
        with self._changed:
            if not is_overtaken(word, self._words.get(key)):
                self._words[key] = word
            self._changed.notify()

    def take(self, timeout_seconds: float) -> Event | None:
        """The oldest noted, taken off; None when none comes in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._words, timeout_seconds)
            key = next(iter(self._words), None)
            return None if key is None else self._words.pop(key)

    def find(self, kind: type[Word], run: str, sha: str = "") -> Word | None:
        """What stands there of this kind and run, and of this delta where it is about one."""
        return cast("Word | None", self._words.get((kind, run, sha)))

    def drop(self, word: Event) -> None:
        """Take it off, unless a newer one has its place."""
        with self._changed:
            if self._words.get(_key(word)) is word:
                del self._words[_key(word)]

    def done(self, word: Event) -> None:
        """It worked: take it off, and let the next of its kind and run wait for nothing."""
        self._deferred.pop(_key(word), None)
        self.drop(word)

    def defer(self, word: Event) -> float:
        """It failed for now: other words come first; seconds until it is due."""
        failures = self._deferred.get(_key(word), (0, 0.0))[0] + 1
        pause = pause_after(failures, first=1.0, longest=LONGEST_DEFER_SECONDS)
        self._deferred[_key(word)] = (failures, time.monotonic() + pause)
        return pause

    def due(self) -> list[Event]:
        """All that need not wait."""
        now = time.monotonic()
        return [
            word
            for key, word in self._words.items()
            if key not in self._deferred or self._deferred[key][1] <= now
        ]


def _key(word: Event) -> Key:
    delta = word.sha if isinstance(word, UploadGranted | DeltaAnswered) else ""
    return type(word), getattr(word, "run", ""), delta


def is_overtaken(event: Event, other: Event | Submission | None) -> bool:
    """Whether ``event`` is about an earlier round than ``other``, and was said before it.

    A broker may give out a message again or late; a word on an old round must not displace the
    word on the round that is open. Every signed URL expires later than those signed before it, by
    the coordinator's clock: so a run that begins anew under its old name is no old word.
    """
    if other is None:
        return False
    is_earlier = getattr(event, "round", 0) < getattr(other, "round", 0)
    return is_earlier and _expires(event) <= _expires(other)


def _expires(event: Event | Submission) -> float:
    return getattr(event, "expires_at", None) or 0.0
