"""Local files: what their bytes are, and making a change survive a crash."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

READ_BYTES = 1024 * 1024


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
