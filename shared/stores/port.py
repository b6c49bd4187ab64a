"""The ``ObjectStore`` port (the coordinator's and the tools' view) and a site's ``Transfer``.

What any adapter must do is written as tests in ``tests/contracts/store_contract.py``. In short:

- Keys are ``/``-separated, made of ``[A-Za-z0-9._-]``; no part is empty, ``.`` or ``..``.
- A write is seen whole or not at all, and survives a crash once the call returned.
- ``create`` is conditional: of many at once, one wins and the others get ObjectExistsError.
- A site has no store key: it holds signed URLs, good for one method, one object, a time
  and, to write, one length.
- A URL to create makes an object once; nobody who holds it can change or replace one. A large
  object is made in parts, and ``complete`` ends every URL of its parts.
- Full or read-only is StoreUnavailableError, and nothing half-written stays visible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

READS = 3  # of an object whose bytes are not what they should be


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing says of an object. ``etag`` changes whenever the bytes are written anew."""

    key: str
    size: int
    etag: str


@dataclass(frozen=True)
class Spooled:
    """What :meth:`ObjectStore.spool` read: each object, and the sha256 of all the bytes."""

    parts: list[ObjectInfo]
    sha256: str


@dataclass(frozen=True)
class PartUpload:
    """An object that is made in parts and not complete yet. ``id``: the server's name of it."""

    key: str
    id: str


@dataclass(frozen=True)
class Part:
    """A part that has arrived. ``size`` in bytes."""

    size: int
    etag: str


def read_again(read: Callable[[], str], sha256: str) -> str | None:
    """Read until ``read`` gives this digest, a few times; else which side is damaged, in words."""
    digests = []
    for _ in range(READS):
        digests.append(read())
        if digests[-1] == sha256:
            return None
    if len(set(digests)) == 1:
        return f"{READS} reads gave {digests[-1]}: the stored object is damaged"
    return f"{READS} reads differ, the last is {digests[-1]}: the transfer damages the data"


class PartUploads(Protocol):
    """Objects made in parts, numbered from 1. Such an object is there whole or not at all."""

    @property
    def whole_bytes(self) -> int:
        """Up to this size one URL creates an object, without parts."""

    @property
    def part_bytes(self) -> int:
        """The size of every part but the last, which may be smaller."""

    def begin(self, key: str) -> PartUpload:
        """Begin one more upload of this object."""

    def under_way(self, prefix: str) -> list[PartUpload]:
        """The uploads of keys that start with ``prefix``, in key order; a whole key is one.

        Some servers (MinIO) list those of a whole key alone, and drop old ones themselves.
        """

    def arrived(self, upload: PartUpload) -> dict[int, Part]:
        """The parts that are there, by number; none of an upload that is over."""

    def sign(self, upload: PartUpload, number: int, expires_at: float, length: int) -> str:
        """A URL that writes this part, of exactly ``length`` bytes, until ``expires_at``."""

    def complete(self, upload: PartUpload, parts: Mapping[int, Part]) -> None:
        """Make the object of these parts, if nothing is at its key; no URL of a part is good then.

        Raises ObjectExistsError, ObjectMissingError if the upload is over, and ObjectChangedError
        if a part was written anew since.
        """

    def abort(self, upload: PartUpload) -> None:
        """Drop it and its parts; one that is over is no error."""


class ObjectStore(Protocol):
    """Objects by key. All sizes in bytes, all times in seconds since the epoch."""

    @property
    def account(self) -> str | None:
        """Who we are to the server, its access key's name; None: it has no accounts."""

    @property
    def indirect(self) -> str:
        """Why sites cannot create objects by URLs here, and use the inbox; "": they can."""

    @property
    def parts(self) -> PartUploads | None:
        """How a large object is made by URLs; None: by one, whatever its size."""

    def put(self, key: str, data: bytes) -> ObjectInfo:
        """Write, replacing what was there."""

    def create(self, key: str, data: bytes) -> ObjectInfo:
        """Write only if nothing is there. Raises ObjectExistsError."""

    def put_file(self, key: str, path: Path) -> ObjectInfo:
        """Write a local file's bytes; it must not be altered afterwards (it may be linked)."""

    def get(self, key: str) -> bytes:
        """The whole object. Raises ObjectMissingError."""

    def fetch_file(self, key: str, path: Path) -> ObjectInfo:
        """Copy the object to a local file of the caller's own (mode 0644), replacing it whole."""

    def spool(self, keys: Sequence[str], path: Path) -> Spooled:
        """Objects one after another in a new local file, hashed on the way (or link one).

        Not made to survive a crash: whoever finds such a file later hashes it before use. Raises
        ObjectMissingError.
        """

    def stat(self, key: str) -> ObjectInfo:
        """Size and etag. Raises ObjectMissingError."""

    def sha256(self, key: str) -> str:
        """Hex digest of the object's bytes, read now. Raises ObjectMissingError."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key starts with ``prefix``, in key order."""

    def delete(self, key: str) -> None:
        """Remove; nothing there is no error."""

    def sign_get(self, key: str, expires_at: float) -> str:
        """A URL that reads this object until ``expires_at``."""

    def sign_put(self, key: str, expires_at: float, length: int) -> str:
        """A URL that writes this object, of exactly ``length`` bytes, until ``expires_at``."""

    def sign_create(self, key: str, expires_at: float, length: int) -> str:
        """As ``sign_put``, but only if nothing is there at that moment."""


class Transfer(Protocol):
    """What a site can do with signed URLs. Raises GrantError, StoreUnavailableError."""

    def check(self, url: str) -> None:
        """Raises what ``download`` raises for a URL that this site would never ask."""

    def download(self, url: str, path: Path, sha256: str) -> int:
        """Fetch to a new local file, checked by ``sha256``; its size. Raises IntegrityError."""

    def upload(self, url: str, path: Path, start: int, length: int) -> None:
        """Send ``length`` bytes of a local file from ``start``.

        An object that a URL to create finds there is no error: it is as good as sent.
        """
