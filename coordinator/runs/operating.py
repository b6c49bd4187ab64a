"""An operator's word put on record: what may be asked of a run now, and the record of it.

Written by whoever has the store's key, beside the coordinator and never in its place: it decides
nothing. The coordinator looks every few seconds, and at its start.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import uuid
from typing import TYPE_CHECKING, Literal

from coordinator.round.controls import steer
from shared import topology
from shared.errors import ConfigError, LedgerError, ObjectMissingError
from shared.protocol.ledger import Ledger
from shared.protocol.records import (
    ClosedRecord,
    ControlRecord,
    FinishedRecord,
    GenesisRecord,
    OpenedRecord,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from shared.stores.port import ObjectStore

Action = Literal["pause", "resume", "stop", "extend", "exclude"]


def operator_ledger(store: ObjectStore, run: str, clock: Callable[[], float]) -> Ledger:
    """A ledger to write into as an operator: each call is a writer of its own."""
    return Ledger(store, run, f"operator-{uuid.uuid4().hex[:12]}", clock)


def operator() -> str:
    """Who is at the keyboard: account@machine."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's account need not have a name
        name = f"uid-{os.getuid()}"
    return f"{name}@{socket.gethostname()}"


def order(
    ledger: Ledger,
    action: Action,
    reason: str,
    around: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    *,
    rounds: int | None = None,
    site: str | None = None,
) -> ControlRecord | None:
    """Put it on record; None where that is in force already. ``around``: it is done inside.

    Raises RunNotFoundError, ConfigError (no such site), LedgerError (the run is finished, or about
    to stop).
    """
    config = ledger.config()
    refuse_if_finished(ledger)
    steering = steer(tuple(ledger.controls()))
    if steering.stopped is not None:
        raise LedgerError(
            f"run {ledger.run} was stopped by an operator ({steering.stopped}) and cannot be "
            f"resumed; to continue from one of its rounds: {branch_command(ledger)}"
        )
    if site is not None and site not in config.run.participants:
        raise ConfigError(f"site: expected one of {', '.join(config.run.participants)}, got {site}")
    nothing_new = {
        "pause": steering.paused is not None,
        "resume": steering.paused is None,
        "exclude": site in steering.excluded,
    }
    if nothing_new.get(action, False):
        return None

    def make(number: int) -> ControlRecord:
        return ControlRecord(
            number=number, action=action, rounds=rounds, site=site, reason=reason, by=operator()
        )

    with around():
        record = ledger.append(make, topology.control_prefix(ledger.run))
        # It may have ended between the two; then the record says nothing.
        refuse_if_finished(ledger)
    return record


def refuse_if_finished(ledger: Ledger) -> None:
    """Raises LedgerError, naming what is possible then, if the run has ended."""
    try:
        finished = ledger.read(FinishedRecord, topology.finished_key(ledger.run))
    except ObjectMissingError:
        return
    raise LedgerError(
        f"run {ledger.run} is finished ({finished.reason}): it accepts no further commands; "
        f"to continue from one of its rounds: {branch_command(ledger)}"
    )


def branch_command(ledger: Ledger) -> str:
    """The command that continues from the last result."""
    return f"gradualdiff runs branch {ledger.run} --at {max(last_closed(ledger), 0)} --name NEW"


def last_closed(ledger: Ledger) -> int:
    """The last round with a result; 0 is genesis; -1 before it."""
    results = (GenesisRecord, ClosedRecord)
    return max((place.round or 0 for place in ledger.places() if place.kind in results), default=-1)


def open_round(ledger: Ledger) -> int | None:
    """The round that is open now; None between rounds and before the first."""
    number = last_closed(ledger) + 1
    try:
        ledger.read(OpenedRecord, topology.round_key(ledger.run, number, "opened"))
    except ObjectMissingError:
        return None
    return number
