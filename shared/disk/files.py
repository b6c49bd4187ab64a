"""Local files: what their bytes are, and making a change survive a crash."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

READ_BYTES = 1024 * 1024
OTHER_FILES = 256  # that a process has open anyway: connections, its log, threads' reads


def digest_file(path: Path) -> tuple[str, int]:
    """sha256 (hex) and size in bytes of a file. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size


def sync_path(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, survive a crash. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``, whole or not at all, also after a crash. Raises OSError."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync_path(path.parent)


def allow_open_files(count: int) -> None:
    """See to it that this process may hold so many files open at once, beside its others.

    Many systems begin with 1,024, which a process may raise up to its hard limit. Raises OSError
    (EMFILE) where that is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise OSError(errno.EMFILE, f"expected a limit of at least {wanted} open files, got {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
