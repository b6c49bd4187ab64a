"""One process at a time: a file's lock, which the kernel lets go however the process ends."""

from __future__ import annotations

import contextlib
import fcntl
from typing import TYPE_CHECKING

from shared.durable_files import file_errors
from shared.errors import FencedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file ``path``. Raises FencedError when another process does."""
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FencedError(
                f"another process is at work on {what}; wait for it, or end it"
            ) from None
        yield


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
