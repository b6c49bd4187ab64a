"""A federation in which everybody signs: what is on record of it, and that it is the same run."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from coordinator.audit.signatures import LEEWAY_SECONDS
from coordinator.audit.verification import verify_run
from coordinator.site_keys import SiteKeys, revoke
from shared.config import canonical_json
from shared.errors import RunExistsError
from shared.protocol import wire
from shared.protocol.ledger import Ledger
from shared.protocol.record import SaidRecord
from shared.topology import site_keys_key
from shared.trust.keys import PublicKey, SigningKey
from tests import federations
from tests.steering import Crash, Mortal, store_of

TRUST = {"key_file": "coordinator.key"}


def whole_records(folder, run="test"):
    """Every record as it lies in the store."""
    ledger = Ledger(store_of(folder), run, "test", lambda: 0.0)
    return [ledger.read(place.kind, place.key) for place in ledger.places()]


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    """A folder with a finished run that is signed, and its final state."""
    folder = tmp_path_factory.mktemp("signed")
    return folder, federations.run(federations.config(trust=TRUST), folder)


def test_signatures_change_nothing_of_the_result(signed, tmp_path):
    """The adapter is the one of the same run without keys."""
    assert signed[1].adapter_sha == federations.run(federations.config(), tmp_path).adapter_sha


def test_what_a_site_said_is_on_record_as_it_signed_it(signed):
    """Members, deltas and losses: the site's key alone proves each, for this run."""
    folder, _ = signed
    records = [record for record in whole_records(folder) if isinstance(record, SaidRecord)]
    assert len(records) == 3 + 9 + 3
    birth = Ledger(store_of(folder), "test", "test", lambda: 0.0).birth
    for record in records:
        own = SigningKey.load(folder / "sites" / record.site / "identity.key", "test").public
        assert PublicKey(record.said.by) == own
        seal = record.said.seal()
        seal.check(record.site, f"run:test:{birth}", own)
        assert wire.decode(seal.data).event.run == "test"


def test_a_signed_delta_says_what_it_was_made_of(signed):
    """Try, base model and codec stand in it beside run, round, source, digest and counts."""
    folder, _ = signed
    members = {r.site: r for r in whole_records(folder) if type(r).__name__ == "MemberRecord"}
    accepted = [r for r in whole_records(folder) if type(r).__name__ == "AcceptedRecord"]
    assert len(accepted) == 9
    for record in accepted:
        told = wire.decode(record.said.seal().data).event
        assert (told.attempt, told.codec) == (1, "fp32")
        assert told.fingerprint == members[record.site].fingerprint
        assert (told.round, told.sha, told.examples) == (
            record.round,
            record.sha,
            record.examples,
        )


def test_nothing_of_it_is_kept_in_memory(signed):
    """A member's word is as long as its manifest: the state holds the records without it."""
    state = signed[1]
    assert len(state.members) == 3
    assert all(member.said is None for member in state.members.values())
    assert all(record.said is None for record in state.uncounted.values())


def test_a_run_without_keys_has_the_records_that_it_had(tmp_path):
    """No record has a signature or a key where nobody signs."""
    federations.run(federations.config(rounds=1), tmp_path)
    store = store_of(tmp_path)
    texts = [store.get(info.key) for info in store.list("runs/") if info.key.endswith(".json")]
    assert len(texts) > 5
    assert not any(b'"said"' in text or b'"sign' in text for text in texts)


def test_a_signed_run_goes_on_under_its_own_key_only(signed):
    """Without it, or with another one, the coordinator does not even begin."""
    folder, _ = signed
    with pytest.raises(RunExistsError, match=r"signed by ed25519:.* signs with no key"):
        federations.run(federations.config(), folder)
    (folder / "coordinator.key").rename(folder / "old.key")
    try:
        with pytest.raises(RunExistsError, match=r"signs with ed25519:"):
            federations.run(federations.config(trust=TRUST), folder)
    finally:
        (folder / "old.key").replace(folder / "coordinator.key")
    assert federations.run(federations.config(trust=TRUST), folder).finished is not None


# Verifying ---------------------------------------------------------------------------------------


def verify(folder):
    """Everything that can be checked with the store alone."""
    with tempfile.TemporaryDirectory() as scratch:
        return verify_run(
            Ledger(store_of(folder), "test", "test", lambda: 0.0), Path(scratch), lambda _: None
        )


@pytest.fixture
def copy(signed, tmp_path):
    """The finished run, to be tampered with."""
    shutil.copytree(signed[0], tmp_path / "copy")
    return tmp_path / "copy"


def alter(folder, name, change):
    """Let a store's owner write a record anew."""
    store, key = store_of(folder), f"runs/test/{name}"
    values = json.loads(store.get(key))
    change(values)
    store.put(key, canonical_json(values))


def test_verifying_names_who_signed_what(signed):
    """By site and fingerprint, and how many records stand on it."""
    folder, _ = signed
    found = verify(folder)
    assert found.findings == []
    assert [(one.site, one.records) for one in found.signers] == [("a", 5), ("b", 5), ("c", 5)]
    own = SigningKey.load(folder / "sites" / "a" / "identity.key", "test").public
    assert found.signers[0].fingerprint == own.fingerprint


ACCEPTED = "rounds/00001/accepted/a.json"


@pytest.mark.parametrize(
    ("name", "field", "value", "problem"),
    [
        (ACCEPTED, "tokens", 7, "said: tokens: a signed"),
        ("members/a.json", "examples", 7, "said: examples: a signed"),
        ("rounds/00003/evaluated/a.json", "held_out", None, "said: held_out: a signed"),
        (ACCEPTED, "said", None, "said: expected what a signed, since the run is signed by"),
    ],
)
def test_a_record_that_its_site_did_not_sign_is_named(copy, name, field, value, problem):
    """Whatever a store's owner puts into it, or takes out."""

    def change(values):
        if field == "held_out":
            values["held_out"]["tokens"] += 1
        else:
            values[field] = value

    alter(copy, name, change)
    assert [one.key for one in verify(copy).findings if one.problem.startswith(problem)] == [
        f"runs/test/{name}"
    ]


def test_a_word_of_another_site_or_round_is_named(copy):
    """A true signature under a record that it does not belong to."""
    store = store_of(copy)
    of_b = json.loads(store.get("runs/test/rounds/00001/accepted/b.json"))["said"]
    of_two = json.loads(store.get("runs/test/rounds/00002/accepted/c.json"))["said"]
    alter(copy, ACCEPTED, lambda values: values.update(said=of_b))
    alter(copy, "rounds/00001/accepted/c.json", lambda values: values.update(said=of_two))
    problems = [one.problem for one in verify(copy).findings]
    assert any(one.startswith("said: expected a key that was enrolled for a") for one in problems)
    assert "said: round: c signed 2, the record has 1" in problems


def test_a_key_that_its_owner_put_into_the_store_proves_nothing(copy):
    """Enrolments count by the coordinator's signature only."""
    store = store_of(copy)
    key = SigningKey.load(copy / "coordinator.key", "test").public
    first = site_keys_key(key.fingerprint, 1)  # another test began with another coordinator's
    values = json.loads(store.get(first))
    values["key"] = SigningKey.generate().public.text
    store.put(first, canonical_json(values))
    found = verify(copy).findings
    assert first in {one.key for one in found}
    assert f"runs/test/{ACCEPTED}" in {one.key for one in found}


def test_a_key_that_was_revoked_later_still_proves_what_it_signed(copy):
    """And nothing that is on record for a time after that."""
    signer = SigningKey.load(copy / "coordinator.key", "test")
    keys = SiteKeys(store_of(copy), signer.public)
    now = time.time()
    assert revoke(keys, signer, "a", "laptop lost", "me@here", lambda: now).public
    assert verify(copy).findings == []
    alter(copy, ACCEPTED, lambda values: values.update(time=now + LEEWAY_SECONDS + 1))
    assert [one.key for one in verify(copy).findings] == [f"runs/test/{ACCEPTED}"]


# Killed ------------------------------------------------------------------------------------------


def test_a_signed_run_may_die_at_every_write(tmp_path):
    """Enrolments, records and objects: the same adapter, and every word of a site is proven.

    Before a write and after one, in turn.
    """
    config = federations.config(("a", "b"), rounds=1, trust=TRUST)
    wanted = federations.run(config, tmp_path / "whole").adapter_sha
    at = 0
    while True:
        at += 1
        folder = tmp_path / f"dies-{at}"
        store = Mortal(folder / "store", at, after=at % 2 == 0)
        with contextlib.suppress(Crash):
            federations.run(config, folder, store=store)
        if not store.fired:
            break
        assert federations.run(config, folder).adapter_sha == wanted
        found = verify(folder)
        assert found.findings == []
        assert [(one.site, one.records) for one in found.signers] == [("a", 3), ("b", 3)]
    assert at > 15
