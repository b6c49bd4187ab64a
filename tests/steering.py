"""An operator for tests: orders, records and a check of the whole chain, over a directory store."""

from __future__ import annotations

import contextlib
import hashlib

from coordinator.audit.links import NOTHING_KNOWN
from coordinator.audit.verification import verify_run
from coordinator.runs.operating import operator_ledger, order
from shared import topology
from shared.errors import ObjectMissingError
from shared.protocol.chain import Head
from shared.protocol.ledger import Ledger
from shared.protocol.records import LinkRecord
from shared.stores.directory import DirectoryStore


class Crash(BaseException):
    """The process dies here."""


class Mortal(DirectoryStore):
    """Dies at its ``at``-th write that changes something, before it or just after it."""

    def __init__(self, root, at, *, after):
        super().__init__(root)
        self.left, self.after, self.fired = at, after, False

    def _write(self, key, write, *, changes=True):
        self.left -= changes
        due = changes and self.left == 0
        if due and not self.after:
            self.fired = True
            raise Crash(key)
        result = write()
        if due:
            self.fired = True
            raise Crash(key)
        return result

    def _is_there(self, key):
        with contextlib.suppress(ObjectMissingError):
            return bool(self.stat(key))
        return False

    def create(self, key, data):
        new = not self._is_there(key)
        return self._write(key, lambda: super(Mortal, self).create(key, data), changes=new)

    def put(self, key, data):
        return self._write(key, lambda: super(Mortal, self).put(key, data))

    def put_file(self, key, path):
        return self._write(key, lambda: super(Mortal, self).put_file(key, path))

    def delete(self, key):
        there = self._is_there(key)
        return self._write(key, lambda: super(Mortal, self).delete(key), changes=there)


def store_of(folder):
    """The store of a federation that lives in ``folder``."""
    return DirectoryStore(folder / "store")


def ask(folder, action, reason="because", run="test", **what):
    """Put an operator's word on record; the record."""
    ledger = operator_ledger(store_of(folder), run, lambda: 7.0)
    return order(ledger, action, reason, **what)


def records(folder, kind, run="test"):
    """All records of a kind, in the order they are folded."""
    ledger = Ledger(store_of(folder), run, "test", lambda: 0.0)
    return [record for record in ledger.history() if isinstance(record, kind)]


def verify(folder, run="test", expected=NOTHING_KNOWN):
    """The whole chain, recomputed."""
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    ledger = Ledger(store_of(folder), run, "test", lambda: 0.0)
    return verify_run(ledger, scratch, lambda _: None, expected)


def forget_links(store, run="test"):
    """Leave the run as a release that knew no links left it."""
    for info in list(store.list(topology.links_prefix(run))):
        store.delete(info.key)


def forget(store, *keys, run="test"):
    """Take records away as if they had never been written, and every link from theirs on."""
    ledger, gone = Ledger(store, run, "test", lambda: 0.0), False
    names = {key.removeprefix(topology.run_prefix(run)) for key in keys}
    for info in list(store.list(topology.links_prefix(run))):
        gone = gone or not names.isdisjoint(ledger.read(LinkRecord, info.key).records)
        if gone:
            store.delete(info.key)
    for key in keys:
        store.delete(key)


def relink(store, key=None, run="test"):
    """Write first record and links anew, each link naming what is there of what it named.

    As whoever holds ``key``; without one as the store's owner can. The new head.
    """
    ledger, prefix, head = Ledger(store, run, "test", lambda: 0.0), topology.run_prefix(run), None
    ledger.key = key
    by = key and key.public.text
    first = ledger.federation().model_copy(update={"signed_by": by})
    store.put(topology.federation_key(run), ledger.bytes_of(first))
    for info in list(store.list(topology.links_prefix(run))):
        link = ledger.read(LinkRecord, info.key)
        keys = {info.key for info in store.list(prefix)}
        left = {
            field: {
                name: hashlib.sha256(store.get(prefix + name)).hexdigest()
                for name in getattr(link, field)
                if prefix + name in keys
            }
            for field in ("records", "found")
        }
        data = ledger.bytes_of(link.model_copy(update=left | {"previous": head and head.sha}))
        store.put(info.key, data)
        head = Head(link.number, hashlib.sha256(data).hexdigest())
    return head
