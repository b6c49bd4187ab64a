"""The Python API: every name that ``import gradualdiff`` offers."""

from __future__ import annotations

from coordinator.runs.following import SiteNow, View
from coordinator.runs.inspection import RoundSummary, RunSummary, SiteRow
from gradualdiff.adapter import Adapter, Saved
from gradualdiff.comparison import Comparison
from gradualdiff.events import Event, RunMoved, Said, SiteMoved
from gradualdiff.rows import Rows
from gradualdiff.run import Round, Run
from gradualdiff.simulation import load_config, simulate
from gradualdiff.store import Store, open_store
from shared import errors
from shared.config import FederationConfig
from shared.log import configure as configure_log

__all__ = [
    "Adapter",
    "Comparison",
    "Event",
    "FederationConfig",
    "Round",
    "RoundSummary",
    "Rows",
    "Run",
    "RunMoved",
    "RunSummary",
    "Said",
    "Saved",
    "SiteMoved",
    "SiteNow",
    "SiteRow",
    "Store",
    "View",
    "configure_log",
    "errors",
    "load_config",
    "open_store",
    "simulate",
]
