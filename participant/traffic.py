"""What a run costs this site on the wire: bytes counted where it fetches, sends and hears.

They are told with a delta, so they are those since the delta before. A count is for people, never
for a decision: one that cannot be written down is lost, and nothing else is.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from shared.config import Sha256, canonical_json
from shared.protocol.manifest import Schema, Traffic

if TYPE_CHECKING:
    from pathlib import Path

    from participant.workspace import Workspace
    from shared.stores.port import Transfer


class Account(Schema):
    """One run's. ``told``: with what is not answered yet, by sha256: it is told again as it was."""

    untold: Traffic = Traffic()
    told: dict[Sha256, Traffic] = Field(default_factory=dict)


class Meter:
    """One site's accounts, kept in its workspace so that a kill forgets none.

    ``down``, ``up``: objects' bytes of this process, of all runs. ``run``: which run the objects
    are for that are under way, ``ready`` whether it is trained in already. Two threads count.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._turn = threading.RLock()
        self._accounts: dict[str, Account] = {}
        self.run: str | None = None
        self.ready = True
        self.down = 0
        self.up = 0

    def fetched(self, size: int) -> None:
        """An object came, for the run in hand."""
        with self._turn:
            self.down += size
            self._count(self.run, Traffic(down=size) if self.ready else Traffic(setup=size))

    def sent(self, size: int) -> None:
        """An object went, or a part of one, of the run in hand."""
        with self._turn:
            self.up += size
            self._count(self.run, Traffic(up=size))

    def said(self, run: str | None, size: int) -> None:
        """A message went. One that names no run is in no count."""
        self._count(run, Traffic(messages_up=size))

    def heard(self, run: str | None, size: int) -> None:
        """A message came."""
        self._count(run, Traffic(messages_down=size))

    def refused(self, run: str) -> None:
        """An update did not lead to the announced adapter."""
        self._count(run, Traffic(refused=1))

    def tell(self, run: str, sha: str) -> Traffic:
        """What is to be told with ``sha``: all that was not told; the same when asked again."""
        with self._turn:
            account = self._account(run)
            if sha not in account.told:
                told = {**account.told, sha: account.untold}
                self._keep(run, Account(told=told))
            return self._accounts[run].told[sha]

    def answered(self, run: str, sha: str, *, taken: bool) -> None:
        """What was told with ``sha`` is on record now; or, if not taken, is to be told again."""
        with self._turn:
            account = self._account(run)
            told = dict(account.told)
            spent = told.pop(sha, None)
            if spent is not None:
                untold = account.untold if taken else account.untold + spent
                self._keep(run, Account(untold=untold, told=told))

    def forget(self, run: str) -> None:
        """The run was begun anew under its name."""
        with self._turn:
            self._accounts.pop(run, None)
            with contextlib.suppress(OSError):
                self._path(run).unlink(missing_ok=True)

    def _count(self, run: str | None, spent: Traffic) -> None:
        if run is None:
            return
        with self._turn:
            account = self._account(run)
            self._keep(run, account.model_copy(update={"untold": account.untold + spent}))

    def _account(self, run: str) -> Account:
        if run not in self._accounts:
            try:
                kept = Account.model_validate_json(self._path(run).read_bytes())
            except (OSError, ValidationError):
                kept = Account()
            self._accounts[run] = kept
        return self._accounts[run]

    def _keep(self, run: str, account: Account) -> None:
        """Whole, but not durably: what a power cut forgets is a count."""
        self._accounts[run] = account
        path = self._path(run)
        with contextlib.suppress(OSError):  # no folder yet: the run is not accepted so far
            new = path.with_suffix(".new")
            new.write_bytes(canonical_json(account.model_dump(mode="json")))
            new.replace(path)

    def _path(self, run: str) -> Path:
        return self._workspace.traffic_path(run)


class Counted:
    """A ``Transfer`` that counts."""

    def __init__(self, transfer: Transfer, meter: Meter) -> None:
        self._transfer = transfer
        self._meter = meter

    def check(self, url: str) -> None:
        """See the port."""
        self._transfer.check(url)

    def download(self, url: str, path: Path, sha256: str) -> int:
        """See the port."""
        size = self._transfer.download(url, path, sha256)
        self._meter.fetched(size)
        return size

    def upload(self, url: str, path: Path, start: int, length: int) -> None:
        """See the port."""
        self._transfer.upload(url, path, start, length)
        self._meter.sent(length)
