"""What a site may say that is finite and yet enormous, and buffers that nobody can fill."""

from __future__ import annotations

import json

import numpy as np
import pytest

from coordinator.round.machine import apply, next_step, replay
from shared.errors import RunFailedError, RunStuckError
from shared.protocol.records import (
    FailedRecord,
    FederationRecord,
    GenesisRecord,
    MemberRecord,
    OpenedRecord,
    RefusedRecord,
)
from tests import federations
from tests.coordinator.test_rounds_machine import accepted
from tests.numpy_learner import MANIFEST, NUMERICS
from tests.steering import ask, records, verify


def test_a_delta_near_the_end_of_fp32_is_refused(tmp_path):
    """Its sum with others could not be stored, and a decision on record must be possible."""
    config = federations.config(sites=("a", "b"), rounds=2, policy={"on_failure": "exclude"})
    sites = federations.learners(config)
    sites["b"].fault = lambda _: lambda spec, _delta: np.full(spec.shape, 3e38, np.float32)
    state = federations.run(config, tmp_path, sites)
    assert state.last_round == 2
    reasons = [record.reason for record in records(tmp_path, RefusedRecord)]
    assert reasons
    assert all(reason.startswith("norm: expected at most 1e+30") for reason in reasons)


@pytest.mark.parametrize("excluded", [True, False])
def test_a_buffer_that_nobody_can_fill_closes_with_what_is_there(tmp_path, excluded):
    """A site was taken out, or fewer are selected than the buffer holds."""
    selection = {} if excluded else {"method": "random", "fraction": 0.3}
    config = federations.config(
        policy={"kind": "buffered", "buffer": 3 if excluded else 2}, selection=selection
    )
    sites = federations.learners(config)
    if excluded:
        asked = []

        def take_c_out(task):
            if task.round == 2 and not asked:
                asked.append(ask(tmp_path, "exclude", "broken", site="c"))

        sites["a"].fault = take_c_out
    assert federations.run(config, tmp_path, sites).last_round == 3
    assert verify(tmp_path).findings == []


def test_the_order_of_refusals_and_failures_does_not_matter():
    """A replay folds them in another order than they came; who is given up stays so."""
    policy = {"on_failure": "exclude", "max_attempts": 3}
    config, source = federations.config(policy=policy), "a" * 64
    begun = [
        FederationRecord(config={}, digest="0" * 64),
        *(
            MemberRecord(
                site=site, manifest=MANIFEST, fingerprint="f" * 64, numerics=NUMERICS, examples=1
            )
            for site in "abc"
        ),
        GenesisRecord(
            members=("a", "b", "c"),
            manifest=MANIFEST,
            fingerprint="f" * 64,
            adapter_sha=source,
            adapter_size=1,
        ),
        OpenedRecord(
            round=1,
            selected=("a", "b", "c"),
            source_sha=source,
            seed=1,
            progress_from=0.0,
            progress_to=0.5,
        ),
    ]
    failed = [
        FailedRecord(round=1, site="c", attempt=n, reason="memory", retryable=True) for n in (1, 2)
    ]
    refused = RefusedRecord(round=1, site="c", sha="b" * 64, reason="damaged")
    steps = []
    for order in ([*failed, refused], [refused, *failed]):
        state = replay(config, [*begun, *order])
        for site in "ab":
            state, _ = apply(state, accepted(site, 1, source))
        steps.append(next_step(state))
    assert steps[0] is not None
    assert steps[0] == steps[1]


def test_who_is_taken_out_before_the_start_is_not_waited_for(tmp_path):
    """The run begins with the others."""
    config = federations.config()
    ask_before(config, tmp_path)
    sites = federations.learners(config)
    del sites["c"]
    state = federations.run(config, tmp_path, sites)
    assert state.genesis is not None
    assert state.genesis.members == ("a", "b")
    assert verify(tmp_path).findings == []


def test_a_start_that_nobody_is_left_for_waits_for_a_person(tmp_path):
    """No genesis without members, and no crash; ``runs stop`` ends it."""
    config = federations.config()
    ask_before(config, tmp_path)
    for site in "ab":
        ask(tmp_path, "exclude", "broken", site=site)
    with pytest.raises(RunStuckError):
        federations.run(config, tmp_path)
    ask(tmp_path, "stop", "nobody left")
    with pytest.raises(RunFailedError, match="nobody left"):
        federations.run(config, tmp_path)


def ask_before(config, folder) -> None:
    from shared.protocol.ledger import Ledger
    from shared.stores.directory import DirectoryStore

    Ledger(DirectoryStore(folder / "store"), config.run.name, "x", lambda: 1.0).begin(config)
    ask(folder, "exclude", "never set up", site="c")


def test_the_same_name_with_other_settings_is_another_run(tmp_path):
    """The store was emptied, the sites' workspaces were not: nobody hands in an old delta."""
    from shared.stores.directory import DirectoryStore

    first = federations.config(rounds=1)
    federations.run(first, tmp_path)
    second = federations.config(rounds=1, training={"local_steps": 50})
    sites = federations.learners(second)
    federations.run(second, tmp_path, sites, store=DirectoryStore(tmp_path / "other"))
    assert [sites[site].trained for site in "abc"] == [[1], [1], [1]]


@pytest.mark.parametrize(
    ("record", "change", "problem"),
    [
        ("closing", {"excluded": {}}, "sites counted or left out"),
        ("closing", {"weighting": "nonsense"}, "weighting: expected equal, got nonsense"),
        ("closing", {"time": 1.0}, "before deadline and grace were over"),
        ("opened", {"deadline_seconds": 1e9}, "deadline: expected fixed 0.2 s"),
        ("opened", {"grace_seconds": 5.0}, "deadline: expected fixed 0.2 s"),
    ],
)
def test_verify_knows_what_a_quorum_may_decide(tmp_path, record, change, problem):
    """Each altered record of a healthy run is named, with its key."""
    policy = {"kind": "quorum", "quorum": 2, "deadline_seconds": 0.2}
    config = federations.config(rounds=1, policy=policy)
    sites = federations.learners(config)

    def fail(_task):
        raise RuntimeError("c fails always")

    sites["c"].fault = fail
    federations.run(config, tmp_path, sites)
    healthy = verify(tmp_path)
    assert (healthy.rounds, healthy.recomputed, healthy.findings) == (1, 1, [])
    path = tmp_path / "store" / f"runs/test/rounds/00001/{record}.json"
    values = json.loads(path.read_text()) | change
    path.chmod(0o644)
    path.write_text(json.dumps(values))
    found = [(finding.key, finding.problem) for finding in verify(tmp_path).findings]
    assert any(
        key.endswith("closing.json" if record == "closing" else "opened.json") and problem in what
        for key, what in found
    ), found


@pytest.mark.parametrize("figure", ["exactness_gap", "mean_norm", "step_norm"])
def test_verify_tells_small_figures_apart(tmp_path, figure):
    """At real learning rates they are far below 1: twice as much is wrong all the same."""
    server = {"optimizer": "fedavgm", "learning_rate": 0.5}
    config = federations.config(rounds=1, server=server)
    sites = federations.learners(config)
    for site in sites.values():
        site.fault = lambda _: lambda _spec, delta: delta * np.float32(1e-7)
    federations.run(config, tmp_path, sites)
    assert verify(tmp_path).findings == []
    path = tmp_path / "store/runs/test/rounds/00001/closed.json"
    values = json.loads(path.read_text())
    assert 0 < values[figure] < 5e-7
    path.chmod(0o644)
    path.write_text(json.dumps(values | {figure: 2 * values[figure]}))
    found = verify(tmp_path).findings
    assert [finding.key for finding in found] == ["runs/test/rounds/00001/closed.json"]
