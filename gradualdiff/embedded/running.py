"""A run of the embedded federation from its files: checked, begun or resumed, and watched."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING

from coordinator.runs.bases import put_bases
from coordinator.runs.deletion import delete_run, has_closed_round, refuse_if_active, run_lock
from coordinator.runs.operating import operator, operator_ledger
from gradualdiff.embedded.federation import Embedding, run_embedded
from gradualdiff.embedded.keys import keys_of
from gradualdiff.embedded.preflight import check_start
from gradualdiff.embedded.sites import load_sites
from gradualdiff.events import Event, RunMoved, Said, SiteMoved
from shared import topology
from shared.disk.locks import held
from shared.errors import ObjectMissingError, RunExistsError, RunNotFoundError
from shared.protocol.ledger import Ledger, list_runs
from shared.protocol.records import FinishedRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from coordinator.round.state import RunState
    from participant.learner.port import Learner
    from shared.config import FederationConfig
    from shared.stores.directory import DirectoryStore


def begins_anew(store: DirectoryStore, config: FederationConfig, *, resume: bool | None) -> bool:
    """Whether the run is there and is not worth resuming.

    That is one without a closed round that failed, that has other settings or that is half
    deleted. Raises RunExistsError and RunNotFoundError, as ``simulate`` says.
    """
    run, known = config.run.name, list_runs(store)
    if run not in known:
        if resume:
            raise RunNotFoundError(f"no run {run} in this store to resume; leave --resume out")
        return False
    if resume or known[run]:
        return known[run] and not resume
    ledger = Ledger(store, run, "reader", lambda: 0.0)
    if not has_closed_round(ledger):
        ended = any(place.kind is FinishedRecord for place in ledger.places())
        if ended or ledger.federation().digest != config.digest:
            return True
    if resume is None:
        return False
    raise RunExistsError(
        f"run {run} already exists in this store; resume it with --resume, choose another "
        f"run.name, or delete it: gradualdiff runs delete {run} --store {store.root}"
    )


def run_here(
    config: FederationConfig,
    store: DirectoryStore,
    folder: Path,
    learners: Mapping[str, Learner],
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
    *,
    anew: bool = False,
    bases: Path | None = None,
) -> RunState:
    """Run the federation to its end. Model, text and room are checked first.

    ``anew``: then what is on record of the run goes. ``bases``: the file that ``lora.bases`` names,
    where it is here. Raises as ``simulate`` does.
    """
    run = config.run.name
    sites = [site.site for site, _ in load_sites(config, folder)]
    last: list[RunMoved] = []

    def moved(state: RunState) -> None:
        event = RunMoved.of(state)
        if last != [event]:
            last[:] = [event]
            on_event(event)

    embedding = Embedding(
        store=store,
        folder=folder,
        report=lambda site, number, step: on_event(SiteMoved(site, number, step)),
        moved=moved,
        should_stop=should_stop,
        checkpoint_seconds={site.name: site.checkpoint_seconds for site in sites},
        keys=keys_of(config, store, folder),
    )
    # Two processes would be fenced by the ledger sooner or later, but share the sites' workspaces.
    with held(folder / f".{run}.lock", f"run {run} in {folder}"), run_lock(store, run):
        check_start(config, learners, store, embedding.report, anew=anew, bases=bases)
        if anew:
            _forget(store, run)
            on_event(Said(f"run {run} had no closed round: it starts over with these settings"))
        if bases is not None:
            put_bases(config, store, bases)
        _clear_workspaces(config, store, folder)
        return run_embedded(config, learners, embedding)


def _clear_workspaces(config: FederationConfig, store: DirectoryStore, folder: Path) -> None:
    """What a deleted run of this name left at the sites is of no use to one that begins."""
    try:
        store.stat(topology.federation_key(config.run.name))
    except ObjectMissingError:
        for site in config.run.participants:
            shutil.rmtree(folder / "sites" / site / config.run.name, ignore_errors=True)


def _forget(store: DirectoryStore, run: str) -> None:
    """Let a run begin anew that has no closed round; what it branches from stays."""
    refuse_if_active(store, run, time.time())
    delete_run(operator_ledger(store, run, time.time), operator(), keep_origin=True)
