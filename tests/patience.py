"""How long a test waits for a fact, and the one loop that does.

The number says when a test gives up, not how fast the product is: on a machine with other work on
it everything takes many times longer.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE_SECONDS = 300.0


def wait_until(is_so: Callable[[], object], what: str | Callable[[], str]) -> None:
    """Wait for a fact; fails naming it (or with what ``what`` finds out then)."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise AssertionError(f"never: {what if isinstance(what, str) else what()}")
        time.sleep(0.02)
