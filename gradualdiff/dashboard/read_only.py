"""A store that can only be read: all that the dashboard ever holds of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from shared.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from shared.stores.port import ObjectInfo, ObjectStore, PartUploads, Spooled


class ReadOnly:
    """``objects`` behind the port ``ObjectStore``; whatever writes or signs raises StoreError."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    @property
    def account(self) -> str | None:
        """As the store's."""
        return self._objects.account

    @property
    def indirect(self) -> str:
        """No site gets a URL from here."""
        return "this store is open for reading only"

    @property
    def parts(self) -> PartUploads | None:
        """None: nothing is made here."""
        return None

    def get(self, key: str) -> bytes:
        """The whole object. Raises ObjectMissingError."""
        return self._objects.get(key)

    def fetch_file(self, key: str, path: Path) -> ObjectInfo:
        """Copy the object to a local file."""
        return self._objects.fetch_file(key, path)

    def spool(self, keys: Sequence[str], path: Path) -> Spooled:
        """Objects one after another in a new local file."""
        return self._objects.spool(keys, path)

    def stat(self, key: str) -> ObjectInfo:
        """Size and etag. Raises ObjectMissingError."""
        return self._objects.stat(key)

    def sha256(self, key: str) -> str:
        """Hex digest of the object's bytes, read now. Raises ObjectMissingError."""
        return self._objects.sha256(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key starts with ``prefix``, in key order."""
        return self._objects.list(prefix)

    def put(self, key: str, data: bytes) -> NoReturn:
        """Never."""
        del data
        _refuse(key)

    create = put

    def put_file(self, key: str, path: Path) -> NoReturn:
        """Never."""
        del path
        _refuse(key)

    def delete(self, key: str) -> NoReturn:
        """Never."""
        _refuse(key)

    def sign_get(self, key: str, expires_at: float) -> NoReturn:
        """Never: a URL outlives whoever may see this page."""
        del expires_at
        _refuse(key)

    def sign_put(self, key: str, expires_at: float, length: int) -> NoReturn:
        """Never."""
        del expires_at, length
        _refuse(key)

    sign_create = sign_put


def _refuse(key: str) -> NoReturn:
    raise StoreError(f"{key}: expected to be read, got a write; the dashboard's store is read-only")
