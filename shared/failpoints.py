"""Named points between two effects, where a test may kill, freeze or delay this very process.

Nothing in the product arms them: unarmed, a point costs one comparison. ``stage`` is a literal at
the call, so that a test finds every point by reading the code; ``subject`` says of what (a kind of
record, an event's name), or is a function that finds it out once it is asked for. The whole name is
``stage`` or ``stage:subject``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_hook: Callable[[str], None] | None = None


def failpoint(stage: str, subject: str | Callable[[], str] = "") -> None:
    """Say that execution is here. Does nothing unless a hook is armed."""
    if _hook is not None:
        word = subject if isinstance(subject, str) else subject()
        _hook(f"{stage}:{word}" if word else stage)


def arm(hook: Callable[[str], None] | None) -> None:
    """Call ``hook(name)`` at every point from now on, in whatever thread is there; None: disarm."""
    global _hook  # noqa: PLW0603 - one process, one hook
    _hook = hook
