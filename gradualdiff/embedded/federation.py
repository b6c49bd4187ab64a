"""The embedded federation: every role in this process over the embedded broker and a directory.

One thread, one loop: all queues are drained, then one participant does one piece of work, so that
participants train in turn on the one device and share the one frozen base. The roles are the very
ones that run apart; nothing of them is known here but ``drain``, ``work`` and ``state``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.bootstrap import build_coordinator
from coordinator.live_run import checked_end
from coordinator.round.unmasking import lacks_survivors
from gradualdiff.embedded.metering import Meter, MeteredBroker, MeteredTransfer
from participant.bootstrap import ParticipantRole, build_participant
from participant.checkpoints import DEFAULT_SECONDS
from participant.site import NOBODY_SIGNS, Site, Trust
from participant.workspace import Workspace
from shared.brokers.embedded import EmbeddedBroker
from shared.errors import GradualDiffError, InterruptedRunError, LedgerDamagedError, RunStuckError
from shared.methods.rules import too_few
from shared.stores.directory import DirectoryTransfer
from shared.topology import COORDINATOR, coordinator_rights, site_rights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from coordinator.handlers import Coordinator
    from coordinator.round.state import RunState
    from gradualdiff.embedded.keys import Keys
    from participant.learner.port import Learner, Progress
    from shared.config import AcceptSection, FederationConfig
    from shared.stores.directory import DirectoryStore


@dataclass(frozen=True)
class Embedding:
    """Where an embedded federation lives and who watches. ``keys``: of all roles; None: none signs.

    ``should_stop`` is asked between a training's micro-batches; ``report(site, round, progress)``
    feeds a display; ``moved(state)`` is called whenever the coordinator may have learnt something.
    ``accept``: what every site takes part in; None, since one owner has everybody's text here.
    ``checkpoint_seconds``: each site's own, by name. ``meter``: counts what sites send and fetch.
    """

    store: DirectoryStore
    folder: Path
    report: Callable[[str, int | None, Progress], None]
    moved: Callable[[RunState], None]
    should_stop: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.time
    checkpoint_seconds: Mapping[str, float] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)
    accept: AcceptSection | None = None
    keys: Keys | None = None


def run_embedded(
    config: FederationConfig, learners: Mapping[str, Learner], embedding: Embedding
) -> RunState:
    """Start or resume the run and bring it to its end; the final state.

    Raises RunStuckError when nothing can move any more (it names who waits for what),
    RunFailedError when the run ended without a result, InterruptedRunError when stopped.
    """
    server = EmbeddedBroker()
    role = build_coordinator(
        config,
        embedding.store,
        server.connect(COORDINATOR, coordinator_rights()),
        embedding.folder / "spool",
        embedding.clock,
        key=embedding.keys.coordinator if embedding.keys else None,
    )
    role.coordinator.start()  # no other coordinator can be at work on this broker
    sites = [_participant(server, embedding, *item) for item in sorted(learners.items())]
    for site in sites:
        site.participant.start(config.run.name)
    dispatchers = [role.dispatcher, *(site.dispatcher for site in sites)]
    idle_ticks = 0
    while True:
        while sum(dispatcher.drain() for dispatcher in dispatchers):
            embedding.moved(role.coordinator.state)
        worker = next((site for site in sites if site.participant.has_work), None)
        if embedding.should_stop():
            raise InterruptedRunError(
                f"run {config.run.name} was stopped; nothing finished is lost"
            )
        if role.coordinator.notice_controls():
            continue
        if worker is not None:
            worker.participant.work()
            idle_ticks = 0
        elif role.coordinator.state.finished is not None:
            return checked_end(role.coordinator.state)
        elif (left := _seconds_to_deadline(role.coordinator.state, embedding)) > 0:
            time.sleep(min(left, 0.2))
        elif idle_ticks:
            raise _stuck(role.coordinator, embedding.store.root)
        else:
            role.tick()  # nobody has anything to do: perhaps time decides
            idle_ticks += 1


def _seconds_to_deadline(state: RunState, embedding: Embedding) -> float:
    """How long the open round still waits for everybody; 0 where no deadline is ahead."""
    closes_at = state.open_round.closes_at if state.open_round else None
    return 0.0 if closes_at is None else closes_at - embedding.clock()


def _participant(
    server: EmbeddedBroker, embedding: Embedding, name: str, learner: Learner
) -> ParticipantRole:
    broker = MeteredBroker(server.connect(name, site_rights(name)), embedding.meter, name)
    site = Site(
        name=name,
        outbox=broker,
        transfer=MeteredTransfer(DirectoryTransfer(embedding.store), embedding.meter, name),
        workspace=Workspace(
            embedding.folder / "sites" / name,
            embedding.checkpoint_seconds.get(name, DEFAULT_SECONDS),
        ),
        learner=learner,
        clock=embedding.clock,
        should_stop=embedding.should_stop,
        report=embedding.report,
        accept=embedding.accept,
        trust=_trust(embedding.keys, name),
    )
    return build_participant(site, broker)


def _trust(keys: Keys | None, site: str) -> Trust:
    return NOBODY_SIGNS if keys is None else Trust(keys.sites[site], keys.coordinator.public)


def _stuck(coordinator: Coordinator, store: Path) -> GradualDiffError:
    state, damage = coordinator.state, coordinator.damage
    if damage is None:
        return RunStuckError(_why_stuck(state, store))
    run, number = state.config.run.name, state.last_round
    return LedgerDamagedError(
        f"run {run}: {damage}. The site that made it does not have it any more. Without a copy, "
        f"begin another run with the result of round {number}: gradualdiff runs branch {run} "
        f"--at {number} --name NEW --store {store}"
    )


def _why_stuck(state: RunState, store: Path) -> str:
    run, steering = state.config.run.name, state.steering
    if steering.paused is not None and state.genesis is not None and state.opened is None:
        return (
            f"run {run} is paused after round {state.last_round}: {steering.paused}. Resume it "
            f"with: gradualdiff runs resume {run} --store {store}, then start this again"
        )
    short = _too_few(state)
    if steering.excluded and not state.waiting_for and state.genesis is not None:
        out = "; ".join(f"{site} ({why})" for site, why in sorted(steering.excluded.items()))
        return (
            f"run {run} cannot continue: no site is left to wait for, since operators excluded "
            f"{out}{short}. Stop it "
            f"with its last result: gradualdiff runs stop {run} --reason WHY --store {store}"
        )
    where = f"round {state.opened.round}" if state.opened else "the start"
    known = {
        **state.declined,
        **state.unfit,
        **{site: t.reason for site, t in state.troubles.items()},
    }
    waiting = [f"{site} ({known.get(site, 'no word from it')})" for site in state.waiting_for]
    waiting += [f"{s} ({why})" for s, why in state.declined.items() if s not in state.waiting_for]
    return (
        f"run {run} cannot continue: {where} waits for {'; '.join(waiting) or 'nobody'}"
        f"{short}. "
        "Fix the cause at the site, then resume; everything finished is in the ledger. "
        "A setting of the run is on record: before its first round is closed the run may begin "
        "anew with others; later, choose another run.name"
    )


def _too_few(state: RunState) -> str:
    """What the open round lacks although its policy would close it, in words; or nothing."""
    opened = state.open_round
    if opened is None:
        return ""
    reachable = state.steering.reachable(state.uncounted)
    there = sum(number == opened.round for _, number in reachable)
    short = too_few(state.config.aggregation, there) or lacks_survivors(state.config, opened, there)
    return "" if short is None else f"; {short}"
