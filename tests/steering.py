"""An operator for tests: orders, records and a check of the whole chain, over a directory store."""

from __future__ import annotations

import contextlib

from coordinator.audit.verification import verify_run
from coordinator.runs.operating import operator_ledger, order
from shared.errors import ObjectMissingError
from shared.protocol.ledger import Ledger
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


def verify(folder, run="test"):
    """The whole chain, recomputed."""
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    ledger = Ledger(store_of(folder), run, "test", lambda: 0.0)
    return verify_run(ledger, scratch, lambda _: None)
