"""The coordinator as a process: connect, stand by, be the active one, finish.

It keeps nothing that the ledger does not hold, so whatever breaks (the connection to the broker, a
store that is away for longer than a delivery may be held, another coordinator that wrote first) has
one answer: drop everything, connect anew, rebuild from the ledger.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.bootstrap import TICK_SECONDS, build_coordinator
from coordinator.live_run import checked_end
from shared import topology
from shared.backoff import Backoff
from shared.errors import (
    BrokerError,
    BrokerSilentError,
    BrokerUnavailableError,
    FencedError,
    GradualDiffError,
    InterruptedRunError,
    StoreUnavailableError,
)
from shared.log import get_logger
from shared.protocol.dispatch import Patience

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from pathlib import Path

    from coordinator.bootstrap import CoordinatorRole
    from coordinator.handlers import Coordinator
    from coordinator.round.state import RunState
    from shared.brokers.port import Broker
    from shared.config import FederationConfig
    from shared.stores.port import ObjectStore
    from shared.trust.keys import SigningKey

HOLD_SECONDS = 300.0  # a delivery, while the store is away; brokers give up on it after 1,800
STEADY_SECONDS = 30.0  # a connection that held so long is no reason to wait longer after its loss
REJECTED_SECONDS = 1.0  # until a tick is tried again that a full queue did not take
LINGER_SECONDS = 600.0  # after the end, for the sites' word on the last adapter


@dataclass(frozen=True)
class CoordinatorContext:
    """What a coordinator's process works with. ``connect`` makes a new connection each time."""

    config: FederationConfig
    store: ObjectStore
    connect: Callable[[], Broker]
    spool: Path
    stopping: threading.Event
    linger_seconds: float = LINGER_SECONDS
    clock: Callable[[], float] = time.time
    key: SigningKey | None = None


def serve(context: CoordinatorContext) -> RunState:
    """Start or resume the run and bring it to its end, or stand by; the final state.

    Raises InterruptedRunError when the process is to stop, RunFailedError when the run ended
    without a result, and what forbids a start: wrong accounts, another config on record.
    """
    run, stopping = context.config.run.name, context.stopping
    pauses, was_built, silent = Backoff(), False, False
    while not stopping.is_set():
        asking = False
        try:
            if silent:
                _revive(context)
                silent = False
            with context.connect() as broker:
                asking = True
                role = _build(context, broker)
                asking, was_built = False, True
                get_logger().info("coordinator.connected", run=run)
                state = _attend(context, role, pauses)
                if state is not None:
                    return checked_end(state)
        except GradualDiffError as error:
            if not (
                error.retryable or (was_built and isinstance(error, BrokerError | FencedError))
            ):
                raise
            # A damaged queue lets one wait for so long that the line may be lost first.
            lost = asking and isinstance(error, BrokerUnavailableError)
            silent = silent or lost or isinstance(error, BrokerSilentError)
            pause = pauses.next()
            get_logger().warning(
                "coordinator.waits", run=run, reason=str(error), seconds=round(pause, 1)
            )
            stopping.wait(pause)
    raise InterruptedRunError(f"run {run}: stopped; everything finished is saved")


def _revive(context: CoordinatorContext) -> None:
    """See to it that every queue of the run answers, on a connection that is left after that."""
    run = context.config.run
    with context.connect() as broker:
        broker.revive(topology.run_topology(run.name, run.participants))


def _build(context: CoordinatorContext, broker: Broker) -> CoordinatorRole:
    def pause(seconds: float) -> None:
        if context.stopping.wait(seconds):
            raise InterruptedRunError(f"run {context.config.run.name}: stopped while it waited")

    return build_coordinator(
        context.config,
        context.store,
        broker,
        context.spool,
        context.clock,
        Patience(HOLD_SECONDS, pause),
        time.monotonic,
        context.key,
    )


def _attend(context: CoordinatorContext, role: CoordinatorRole, pauses: Backoff) -> RunState | None:
    """Handle what comes, tick; the final state, or None when the process is to stop."""
    coordinator = role.coordinator
    connected, next_tick = time.monotonic(), 0.0
    leave_at: float | None = None
    while not context.stopping.is_set():
        now = time.monotonic()
        if now >= next_tick:
            taken = role.tick()
            if coordinator.active:
                role.look()
                _hear_operators(coordinator)
            next_tick = now + (TICK_SECONDS if taken else REJECTED_SECONDS)
        was_active = coordinator.active
        role.dispatcher.handle_next(min(0.5, max(0.0, next_tick - now)))
        if not coordinator.active:
            if now - connected > STEADY_SECONDS:
                pauses.reset()
            continue
        if not was_active:
            get_logger().info("coordinator.active", run=context.config.run.name)
        pauses.reset()
        state = coordinator.state
        if state.finished is not None:
            if leave_at is None:
                leave_at = time.monotonic() + context.linger_seconds
            if not state.owed_losses or time.monotonic() > leave_at:
                coordinator.liveness.write(state, context.clock())
                role.leave()
                return state
    return None


def _hear_operators(coordinator: Coordinator) -> None:
    """Their words lie in the store: they are read however much lies in the queue."""
    try:
        coordinator.notice_controls()
        coordinator.notice_accounts()
    except StoreUnavailableError as error:  # a delivery waits for the store; this comes again
        get_logger().debug("controls.skipped", reason=str(error))
