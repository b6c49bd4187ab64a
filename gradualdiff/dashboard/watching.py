"""The runs of a store, each read once and then only what is new, for all who look at them.

Records never change, so what was read stays in memory. A page waits a moment for news and shows
what is there; while a long run is read for the first time it says so.
"""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from coordinator.runs.following import Reading, look
from coordinator.runs.inspection import summarise_run, with_approvals
from gradualdiff.dashboard.facts import Facts
from shared import topology
from shared.errors import ObjectMissingError
from shared.protocol.ledger import list_runs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coordinator.history import History
    from coordinator.liveness import RunStatus
    from coordinator.runs.following import View
    from coordinator.runs.inspection import RunSummary
    from shared.stores.port import ObjectStore

REFRESH_SECONDS = 1.0
PATIENCE_SECONDS = 0.3  # of a page, before it shows what it has
READERS = 4
MANY = 10_000


class StillReadingError(Exception):
    """A run's records, or without ``run`` the list of runs, are read for the first time."""

    def __init__(self, run: str | None, count: int) -> None:
        of_run = f"the records of run {run} are read for the first time: {count} so far"
        super().__init__(of_run if run else "the store's runs are listed for the first time")
        self.run, self.count = run, count


@dataclass(frozen=True)
class Moment:
    """A run as it was read last. ``keys``: of its records. ``version``: another for other facts."""

    history: History
    status: RunStatus | None
    view: View
    summary: RunSummary
    keys: set[str]
    facts: Facts
    version: int


class Watched:
    """One run. It is read by one thread, and never while somebody is looking."""

    def __init__(self, objects: ObjectStore, run: str, readers: ThreadPoolExecutor) -> None:
        self.run = run
        self._reading = Reading(objects, run, whole=True, seconds=REFRESH_SECONDS)
        self._readers = readers
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._last: Future[Moment] | None = None
        self._due = 0.0
        self._moment: Moment | None = None
        self._count = 0
        self._facts = Facts()

    @contextmanager
    def looking(self) -> Iterator[Moment]:
        """The run, held still. Raises StillReadingError, StoreError, LedgerDamagedError."""
        moment = self.newest()
        if not self._lock.acquire(timeout=PATIENCE_SECONDS):
            raise StillReadingError(self.run, self._reading.follower.count)
        try:
            yield self._moment or moment
        finally:
            self._lock.release()

    def newest(self) -> Moment:
        """What is known, not older than a second where the store is quick enough. Raises as above.

        Its history may grow meanwhile.
        """
        with self._turn:
            if self._last is None or (self._last.done() and time.monotonic() >= self._due):
                self._last = self._readers.submit(self._read)
            last = self._last
        try:
            return last.result(PATIENCE_SECONDS)
        except TimeoutError:
            if self._moment is not None:
                return self._moment
            raise StillReadingError(self.run, self._reading.follower.count) from None

    def _read(self) -> Moment:
        try:
            status, news = self._reading.news()  # takes its time: nobody is to wait for it
        finally:
            self._due = time.monotonic() + REFRESH_SECONDS
        with self._lock:
            now = self._reading.fold(news)
            self._facts.of(now.history)  # here, so that no page waits for those of a long run
            if news is not None and len(news.records) > MANY:
                gc.freeze()  # records stay: looking through all of them again would stop every page
            view = look(now, status, time.time())
            summary = with_approvals(summarise_run(now.history), status)
            keys, before = self._reading.follower.keys, self._moment
            version = 1
            if before is not None:  # the coordinator's clock alone makes no other version
                same = replace(view, seen=None) == replace(before.view, seen=None)
                is_new = not same or summary != before.summary or len(keys) != self._count
                version = before.version + is_new
            self._count = len(keys)
            self._moment = Moment(now.history, status, view, summary, keys, self._facts, version)
            return self._moment


class Watching:
    """All runs of a store. ``objects``: to be read only."""

    def __init__(self, objects: ObjectStore) -> None:
        self.objects = objects
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="dashboard-reader")
        self._runs: dict[str, tuple[str, Watched]] = {}
        self._listed: Future[dict[str, bool]] | None = None
        self._names: dict[str, bool] | None = None
        self._due = 0.0
        self._lock = threading.Lock()

    def runs(self) -> dict[str, bool]:
        """The names of all runs, in order; whether each is being deleted.

        Not older than a second, or ten times what a listing takes. Raises StillReadingError.
        """
        with self._lock:
            listed = self._listed
            if listed is None or (listed.done() and time.monotonic() >= self._due):
                listed = self._listed = self._readers.submit(self._list)
        try:
            return listed.result(PATIENCE_SECONDS)
        except TimeoutError:
            if self._names is None:
                raise StillReadingError(None, 0) from None
            return self._names

    def _list(self) -> dict[str, bool]:
        began = time.monotonic()
        try:
            self._names = list_runs(self.objects)
        finally:  # it lists every object of every run
            now = time.monotonic()
            self._due = now + max(REFRESH_SECONDS, 10 * (now - began))
        return self._names

    def run(self, name: str) -> Watched:
        """One run. Raises RunNotFoundError and StoreUnavailableError."""
        try:
            etag = self.objects.stat(topology.federation_key(name)).etag
        except ObjectMissingError:
            etag = ""  # reading it says what is the matter
        with self._lock:
            known = self._runs.get(name)
            if known is None or known[0] != etag:  # a run of that name was deleted and begun anew
                known = (etag, Watched(self.objects, name, self._readers))
                self._runs[name] = known
            return known[1]

    def close(self) -> None:
        """Take up nothing more."""
        self._readers.shutdown(wait=False, cancel_futures=True)
