"""``gradualdiff runs delete``, and the lock on a run in a directory store."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.deeds import NO_REASON, ReasonOption, on_record
from gradualdiff.cli.output import (
    DEFAULT_STORE,
    JsonOption,
    RunArgument,
    StoreOption,
    agree,
    console,
    print_json,
)
from gradualdiff.units import megabytes

if TYPE_CHECKING:
    from shared.stores.port import ObjectStore


def delete(
    run: RunArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    reason: ReasonOption = NO_REASON,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Delete a run with all its records and tensors, for good. Its name is then free.

    Refused while a coordinator is active on it. The next one finishes a deletion that was cut off.
    """
    from coordinator.runs.deletion import delete_run, objects_of, refuse_if_active, run_lock
    from coordinator.runs.operating import operator, operator_ledger
    from gradualdiff.store import open_store

    objects = open_store(store, writable=True).objects
    with run_lock(objects, run):
        refuse_if_active(objects, run, time.time())
        going = objects_of(objects, run)
        records = sum(info.key.endswith(".json") for info in going)
        size = sum(info.size for info in going)
        if not as_json:
            console().print(
                f"run {run} ({_state(objects, run)}): {records} records and {len(going) - records} "
                f"other objects go, {megabytes(size)} MB",
                markup=False,
                soft_wrap=True,
            )
        agree(f"Delete run {run} for good?", yes=yes)
        with on_record(objects, store, "run.delete", run, reason):
            delete_run(operator_ledger(objects, run, time.time), operator())
    if as_json:
        print_json({"run": run, "records": records, "objects": len(going), "bytes": size})
    else:
        console().print(f"run {run} is deleted", markup=False)


def _state(store: ObjectStore, run: str) -> str:
    from coordinator.history import read_history
    from coordinator.runs.inspection import DYING, summarise_run
    from shared.errors import LedgerError

    try:
        return summarise_run(read_history(store, run)).state
    except LedgerError:  # cut off in the middle, or damaged: it may go all the same
        return DYING
