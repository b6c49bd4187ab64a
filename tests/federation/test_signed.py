"""A federation in which everybody signs: what is on record of it, and that it is the same run."""

from __future__ import annotations

import pytest

from shared.errors import RunExistsError
from shared.protocol import wire
from shared.protocol.ledger import Ledger
from shared.protocol.record import SaidRecord
from shared.trust.keys import PublicKey, SigningKey
from tests import federations
from tests.steering import store_of

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
    for record in records:
        own = SigningKey.load(folder / "sites" / record.site / "identity.key", "test").public
        assert PublicKey(record.said.by) == own
        seal = record.said.seal()
        seal.check(record.site, "run:test", own)
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
    """No record names a signature or a key where nobody signs."""
    federations.run(federations.config(rounds=1), tmp_path)
    store = store_of(tmp_path)
    texts = [store.get(info.key) for info in store.list("runs/") if info.key.endswith(".json")]
    assert len(texts) > 5
    assert not any(b'"said"' in text or b'"signed_by"' in text for text in texts)


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
