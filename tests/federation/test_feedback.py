"""Error feedback in whole federations: which residual a round starts from, and what it survives."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from coordinator.audit.verification import verify_run
from coordinator.history import read_history
from coordinator.runs.inspection import show_round
from participant.learner.port import RESIDUAL_FILE
from shared import topology
from shared.protocol.ledger import Ledger
from shared.protocol.records import AcceptedRecord, ClosedRecord, RefusedRecord
from shared.stores.directory import DirectoryStore
from shared.tensors.delta_file import DeltaFile
from shared.tensors.tensor_file import TensorFile
from tests import federations
from tests.federation.test_embedded import Crash, Spoils, restarted
from tests.numpy_learner import MANIFEST

COARSE = {"name": "uniform4"}


def records(folder, kind):
    store = DirectoryStore(folder / "store")
    return [r for r in Ledger(store, "test", "t", lambda: 0.0).history() if isinstance(r, kind)]


def trained(folder, site):
    return folder / "sites" / site / "test" / "trained"


def findings(folder):
    (folder / "scratch").mkdir(exist_ok=True)
    ledger = Ledger(DirectoryStore(folder / "store"), "test", "t", lambda: 0.0)
    return verify_run(ledger, folder / "scratch", lambda _: None).findings


def watched(config):
    """Learners, and all that each trained by round and tensor, before feedback and codec."""
    sites, made = federations.learners(config), {}

    def fault_of(site):
        def fault(task):
            def note(spec, delta):
                made[site, task.round, spec.name] = delta
                return delta

            return note

        return fault

    for name, site in sites.items():
        site.fault = fault_of(name)
    return sites, made


def owed(folder, site, made):
    """What the site trained less what it sent, over all its deltas that were accepted."""
    store, left = (
        DirectoryStore(folder / "store"),
        {s.name: np.zeros(s.shape) for s in MANIFEST.tensors},
    )
    for record in records(folder, AcceptedRecord):
        if record.site != site:
            continue
        path = folder / "delta"
        store.fetch_file(topology.delta_key("test", record.round, site, record.sha), path)
        with DeltaFile(path, MANIFEST) as delta:
            for spec in MANIFEST.tensors:
                left[spec.name] += made[site, record.round, spec.name]
                left[spec.name] -= delta.read(spec)
    return left


def residual(folder, site, number):
    (path,) = trained(folder, site).glob(f"{number:05d}-*/{RESIDUAL_FILE}")
    with TensorFile(path) as file:
        return {name: np.array(file.read(name)) for name in file.layouts}


@pytest.mark.parametrize("codec", ["uniform4", "int4", "sign", "topk"])
def test_a_site_keeps_what_its_codec_left_out(tmp_path, codec):
    """All it sent and the residual of its last delta are all it trained."""
    config = federations.config(rounds=5, codec={"name": codec})
    sites, made = watched(config)
    federations.run(config, tmp_path, sites)
    for site in sites:
        left = residual(tmp_path, site, 5)
        for name, values in owed(tmp_path, site, made).items():
            assert np.abs(values).max() > 1e-3
            np.testing.assert_allclose(left[name], values, atol=1e-5)
    said = [(r.round == 1, r.residual) for r in records(tmp_path, AcceptedRecord)]
    assert set(said) == {(True, "none"), (False, "kept")}
    assert findings(tmp_path) == []


@pytest.mark.parametrize(
    "sections",
    [
        {"codec": {"name": "fp32"}},
        {"codec": {**COARSE, "feedback": False}},
        {"codec": COARSE, "aggregation": {"averaging": "svd"}},
    ],
    ids=["exact", "off", "svd"],
)
def test_nothing_is_kept_where_feedback_is_off_or_without_a_meaning(tmp_path, sections):
    """No residual lies at a site and none stands on record."""
    federations.run(federations.config(**sections), tmp_path)
    assert list(tmp_path.glob(f"sites/**/{RESIDUAL_FILE}")) == []
    key = topology.accepted_key("test", 2, "a")
    assert b"residual" not in DirectoryStore(tmp_path / "store").get(key)


@pytest.mark.parametrize("averaging", ["ffa", "rolora"])
def test_a_factor_that_is_not_trained_keeps_its_residual(tmp_path, averaging):
    """With ``ffa`` there is none of A; with ``rolora`` that of A waits while B is trained."""
    config = federations.config(rounds=4, codec=COARSE, aggregation={"averaging": averaging})
    federations.run(config, tmp_path)
    last = residual(tmp_path, "a", 4)
    both = {spec.name for spec in MANIFEST.tensors}
    assert last.keys() == (both if averaging == "rolora" else {"layer.lora_B.weight"})
    assert findings(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [{}, {"kind": "quorum", "quorum": 2, "deadline_seconds": 900.0, "late": "carry"}],
    ids=["all", "carry"],
)
def test_a_restart_at_any_write_ends_in_the_same_adapter(tmp_path, policy):
    """Die before and after each write to the store: the same residuals, so the same digest."""
    sections = {"policy": policy} if policy else {}
    config = federations.config(("a", "b"), 2, codec=COARSE, **sections)
    for folder in restarted(config, tmp_path):
        assert {r.residual for r in records(folder, AcceptedRecord)} == {"none", "kept"}


def test_a_refused_delta_leaves_the_residual_as_it_was(tmp_path):
    """Trained once more it is the same bytes, and the round after starts from them."""
    config = federations.config(rounds=4, codec=COARSE)
    wanted = federations.run(config, tmp_path / "whole").adapter_sha
    sites = federations.learners(config)
    sites["b"] = Spoils("b", lambda data: data[:-4] + np.float32(np.nan).tobytes(), rounds=(2,))
    folder = tmp_path / "refused"
    with pytest.raises(Exception, match="round 2 waits for b"):
        federations.run(config, folder, sites)
    assert [(r.site, r.round) for r in records(folder, RefusedRecord)] == [("b", 2)]
    assert [path.name[:5] for path in trained(folder, "b").iterdir()] == ["00001"]
    assert federations.run(config, folder).adapter_sha == wanted


def test_a_round_that_a_site_was_left_out_of_changes_nothing_for_its_residual(tmp_path):
    """It failed in round 2 and was refused in round 3: round 4 starts from round 1's residual."""
    config = federations.config(rounds=4, codec=COARSE, policy={"on_failure": "exclude"})
    sites, made = watched(config)
    sites["b"] = Spoils("b", lambda data: data[:-7], rounds=(3,))

    def fault(task):
        if task.round == 2:
            raise ValueError("no memory")

        def keep(spec, delta):
            made["b", task.round, spec.name] = delta
            return delta

        return keep

    sites["b"].fault = fault
    federations.run(config, tmp_path, sites)
    mine = [r for r in records(tmp_path, AcceptedRecord) if r.site == "b"]
    assert [(r.round, r.residual) for r in mine] == [(1, "none"), (4, "kept")]
    left = residual(tmp_path, "b", 4)
    for name, values in owed(tmp_path, "b", made).items():
        np.testing.assert_allclose(left[name], values, atol=1e-5)


def test_a_site_that_is_not_selected_for_rounds_goes_on_from_its_last_delta(tmp_path):
    """One of four trains in a round: each keeps its residual over the others' rounds."""
    selection = {"method": "random", "fraction": 0.25}
    config = federations.config(("a", "b", "c", "d"), 9, selection=selection, codec=COARSE)
    sites, made = watched(config)
    federations.run(config, tmp_path, sites)
    for site, learner in sites.items():
        said = [r.residual for r in records(tmp_path, AcceptedRecord) if r.site == site]
        assert said == ["none", "kept", "kept", "kept", "kept"][: len(learner.trained)]
        if learner.trained:
            left = residual(tmp_path, site, learner.trained[-1])
            for name, values in owed(tmp_path, site, made).items():
                np.testing.assert_allclose(left[name], values, atol=1e-5)
    assert max(len(site.trained) for site in sites.values()) > 2


@pytest.mark.parametrize("damage", ["workspace", "residual", "altered"])
def test_a_lost_residual_is_said_and_the_run_goes_on(tmp_path, damage):
    """The site starts from zeros; the record and the table say that it did."""
    config = federations.config(rounds=3, codec=COARSE)
    wanted = federations.run(config, tmp_path / "whole").adapter_sha
    sites = federations.learners(config)

    def die(task):
        if task.round == 2:
            raise Crash

    sites["a"].fault = die
    folder = tmp_path / "lost"
    with pytest.raises(Crash):
        federations.run(config, folder, sites)
    if damage == "workspace":
        shutil.rmtree(folder / "sites" / "a")
    else:
        (path,) = trained(folder, "a").glob(f"00001-*/{RESIDUAL_FILE}")
        data = path.read_bytes()
        path.unlink()
        if damage == "altered":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    state = federations.run(config, folder)
    said = {(r.site, r.round): r.residual for r in records(folder, AcceptedRecord)}
    assert said.pop(("a", 2)) == "lost"
    assert "lost" not in said.values()
    assert state.adapter_sha != wanted
    assert len(records(folder, ClosedRecord)) == 3
    assert findings(folder) == []
    history = read_history(DirectoryStore(folder / "store"), "test")
    rows = {row.site: row.reason for row in show_round(history, 2)}
    assert rows == {
        "a": "what its codec left out of earlier deltas was lost with its workspace"
    } | dict.fromkeys("bc", "")
