"""Files of lines that are only added to: on disk when a call returns, each whole or not there."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from shared.disk.durable_files import file_errors, make_directories
from shared.disk.files import sync_path

if TYPE_CHECKING:
    from pathlib import Path


def append_line(path: Path, line: bytes) -> None:
    """Add a line, which holds no end of line itself; several processes may.

    The file is made if need be, for this user's eyes only. What a kill left at its end of a line
    was never said, and goes. Raises StoreError, StoreUnavailableError where the disk is full.
    """
    with file_errors(path):
        make_directories(path.parent)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o600), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            data = file.read()
            file.truncate(data.rfind(b"\n") + 1)
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        sync_path(path.parent)


def whole_lines(path: Path) -> list[bytes]:
    """Every line that was added, in order; none without the file. Raises OSError."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
