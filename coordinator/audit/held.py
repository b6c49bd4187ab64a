"""A run's records held in memory, to be read as from a store. There is nothing else in it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NoReturn

from shared.errors import ObjectMissingError
from shared.stores.port import ObjectInfo, Spooled

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


class HeldObjects:
    """The reading half of an ``ObjectStore``, over bytes by key. A key is never a path here."""

    def __init__(self, objects: Mapping[str, bytes]) -> None:
        self._objects = dict(sorted(objects.items()))

    def get(self, key: str) -> bytes:
        """The object. Raises ObjectMissingError."""
        try:
            return self._objects[key]
        except KeyError:
            self._miss(key)

    def stat(self, key: str) -> ObjectInfo:
        """Its size. Raises ObjectMissingError."""
        return ObjectInfo(key, len(self.get(key)), "")

    def sha256(self, key: str) -> str:
        """Its digest. Raises ObjectMissingError."""
        return hashlib.sha256(self.get(key)).hexdigest()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All whose key starts with ``prefix``, in order."""
        return (self.stat(key) for key in self._objects if key.startswith(prefix))

    def spool(self, keys: Sequence[str], path: Path) -> Spooled:
        """No tensors are held. Raises ObjectMissingError."""
        del path
        self._miss(keys[0])

    def _miss(self, key: str) -> NoReturn:
        raise ObjectMissingError(f"{key}: is not among the records that are held")
