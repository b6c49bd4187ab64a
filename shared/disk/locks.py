"""One process at a time: a file's lock, which the kernel lets go however the process ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from shared.disk.durable_files import file_errors
from shared.errors import FencedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file, or a folder that is there. Raises FencedError if another process does."""
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        how = os.O_RDONLY if path.is_dir() else os.O_WRONLY | os.O_CREAT
        handle = os.open(path, how | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FencedError(
                f"another process is using {what}; wait until it is done, or stop it"
            ) from None
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def first_free(folder: Path) -> Iterator[Path]:
    """The first of ``folder/1``, ``folder/2``, ... that no other process holds; it is kept."""
    number = 0
    while True:
        number += 1
        place = folder / str(number)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(held(place / ".lock", str(place)))
            except FencedError:
                continue
            yield place
            return
