"""A whole run deleted. A deletion that was cut off is told from a run; repeating it finishes it.

The order makes it so: a record says that the run is being deleted, then its first record goes
(without which nobody takes the rest for a run), then all else, and the mark itself last. No
coordinator begins a run with that mark.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from coordinator.arrivals import Arrivals
from coordinator.liveness import read_status
from coordinator.runs.branching import ADAPTER_FILES
from shared import topology
from shared.disk.locks import held
from shared.errors import FencedError, ObjectMissingError, RunNotFoundError
from shared.protocol.records import ClosedRecord, ClosingRecord, DeletingRecord
from shared.stores.directory import DirectoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.protocol.ledger import Ledger
    from shared.stores.port import ObjectInfo, ObjectStore

ACTIVE_SECONDS = 30.0  # a coordinator at work writes its status every five


def objects_of(store: ObjectStore, run: str) -> list[ObjectInfo]:
    """All that there is of a run: records, tensors, uploads, and what its coordinator last saw.

    Raises RunNotFoundError where there is nothing.
    """
    prefixes = (topology.run_prefix(run), topology.inbox_prefix(run))
    found = [info for prefix in prefixes for info in store.list(prefix)]
    with contextlib.suppress(ObjectMissingError):
        found.append(store.stat(topology.status_key(run)))
    if not found:
        raise RunNotFoundError(f"no run {run!r} in this store; see: gradualdiff runs list")
    return found


def has_closed_round(ledger: Ledger) -> bool:
    """Whether a round is decided: before that nothing of a run is worth more than its settings."""
    return any(place.kind in (ClosingRecord, ClosedRecord) for place in ledger.places())


@contextlib.contextmanager
def run_lock(store: ObjectStore, run: str) -> Iterator[None]:
    """Hold a run in a directory store, from its folder's first moment on; elsewhere nothing.

    Raises FencedError when another process of this machine uses it.
    """
    if not isinstance(store, DirectoryStore):
        yield
        return
    folder = store.root / topology.run_prefix(run)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder, f"run {run} in {store.root}"):
        yield


def refuse_if_active(store: ObjectStore, run: str, now: float) -> None:
    """Raises FencedError if a coordinator of this run wrote its status a moment ago."""
    status = read_status(store, run)
    if status is not None and abs(now - status.at) < ACTIVE_SECONDS:
        raise FencedError(
            f"run {run}: a coordinator is active on it (it wrote {abs(now - status.at):.0f} s "
            f"ago); stop it, wait {ACTIVE_SECONDS:.0f} s, then run this command again"
        )


def delete_run(ledger: Ledger, by: str, *, keep_origin: bool = False) -> None:
    """Delete all of a run. May be cut off and repeated.

    ``keep_origin``: but for what it branches from, to begin anew. Raises RunNotFoundError.
    """
    store, run = ledger.store, ledger.run
    objects_of(store, run)
    origin = ledger.origin() if keep_origin else None
    kept = [topology.deleting_key(run)]
    if origin is not None:
        sha = origin.adapter_sha
        kept += [origin.key(run), *(topology.adapter_key(run, sha, f) for f in ADAPTER_FILES)]
    ledger.write(DeletingRecord(by=by))
    store.delete(topology.federation_key(run))
    for info in objects_of(store, run):
        if info.key not in kept:
            store.delete(info.key)
    Arrivals(store).abort(topology.deltas_prefix(run))
    store.delete(topology.deleting_key(run))
