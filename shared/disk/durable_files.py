"""Local files that are whole or absent, and on disk when a call returns. Errors of ours, not errno.

What it must not know: keys, runs, who the files are for. A finished file is *sealed*: mode 0444,
mtime stamped in nanoseconds (the kernel's own stamp is a few milliseconds coarse), fsynced. A
sealed inode is never written again, so another hard link to it is as good as a copy.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import uuid
from typing import TYPE_CHECKING, BinaryIO

from shared.disk.files import READ_BYTES, sync_path
from shared.errors import StoreError, StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free space there and start again",
    errno.EDQUOT: "the disk quota is used up; free space or have it raised, and start again",
    errno.EMFILE: (
        "this process may not have so many files open, and a round holds each of its deltas open; "
        "raise its limit above the number of participants (ulimit -n, LimitNOFILE) and start again"
    ),
    errno.EROFS: "the file system is read-only; mount it writable and start again",
    errno.EACCES: "no permission; give this user the right to write there and start again",
    errno.EPERM: "not permitted; take a file system with hard links that this user may write to",
}
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP})


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into StoreUnavailableError (it says what to do) or StoreError."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is not None:
            raise StoreUnavailableError(f"{path}: {remedy}") from error
        raise StoreError(f"{path}: {error.strerror or error}; check this path") from error


@contextlib.contextmanager
def temporary(directory: Path, prefix: str = "") -> Iterator[Path]:
    """A name not in use, ``<prefix><pid>-<random>``; what is there afterwards is removed."""
    path = directory / f"{prefix}{os.getpid()}-{uuid.uuid4().hex}"
    try:
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def write_new(path: Path, chunks: Iterable[bytes]) -> os.stat_result:
    """Write a new sealed file. Raises FileExistsError and other OSErrors."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.writelines(chunks)
        file.flush()
        _seal(handle)
        return os.fstat(handle)


def link_or_copy(
    source: Path, path: Path, tell: Callable[[os.stat_result], None] = lambda _found: None
) -> os.stat_result:
    """Make ``path`` a sealed file with the source's bytes; a hard link where that is safe.

    ``tell`` hears of the source as it was opened: that very file is taken.

    A writable source with no other name is sealed and linked: it must not be altered afterwards.
    A writable source that has other names is copied, for whoever holds those may write through
    them. A read-only one is linked as it stands. Without links between the two places: copied.
    """
    source = source.resolve()  # link(2) would link a symbolic link itself
    with source.open("rb") as file:
        found = os.fstat(file.fileno())
        tell(found)
        sealed = not found.st_mode & 0o222
        if sealed or found.st_nlink == 1:
            try:
                os.link(source, path)
                if os.path.samestat(found, path.stat()):  # not replaced since it was opened
                    os.fsync(file.fileno()) if sealed else _seal(file.fileno())
                    return path.stat()
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
            path.unlink(missing_ok=True)
        return write_new(path, read_chunks(file))


def read_chunks(file: BinaryIO, limit: int | None = None) -> Iterator[bytes]:
    """The rest of an open file, at most ``limit`` bytes, in buffers of 1 MiB."""
    left = limit
    while left is None or left > 0:
        chunk = file.read(READ_BYTES if left is None else min(READ_BYTES, left))
        if not chunk:
            return
        if left is not None:
            left -= len(chunk)
        yield chunk


def make_directories(path: Path) -> None:
    """Make a directory and its parents, each entry on disk. A file in the way fails later."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
        sync_path(directory.parent)


def _seal(handle: int) -> None:
    os.fchmod(handle, 0o444)
    now = time.time_ns()
    os.utime(handle, ns=(now, now))
    os.fsync(handle)
