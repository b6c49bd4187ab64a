"""JSON objects that a reproduction keeps beside its runs: settings, traffic, measurements."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from shared.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path


def read_kept(path: Path) -> dict[str, Any]:
    """What was kept there; empty if there is no file. Raises DataError if it is no JSON object."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise DataError(
            f"{path}: expected the JSON object that was written there, got something else; restore "
            "it, or delete it, which loses what it says"
        )
    return values
