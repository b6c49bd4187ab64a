"""The coordinator's chain of links: after a batch's records are durable, one link names them all.

It comes before anything of the batch is said, so what sites are told is in the chain already. It is
written as any deciding record is: the second of two coordinators meets the other's and is fenced.
What was recorded and not linked when a process died is taken into the next one's first link; so are
the records of operators, and those of a release that knew no links.
"""

from __future__ import annotations

import contextlib
import hashlib
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from coordinator.audit.links import LinkWalk, is_of_operators, lost_keys, signer_of, walk_links
from coordinator.batching import at_once
from shared import topology
from shared.errors import LedgerDamagedError, ObjectMissingError
from shared.protocol.records import LinkRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from coordinator.site_keys import SiteKeys
    from shared.protocol.chain import Head
    from shared.protocol.ledger import Ledger

MOST_NAMED = 1_000  # records in one link; more of them take several
_READ_TOGETHER = 200  # links
_END = "finished.json"


class Links:
    """One run's chain, as its active coordinator goes on with it, signed by the ledger's key.

    ``keys``: the sites' enrolled keys, of which each link names the newest.

    It holds nothing that ``reload`` and reading the records again could not rebuild.
    """

    def __init__(self, ledger: Ledger, keys: SiteKeys | None = None) -> None:
        self._ledger = ledger
        self._keys = keys
        self._prefix = topology.run_prefix(ledger.run)
        self._walk = LinkWalk(by=self._mine)
        self._reloaded = False  # before that, the ledger itself says whose run this is
        self._unseen: set[str] = set()  # named by a link, and not met since the start
        # What no link names yet, by its name below the run: of this process, and of others.
        self._written: dict[str, str] = {}
        self._found: dict[str, str] = {}
        ledger.met = self._met

    @property
    def head(self) -> Head | None:
        """The newest link; None before the first."""
        return self._walk.head

    def reload(self) -> None:
        """Walk the chain in the store. The records are to be read next, and then ``check``.

        Raises LedgerDamagedError for a link that does not fit, and where enrolled keys are gone.
        """
        self._found, self._reloaded = {}, True
        self._walk = walk_links(self._ledger, LinkWalk(by=self._mine), _each)
        if self._keys is not None:
            self._walk.problems += lost_keys(self._walk, self._keys.read_on())
        self._refuse_damage()
        self._unseen = set(self._walk.named)

    def check(self) -> None:
        """Every record that a link names was met, with the bytes that it had. LedgerDamagedError.

        Nothing is decided on a ledger of which somebody took a record away.
        """
        for name in sorted(self._unseen):
            with contextlib.suppress(ObjectMissingError):  # a kind that this release never reads
                self._met(self._prefix + name, self._ledger.store.get(self._prefix + name), False)
                continue
            raise LedgerDamagedError(
                f"{self._prefix}{name}: is missing, and a link names it; restore this object from "
                f"a copy of the store; to see all that is missing: gradualdiff runs verify "
                f"{self._ledger.run}"
            )

    def link(self) -> str | None:
        """Name in the chain what was recorded since the last link; the newest then, if any.

        Raises FencedError where another coordinator wrote the next link, StoreError. May be called
        again after an error.
        """
        if _END in self._written:
            self._meet_all()
        while self._written or self._found or self._is_news(self._newest_key()):
            records = dict(islice(sorted(self._written.items()), MOST_NAMED))
            found = dict(islice(sorted(self._found.items()), MOST_NAMED - len(records)))
            self._write(records, found)
        return None if self.head is None else str(self.head)

    def _write(self, records: dict[str, str], found: dict[str, str]) -> None:
        head = self.head
        link = LinkRecord(
            run=self._ledger.run,
            number=self._walk.due,
            previous=head.sha if head else None,
            records=records,
            found=found,
            keys=self._newest_key(),
        )
        mine = self._ledger.stamped(link)
        written = self._ledger.put(mine)
        key = written.key(self._ledger.run)
        # Of a write that seemed to fail and did not, this process meets its own earlier link.
        data = self._ledger.bytes_of(mine) if written is mine else self._ledger.store.get(key)
        taken = self._walk.take(self._ledger, key, data)
        self._refuse_damage()
        for name in taken.records | taken.found if taken else ():
            self._written.pop(name, None)
            self._found.pop(name, None)

    def _refuse_damage(self) -> None:
        for key, problem in self._walk.problems:
            raise LedgerDamagedError(
                f"{key}: {problem}; restore it from a copy of the store; what else is wrong: "
                f"gradualdiff runs verify {self._ledger.run}"
            )

    def _newest_key(self) -> str | None:
        head = self._keys.chain.head if self._keys else None
        return str(head) if head else None

    def _is_news(self, key: str | None) -> bool:
        """Whether a key was enrolled or revoked that no link names; after the end none comes."""
        return key not in (None, self._walk.keys) and _END not in self._walk.named

    @property
    def _mine(self) -> str | None:
        return self._ledger.key.public.text if self._ledger.key else None

    def _meet_all(self) -> None:
        """At the end: what operators recorded since, and what a killed one left, is linked too."""
        for place in self._ledger.places():
            name = place.key.removeprefix(self._prefix)
            if not any(name in known for known in (self._walk.named, self._written, self._found)):
                with contextlib.suppress(ObjectMissingError):
                    self._met(place.key, self._ledger.store.get(place.key), False)

    def _met(self, key: str, data: bytes, own: bool) -> None:
        """A record was read or written; called by several threads at once."""
        name = key.removeprefix(self._prefix)
        if name.startswith("chain/"):
            return
        sha = hashlib.sha256(data).hexdigest()
        self._unseen.discard(name)
        known = self._walk.named.get(name)
        if known is None:
            known = self._written.get(name) or self._found.get(name)
        if known is None:
            if not own:
                self._check_writer(key, name, data)
            (self._written if own else self._found)[name] = sha
        elif known != sha:
            raise LedgerDamagedError(
                f"{key}: expected sha256 {known}, as it was recorded, got {sha}: it was altered; "
                "restore this object from a copy of the store"
            )

    def _check_writer(self, key: str, name: str, data: bytes) -> None:
        """What no link names a coordinator wrote that died before its link, or somebody else."""
        if self._mine is None or is_of_operators(name) or not self._reloaded:
            return
        if signer_of(self._ledger, key, data) != self._mine:
            raise LedgerDamagedError(
                f"{key}: expected the signature of the coordinator, which signs all that it "
                "records, got none, and no link names it: somebody else put it there; keep a copy, "
                "take it away, and find out who can write into this store"
            )


def _each(get: Callable[[str], bytes], keys: Sequence[str]) -> Iterator[bytes]:
    for first in range(0, len(keys), _READ_TOGETHER):
        calls = [partial(get, key) for key in keys[first : first + _READ_TOGETHER]]
        yield from (done.result() for done in at_once(calls))
