"""Small whole federations for tests: numpy learners, embedded broker, a directory store."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from gradualdiff.embedded.federation import Embedding, run_embedded
from gradualdiff.embedded.keys import keys_of
from shared.config import FederationConfig, parse
from shared.stores.directory import DirectoryStore
from tests.numpy_learner import NumpyLearner

if TYPE_CHECKING:
    from pathlib import Path


def config(sites=("a", "b", "c"), rounds=3, name="test", **sections) -> FederationConfig:
    """A federation's config; keyword arguments are further sections.

    By itself every byte is exact, so that a test can compute what must come out.
    """
    exact = {"name": "fp32", "down": "whole"}
    run = {"name": name, "rounds": rounds, "participants": list(sites), **sections.pop("run", {})}
    values = {
        "run": run,
        "base": {"model": "none"},
        "training": {"local_steps": 1},
        "codec": {**exact, **sections.pop("codec", {})},
        **sections,
    }
    return parse(FederationConfig, values, "test")


def learners(config: FederationConfig) -> dict[str, NumpyLearner]:
    """One learner for each participant."""
    return {site: NumpyLearner(site) for site in config.run.participants}


def run(config: FederationConfig, folder: Path, sites=None, **embedding):
    """Run to the end; the final state. With ``[trust]`` everybody signs."""
    store = embedding.pop("store", None) or DirectoryStore(folder / "store")
    if "keys" not in embedding:
        embedding["keys"] = keys_of(config, store, folder, embedding.get("clock", time.time))
    return run_embedded(
        config,
        sites or learners(config),
        Embedding(
            store=store,
            folder=folder,
            report=embedding.pop("report", lambda *_: None),
            moved=embedding.pop("moved", lambda _: None),
            **embedding,
        ),
    )
