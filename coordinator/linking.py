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

from coordinator.batching import at_once
from shared import topology
from shared.errors import ConfigError, LedgerDamagedError, ObjectMissingError
from shared.protocol.ledger import bytes_of
from shared.protocol.links import MOST_NAMED, Walk, signed
from shared.protocol.records import LinkRecord
from shared.trust.keys import PublicKey

if TYPE_CHECKING:
    from shared.protocol.ledger import Ledger
    from shared.protocol.links import Head

_READ_TOGETHER = 200  # links
_END = "finished.json"


class Links:
    """One run's chain, as its active coordinator goes on with it, signed by the ledger's key.

    It holds nothing that ``reload`` and reading the records again could not rebuild.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._prefix = topology.run_prefix(ledger.run)
        self._walk = Walk()
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

        Raises LedgerDamagedError for a link that does not fit, ConfigError for another key.
        """
        self._walk, self._found = Walk(), {}
        store, prefix = self._ledger.store, topology.links_prefix(self._ledger.run)
        keys = [info.key for info in store.list(prefix)]
        for first in range(0, len(keys), _READ_TOGETHER):
            some = keys[first : first + _READ_TOGETHER]
            calls = [partial(store.get, key) for key in some]
            for key, data in zip(some, at_once(calls), strict=True):
                self._take(key, data.result())
        mine = self._ledger.key.public.text if self._ledger.key else None
        if self._walk.by not in (None, mine):
            raise ConfigError(self._other_key(PublicKey(self._walk.by)))
        began_signed = self._ledger.federation().signed_by is not None
        if began_signed and keys and self._walk.signed_from != 1:
            raise LedgerDamagedError(
                f"{keys[0]}: expected a signed link, as all of this run are, got one without a "
                "signature; restore all links from a copy of the store"
            )
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
        while self._written or self._found:
            records = dict(islice(sorted(self._written.items()), MOST_NAMED))
            found = dict(islice(sorted(self._found.items()), MOST_NAMED - len(records)))
            self._write(records, found)
        return None if self.head is None else str(self.head)

    def _write(self, records: dict[str, str], found: dict[str, str]) -> None:
        head = self.head
        link = LinkRecord(
            run=self._ledger.run,
            number=head.number + 1 if head else 1,
            previous=head.sha if head else None,
            records=records,
            found=found,
        )
        mine = signed(self._ledger.stamped(link), self._ledger.key)
        written = self._ledger.put(mine)
        key = written.key(self._ledger.run)
        # Of a write that seemed to fail and did not, this process meets its own earlier link.
        data = bytes_of(mine) if written is mine else self._ledger.store.get(key)
        self._take(key, data)

    def _take(self, key: str, data: bytes) -> None:
        link = self._ledger.parse(LinkRecord, key, data)
        for problem in self._walk.add(link.number, data, link):
            raise LedgerDamagedError(
                f"{key}: {problem}; restore it from a copy of the store; what else is wrong: "
                f"gradualdiff runs verify {self._ledger.run}"
            )
        for name in link.records | link.found:
            self._written.pop(name, None)
            self._found.pop(name, None)

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
            (self._written if own else self._found)[name] = sha
        elif known != sha:
            raise LedgerDamagedError(
                f"{key}: expected sha256 {known}, as it was recorded, got {sha}: it was altered; "
                "restore this object from a copy of the store"
            )

    def _other_key(self, theirs: PublicKey) -> str:
        mine = self._ledger.key.public.fingerprint if self._ledger.key else "no key"
        return (
            f"trust.key_file: expected the key {theirs.fingerprint}, which signed this run's "
            f"records so far, got {mine}; use that key: a run keeps its key to its end"
        )
