"""The log of operators' doings: every entry in its place, and every meddling found and named."""

from __future__ import annotations

import json
import threading

import pytest

from coordinator.audit_log import AuditLog, raw_entries, read_entries, walk
from shared.errors import LedgerDamagedError
from shared.stores.directory import DirectoryStore
from shared.topology import audit_key
from shared.trust.keys import SigningKey
from tests.steering import Crash, Mortal


def log_in(store, signer=None, by="me@here"):
    """The log of one writer."""
    return AuditLog(store, by, lambda: 7.0, broker_account="boss", signer=signer)


@pytest.fixture
def store(tmp_path):
    """Four entries, the last two signed."""
    store = DirectoryStore(tmp_path / "store")
    for number in (1, 2):
        log_in(store).write("run.pause", f"run-{number}", "room")
    key = SigningKey.generate()
    for number in (3, 4):
        log_in(store, key).write("run.resume", f"run-{number}", "")
    return store


def test_an_entry_says_who_did_what_to_what_and_why(store):
    """In order, each naming the one before."""
    first, second, third, _ = read_entries(raw_entries(store))
    assert (first.number, first.what, first.about, first.why) == (1, "run.pause", "run-1", "room")
    assert (first.by, first.broker_account, first.time) == ("me@here", "boss", 7.0)
    assert first.previous is None
    assert second.previous == store.sha256(audit_key(1))
    assert (second.signed_by, third.signed_by is None) == (None, False)
    found = walk(raw_entries(store))
    assert (found.entries, found.signed, found.head) == (4, 2, store.sha256(audit_key(4)))


def test_many_at_once_leave_no_gap(tmp_path):
    """Each writes ten, from a thread and a store of its own."""
    folder = tmp_path / "store"
    DirectoryStore(folder)

    def write(name):
        for number in range(10):
            log_in(DirectoryStore(folder), by=name).write("run.pause", f"{number}", "")

    writers = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    store = DirectoryStore(folder)
    assert walk(raw_entries(store)).entries == 40
    by = [entry.by for entry in read_entries(raw_entries(store))]
    assert {name: by.count(name) for name in "abcd"} == dict.fromkeys("abcd", 10)


GONE = object()


def changed(store, at, /, **fields):
    """Replace an entry by one that says something else."""
    key = audit_key(at)
    entry = json.loads(store.get(key)) | fields
    left = {name: value for name, value in entry.items() if value is not GONE}
    store.put(key, json.dumps(left, sort_keys=True, separators=(",", ":")).encode())


def swap(store):
    """Entries 2 and 3 change places, and their numbers with them."""
    second, third = json.loads(store.get(audit_key(2))), json.loads(store.get(audit_key(3)))
    changed(store, 2, **{**third, "number": 2})
    changed(store, 3, **{**second, "number": 3})


MEDDLING = {
    "a gap": (lambda s: s.delete(audit_key(2)), 2),
    "the first one gone": (lambda s: s.delete(audit_key(1)), 1),
    "a swap": (swap, 2),
    "an edit": (lambda s: changed(s, 2, why="none"), 3),
    "another writer of a signed one": (lambda s: changed(s, 4, by="you@there"), 4),
    "a signature taken off an inner one": (
        lambda s: changed(s, 3, signed_by=GONE, signature=GONE),
        4,
    ),
    "a signature without a key": (lambda s: changed(s, 4, signed_by=GONE), 4),
    "a torn one": (lambda s: s.put(audit_key(2), s.get(audit_key(2))[:20]), 2),
    "other bytes of the same words": (
        lambda s: s.put(audit_key(4), s.get(audit_key(4)) + b" "),
        4,
    ),
    "a foreign object": (lambda s: s.put("audit/00000002.json.bak", b"{}"), 3),
}


@pytest.mark.parametrize("how", MEDDLING)
def test_whatever_is_done_to_the_chain_is_found_and_the_first_bad_entry_named(store, how):
    """An edit of an unsigned entry shows at the one after it."""
    meddle, number = MEDDLING[how]
    meddle(store)
    with pytest.raises(LedgerDamagedError, match=audit_key(number)):
        walk(raw_entries(store))


def test_a_cut_end_shows_against_a_head_that_was_noted(store):
    """Without one nothing could tell; with one the missing number is named."""
    head = walk(raw_entries(store)).head
    log_in(store).write("run.stop", "run-5", "over")
    assert walk(raw_entries(store), head=head).entries == 5
    store.delete(audit_key(5))
    store.delete(audit_key(4))
    assert walk(raw_entries(store)).entries == 3
    with pytest.raises(LedgerDamagedError, match=f"{audit_key(4)}.*{head}"):
        walk(raw_entries(store), head=head)


def test_each_must_be_signed_by_a_trusted_key_if_there_are_some(tmp_path):
    """A whole chain that somebody else wrote anew is one that he cannot sign."""
    mine, other = SigningKey.generate(), SigningKey.generate()
    store = DirectoryStore(tmp_path / "store")
    log_in(store, mine).write("run.pause", "x", "")
    assert walk(raw_entries(store), trusted=[mine.public]).signed == 1
    log_in(store, other).write("run.pause", "x", "")
    with pytest.raises(LedgerDamagedError, match=audit_key(2)):
        walk(raw_entries(store), trusted=[mine.public])
    assert walk(raw_entries(store), trusted=[mine.public, other.public]).signed == 2


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_the_write_leaves_a_whole_chain(tmp_path, after):
    """The next entry takes the number that is free."""
    store = Mortal(tmp_path / "store", 1, after=after)
    with pytest.raises(Crash):
        log_in(store).write("run.pause", "x", "")
    assert store.fired
    assert log_in(store).write("run.resume", "x", "").number == 1 + after
    assert walk(raw_entries(store)).entries == 1 + after
