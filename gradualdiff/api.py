"""The Python API: every name that ``import gradualdiff`` offers."""

from __future__ import annotations

from coordinator.runs.inspection import RoundSummary, RunSummary, SiteRow
from gradualdiff.rows import Rows
from gradualdiff.run import Round, Run
from gradualdiff.store import Store, open_store
from shared import errors
from shared.config import FederationConfig
from shared.config import load_federation as load_config

__all__ = [
    "FederationConfig",
    "Round",
    "RoundSummary",
    "Rows",
    "Run",
    "RunSummary",
    "SiteRow",
    "Store",
    "errors",
    "load_config",
    "open_store",
]
