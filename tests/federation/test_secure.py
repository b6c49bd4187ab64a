"""Federations whose deltas are masked: the sum comes out, to the byte, and nothing of one site."""

from __future__ import annotations

from coordinator.audit.verification import verify_run
from shared.protocol.ledger import Ledger
from shared.stores.directory import DirectoryStore
from tests import federations


def config(sites="abcd", rounds=3, **sections):
    """A secure run's settings; int8, so that a delta fits its levels well."""
    return federations.config(
        sites,
        rounds,
        aggregation={"secure": True, "secure_reach": 1.0, **sections.pop("aggregation", {})},
        codec={"name": "int8", "feedback": True, **sections.pop("codec", {})},
        **sections,
    )


def verified(folder, name="test"):
    """What a verification of the run finds."""
    ledger = Ledger(DirectoryStore(folder / "store"), name, "auditor", float)
    scratch = folder / "scratch"
    scratch.mkdir()
    return verify_run(ledger, scratch, lambda _: None)


def test_a_secure_run_ends_and_verifies(tmp_path):
    """Each round is recomputed from masked deltas and what was revealed."""
    state = federations.run(config(), tmp_path)
    assert state.last_round == 3
    found = verified(tmp_path)
    assert found.findings == []
    assert found.recomputed == 3
