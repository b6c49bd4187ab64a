"""A run as what is made of it needs it, so that an adapter or a comparison names no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from coordinator.history import History
    from shared.stores.port import ObjectStore


class Recorded(Protocol):
    """``objects``: its store's objects. ``path``: what names that store."""

    name: str
    objects: ObjectStore
    path: Path

    @property
    def history(self) -> History:
        """The records."""
