"""The Python API: every name that ``import gradualdiff`` offers."""

from __future__ import annotations

from coordinator.runs.following import SiteNow, View
from coordinator.runs.inspection import RoundSummary, RunSummary, SiteRow
from gradualdiff.adapter import Adapter, Saved
from gradualdiff.comparison import Comparison
from gradualdiff.rows import Rows
from gradualdiff.run import Round, Run
from gradualdiff.store import Store, open_store
from shared import errors
from shared.config import FederationConfig
from shared.config import load_federation as load_config

__all__ = [
    "Adapter",
    "Comparison",
    "FederationConfig",
    "Round",
    "RoundSummary",
    "Rows",
    "Run",
    "RunSummary",
    "Saved",
    "SiteNow",
    "SiteRow",
    "Store",
    "View",
    "errors",
    "load_config",
    "open_store",
]
