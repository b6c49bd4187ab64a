"""Who watches an embedded federation: what is told of it while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from gradualdiff.events import RunMoved
    from participant.learner.port import Progress as Step


class Display(Protocol):
    """A context manager: what it shows ends with it."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...
    def report(self, site: str, round_number: int | None, step: Step) -> None:
        """A participant moved on in one piece of work."""

    def moved(self, event: RunMoved) -> None:
        """The coordinator learnt something."""

    def say(self, text: str) -> None:
        """Something larger begins."""

    def converted(self, done: int, total: int) -> None:
        """The base model's conversion moved on."""
