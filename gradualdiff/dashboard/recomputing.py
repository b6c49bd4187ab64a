"""A run computed again on somebody's asking, told line by line; one at a time."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

from gradualdiff.verified import finding, in_one, lines
from shared.errors import GradualDiffError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradualdiff.run import Run

_AT_WORK = threading.Lock()  # it takes a core and the run's bytes: nobody may ask for ten


def verifying(run: Run) -> Iterator[str]:
    """What ``runs verify`` says, as it goes on. It ends by itself, also when nobody listens."""
    if not _AT_WORK.acquire(blocking=False):
        yield "another verification is at work here; ask again when it has ended"
        return
    said: SimpleQueue[str | None] = SimpleQueue()
    threading.Thread(target=_verify, args=(run, said), daemon=True).start()
    while (line := said.get()) is not None:
        yield line


def _verify(run: Run, said: SimpleQueue[str | None]) -> None:
    try:
        found = run.verify(lambda number: said.put(f"checking round {number}"))
        if not found.findings:
            said.put(f"run {run.name} verified: {in_one(found)}")
        for line in lines(found):
            said.put(line)
        for one in found.findings:
            said.put(f"FINDING: {finding(one)}")
    except GradualDiffError as error:
        said.put(f"error: {error}")
    finally:
        _AT_WORK.release()
        said.put(None)
