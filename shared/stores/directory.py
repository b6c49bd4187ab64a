"""The object store in a directory: the ``ObjectStore`` and ``Transfer`` ports without a server.

``<root>/<key>`` is the object, ``<root>/.tmp`` holds what is being written. Invariants:

- An object is an immutable inode. Every write makes another inode and moves it into place, so that
  hard links stand in for copies and an open reader never sees a change.
- A file is on disk before its name is, and its name before the call returns.
- ``create`` is link(2): the file system lets one win, between threads and processes alike.
- The etag is inode, mtime in nanoseconds and size; each write has its own.

Stricter than the port: no key begins with ``.tmp/``, and where ``a`` is an object there can be no
``a/b``. Signed URLs are good only in the process that signed them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from shared.disk.durable_files import (
    file_errors,
    link_or_copy,
    make_directories,
    read_chunks,
    temporary,
    write_new,
)
from shared.disk.files import digest_file, sync_path
from shared.errors import (
    IntegrityError,
    ObjectExistsError,
    ObjectMissingError,
    StoreError,
    StoreUnavailableError,
)
from shared.stores.directory_grants import Grants, Method
from shared.stores.keys import KEY_PART, check_key
from shared.stores.port import ObjectInfo, Spooled, read_again

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from shared.stores.port import PartUploads

STALE_SECONDS = 3600.0
TEMPORARY = ".tmp"


class DirectoryStore:
    """Objects under ``root``. ``clock``: seconds since the epoch, for URLs and stale files.

    Opening makes a missing root, tries whether it can be written, and removes what dead processes
    left. With ``create=False`` it writes nothing, so that a copy on a read-only disk can be looked
    at, and a missing root is a StoreError. Raises StoreUnavailableError.
    """

    def __init__(
        self, root: Path, clock: Callable[[], float] = time.time, *, create: bool = True
    ) -> None:
        self._root = root.absolute()
        self._temporary = self._root / TEMPORARY
        self._clock = clock
        self._grants = Grants(clock)
        with file_errors(self._root):
            if self._root.exists() and not self._root.is_dir():
                raise StoreUnavailableError(f"{root}: expected a directory, got a file")
            if not self._root.exists() and not create:
                raise StoreError(f"no store at {root}; check --store")
            if not create:
                return
            make_directories(self._temporary)
            self._sweep()
            with temporary(self._temporary) as probe, temporary(self._temporary) as second:
                write_new(probe, ())
                os.link(probe, second)

    @property
    def account(self) -> None:
        """A directory has no accounts."""

    @property
    def indirect(self) -> str:
        """Nothing is against it: link(2) creates."""
        return ""

    @property
    def parts(self) -> PartUploads | None:
        """None: no line is cut, so an object of any size is sent at once."""
        return None

    @property
    def root(self) -> Path:
        """The folder, as an absolute path."""
        return self._root

    def put(self, key: str, data: bytes) -> ObjectInfo:
        """Write, replacing what was there."""
        return self.write(key, (data,))

    def create(self, key: str, data: bytes) -> ObjectInfo:
        """Write only if nothing is there. Raises ObjectExistsError."""
        return self.create_from(key, (data,))

    def create_from(self, key: str, chunks: Iterable[bytes]) -> ObjectInfo:
        """As ``create``, from a stream; if the stream raises, nothing is written."""
        target = self._path(key)
        with file_errors(target), temporary(self._temporary) as temp:
            written = write_new(temp, chunks)
            make_directories(target.parent)
            try:
                os.link(temp, target)
            except FileExistsError:
                raise ObjectExistsError(f"{key}: already exists; read it and adopt it") from None
            sync_path(target.parent)
        return _info(key, written)

    def put_file(self, key: str, path: Path) -> ObjectInfo:
        """Write a local file's bytes. The file may become a read-only link to the object.

        See :func:`~shared.disk.durable_files.link_or_copy`. Raises StoreError if there is none.
        """
        target = self._path(key)
        if not path.is_file():
            raise StoreError(f"{path}: expected a file, got none; give the path of a file")
        with file_errors(target), temporary(self._temporary) as temp:
            written = link_or_copy(path, temp)
            _move(temp, target)
        return _info(key, written)

    def write(self, key: str, chunks: Iterable[bytes]) -> ObjectInfo:
        """Write from a stream, replacing what was there; if the stream raises, nothing is."""
        target = self._path(key)
        with file_errors(target), temporary(self._temporary) as temp:
            written = write_new(temp, chunks)
            _move(temp, target)
        return _info(key, written)

    def get(self, key: str) -> bytes:
        """The whole object. Raises ObjectMissingError."""
        with self.open(key) as file, file_errors(self._path(key)):
            return file.read()

    def open(self, key: str) -> BinaryIO:
        """The object as an open file; later writes do not show in it. Raises ObjectMissingError."""
        path = self._path(key)
        with file_errors(path):
            try:
                return path.open("rb")
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise ObjectMissingError(f"{key}: no such object in {self._root}") from None

    def fetch_file(self, key: str, path: Path) -> ObjectInfo:
        """Copy the object to a local file of the caller's own, replacing it whole."""
        with self.open(key) as file, file_errors(path):
            make_directories(path.parent)
            with temporary(path.parent, f".{path.name}.") as temp:
                write_new(temp, read_chunks(file))
                temp.chmod(0o644)
                _move(temp, path)
            return _info(key, os.fstat(file.fileno()))

    def spool(self, keys: Sequence[str], path: Path) -> Spooled:
        """A link to one object, or a copy of several. Raises ObjectMissingError."""
        parts: list[ObjectInfo] = []
        if len(keys) == 1:
            (key,) = keys
            self.stat(key)

            def tell(found: os.stat_result) -> None:
                parts.append(_info(key, found))

            with file_errors(path), temporary(path.parent, f".{path.name}.") as temp:
                link_or_copy(self._path(key), temp, tell)
                temp.replace(path)
                return Spooled(parts, digest_file(path)[0])
        digest = hashlib.sha256()
        with file_errors(path), temporary(path.parent, f".{path.name}.") as temp:
            with temp.open("wb") as out:
                for key in keys:
                    with self.open(key) as file:
                        parts.append(_info(key, os.fstat(file.fileno())))
                        for chunk in read_chunks(file):
                            digest.update(chunk)
                            out.write(chunk)
            temp.replace(path)
        return Spooled(parts, digest.hexdigest())

    def stat(self, key: str) -> ObjectInfo:
        """Size and etag. Raises ObjectMissingError."""
        with self.open(key) as file:
            return _info(key, os.fstat(file.fileno()))

    def sha256(self, key: str) -> str:
        """Hex digest of the object's bytes, read now. Raises ObjectMissingError."""
        with self.open(key) as file, file_errors(self._path(key)):
            digest = hashlib.sha256()
            for chunk in read_chunks(file):
                digest.update(chunk)
            return digest.hexdigest()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key starts with ``prefix``, in key order."""
        return self._walk("", prefix)

    def delete(self, key: str) -> None:
        """Remove; nothing there is no error."""
        path = self._path(key)
        gone = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
        with file_errors(path), contextlib.suppress(*gone):
            path.unlink()
            sync_path(path.parent)

    def sign_get(self, key: str, expires_at: float) -> str:
        """A URL that reads this object until ``expires_at``."""
        self._path(key)
        return self._grants.sign(key, "GET", expires_at)

    def sign_put(self, key: str, expires_at: float, length: int) -> str:
        """A URL that writes ``length`` bytes as this object until ``expires_at``."""
        self._path(key)
        return self._grants.sign(key, "PUT", expires_at, length)

    def sign_create(self, key: str, expires_at: float, length: int) -> str:
        """A URL that writes ``length`` bytes as this object, if nothing is there."""
        self._path(key)
        return self._grants.sign(key, "CREATE", expires_at, length)

    def granted_key(self, url: str, method: Method, length: int = 0) -> str:
        """The key that a signed URL of this store is good for. Raises GrantError."""
        return self._grants.key_of(url, method, length)

    def _path(self, key: str) -> Path:
        check_key(key)
        parts = key.split("/")
        if parts[0] == TEMPORARY:
            raise StoreError(f"key {key!r}: expected any first part but {TEMPORARY!r}")
        return self._root.joinpath(*parts)

    def _walk(self, stem: str, prefix: str) -> Iterator[ObjectInfo]:
        """In key order: a directory sorts by its name with the slash, as its keys do."""
        directory = self._root / stem
        try:
            with file_errors(directory), os.scandir(directory) as entries:
                found = {
                    f"{entry.name}/" if entry.is_dir() else entry.name: entry.path
                    for entry in entries
                    if KEY_PART.fullmatch(entry.name)
                }
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return
            raise
        for name, path in sorted(found.items()):
            key = stem + name
            if key == f"{TEMPORARY}/":
                continue
            if name.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(key, prefix)
            elif key.startswith(prefix) and (info := _look(key, path)) is not None:
                yield info

    def _sweep(self) -> None:
        """Remove the old temporary files of dead processes.

        Old ones only, since a process on another host looks dead from here. By ctime, since a
        link keeps its source's mtime.
        """
        for path in self._temporary.iterdir():
            process = path.name.partition("-")[0]
            with contextlib.suppress(FileNotFoundError):
                age = self._clock() - path.stat().st_ctime
                if age > STALE_SECONDS and not (process.isdigit() and _is_running(int(process))):
                    path.unlink()


def _look(key: str, path: str) -> ObjectInfo | None:
    """What ``stat`` says of an object whose path is known; a listing has thousands."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError:
        with file_errors(Path(path)):
            raise
    try:
        return _info(key, os.fstat(file))
    finally:
        os.close(file)


class DirectoryTransfer:
    """A site's view of a :class:`DirectoryStore` in the same process: signed URLs only."""

    def __init__(self, store: DirectoryStore) -> None:
        self._store = store

    def check(self, url: str) -> None:
        """Raises GrantError."""
        self._store.granted_key(url, "GET")

    def download(self, url: str, path: Path, sha256: str) -> int:
        """Copy to a new local file, checked against ``sha256``; its size in bytes.

        A copy and not a link: a site never holds an inode of the ledger. Raises IntegrityError,
        GrantError, ObjectMissingError, StoreUnavailableError.
        """
        key = self._store.granted_key(url, "GET")
        with file_errors(path), temporary(path.parent, f".{path.name}.") as temp:

            def read() -> str:
                digest = hashlib.sha256()
                temp.unlink(missing_ok=True)
                with self._store.open(key) as file:
                    write_new(temp, _hashed(read_chunks(file), digest.update))
                return digest.hexdigest()

            damage = read_again(read, sha256)
            if damage is not None:
                raise IntegrityError(f"{key}: expected sha256 {sha256}; {damage}")
            size = temp.stat().st_size
            _move(temp, path)
        return size

    def upload(self, url: str, path: Path, start: int, length: int) -> None:
        """Send ``length`` bytes of a local file from ``start``; IntegrityError if it is shorter."""
        method: Method = "CREATE" if Grants.creates(url) else "PUT"
        key = self._store.granted_key(url, method, length)
        with file_errors(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if start < 0 or length < 0 or start + length > size:
                raise IntegrityError(
                    f"{path}: expected {length} bytes from {start}, but the file has {size}"
                )
            file.seek(start)
            chunks = read_chunks(file, length)
            if method == "PUT":
                self._store.write(key, chunks)
                return
            with contextlib.suppress(ObjectExistsError):
                self._store.create_from(key, chunks)


def _hashed(chunks: Iterable[bytes], update: Callable[[bytes], object]) -> Iterator[bytes]:
    for chunk in chunks:
        update(chunk)
        yield chunk


def _move(temp: Path, target: Path) -> None:
    make_directories(target.parent)
    temp.replace(target)
    sync_path(target.parent)


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, found.st_size, _etag(found))


def _etag(found: os.stat_result) -> str:
    return f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
