"""Whole runs of each averaging mode with numpy learners: what travels, what stays, what comes out.

The dense matrices are made here, from the deltas on record, and nowhere else.
"""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from coordinator.history import read_history
from coordinator.runs.branching import branch_run
from coordinator.runs.export import export_adapter
from shared import modes, topology
from shared.adapters import Factor, lora
from shared.adapters.lora import KIND, Lora
from shared.errors import ConfigError, DivergedError, RunFailedError, RunStuckError
from shared.methods.averaging import delta_manifest, get_averaging, svd
from shared.protocol.ledger import Ledger
from shared.protocol.records import (
    AcceptedRecord,
    ClosedRecord,
    ClosingRecord,
    GenesisRecord,
    RefusedRecord,
)
from shared.tensors.delta_file import DeltaFile
from shared.tensors.tensor_file import TensorFile
from tests.federations import config, learners, run
from tests.numpy_learner import MANIFEST
from tests.steering import Crash, Mortal, ask, records, store_of, verify

LORA = {"rank": 4, "alpha": 8.0}
A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def settings(averaging, ranks=None, rounds=3, **sections):
    # Deltas of several ranks differ in norm, and the tests compute plain means.
    aggregation = {"averaging": averaging, "clip_to_median": "off"}
    aggregation |= sections.pop("aggregation", {})
    lora = {**LORA, "ranks": ranks or {}}
    if averaging == "flora":
        sections = {"base": {"model": "none", "quantisation": "none"}, **sections}
    return config(rounds=rounds, lora=lora, aggregation=aggregation, **sections)


def adapters(folder):
    """Each round's adapter, A(1) first, as arrays by name."""
    found = []
    for record in records(folder, GenesisRecord) + records(folder, ClosedRecord):
        path = folder / f"read-{len(found)}"
        store_of(folder).fetch_file(topology.adapter_key("test", record.adapter_sha), path)
        with TensorFile(path) as file:
            found.append({name: file.read(name).copy() for name in file.layouts})
    return found


def deltas(folder, settings, number):
    """The deltas that round ``number`` counted: (weight, arrays by name)."""
    closing = records(folder, ClosingRecord)[number - 1]
    found = []
    for item in closing.inputs:
        path = folder / "delta"
        key = topology.delta_key("test", item.from_round, item.site, item.sha)
        store_of(folder).fetch_file(key, path)
        manifest = delta_manifest(MANIFEST, settings, item.site, item.from_round)
        with DeltaFile(path, manifest) as file:
            values = {spec.name: file.read(spec).copy() for spec in manifest.tensors}
        found.append((item.weight, values))
    return found


def best_fit(matrix, rank):
    u, s, v = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ v[:rank], math.sqrt(float(np.sum(s[rank:] ** 2)))


@pytest.mark.parametrize("averaging", ["ffa", "rolora"])
def test_only_the_trained_factor_travels_and_the_other_keeps_its_bytes(tmp_path, averaging):
    """Round by round; the run ends, is recomputed without a finding, and every gap is 0.0."""
    chosen = settings(averaging)
    state = run(chosen, tmp_path)
    assert state.last_round == 3
    found = adapters(tmp_path)
    for number, closed in enumerate(records(tmp_path, ClosedRecord), start=1):
        trained = A if averaging == "rolora" and number == 2 else B
        kept = B if trained == A else A
        before, after = found[number - 1], found[number]
        assert after[kept].tobytes() == before[kept].tobytes()
        assert after[trained].tobytes() != before[trained].tobytes()
        counted = deltas(tmp_path, chosen, number)
        assert [set(values) for _, values in counted] == [{trained}] * 3
        mean = sum(weight * values[trained].astype(float) for weight, values in counted)
        assert np.abs(before[trained] + mean - after[trained]).max() < 1e-6
        assert closed.exactness_gap == 0.0
    assert verify(tmp_path).findings == []


def test_half_the_bytes_travel(tmp_path):
    """A and B are of one size here, so a delta of one of them is half of a delta of both."""
    sizes = {}
    for averaging in ("fedavg", "ffa"):
        wide = settings(averaging, rounds=1)
        run(wide, tmp_path / averaging)
        sizes[averaging] = [r.size for r in records(tmp_path / averaging, AcceptedRecord)]
    header = 400
    for whole, half in zip(sizes["fedavg"], sizes["ffa"], strict=True):
        assert half < 0.6 * whole + header


def test_fedavg_records_its_gap(tmp_path):
    """Against the dense matrices of its own deltas; no other tensor changes."""
    chosen = settings("fedavg")
    run(chosen, tmp_path)
    found = adapters(tmp_path)
    for number, closed in enumerate(records(tmp_path, ClosedRecord), start=1):
        before = found[number - 1]
        sites = [
            (weight, *(before[name] + values[name].astype(float) for name in (B, A)))
            for weight, values in deltas(tmp_path, chosen, number)
        ]
        product = sum(weight * b @ a for weight, b, a in sites)
        apart = sum(w * b for w, b, _ in sites) @ sum(w * a for w, _, a in sites)
        assert closed.exactness_gap == pytest.approx(np.linalg.norm(product - apart), rel=6e-4)
        assert closed.exactness_gap > 0
    assert verify(tmp_path).findings == []


@pytest.mark.parametrize("ranks", [{}, {"b": 2, "c": 1}])
def test_svd_is_the_best_fit_of_the_dense_mean(tmp_path, ranks):
    """Also where sites have other ranks: each trains the first rows and columns of the adapter."""
    chosen = settings("svd", ranks)
    sites = learners(chosen)
    run(chosen, tmp_path, sites)
    found = adapters(tmp_path)
    for number, closed in enumerate(records(tmp_path, ClosedRecord), start=1):
        before, after = found[number - 1], found[number]
        mean = 0
        for site, (weight, values) in zip("abc", deltas(tmp_path, chosen, number), strict=True):
            rank = ranks.get(site, 4)
            assert values[A].shape == (rank, 8)
            assert values[B].shape == (8, rank)
            mean = mean + weight * (before[B][:, :rank] + values[B].astype(float)) @ (
                before[A][:rank] + values[A].astype(float)
            )
        wanted, residual = best_fit(mean, 4)
        assert np.abs(after[B].astype(float) @ after[A] - wanted).max() < 1e-6
        assert closed.exactness_gap == pytest.approx(residual, rel=6e-4)
        # In the order of their weight, so that the first are the best of a lower rank.
        norms = np.linalg.norm(after[A], axis=1)
        assert (np.diff(norms) <= 0).all()
        assert np.allclose(norms, np.linalg.norm(after[B], axis=0), rtol=1e-5)
    assert verify(tmp_path).findings == []
    first = {r.site: r.traffic.down for r in records(tmp_path, AcceptedRecord) if r.round == 1}
    assert {site for site, came in first.items() if came} == set(ranks)  # others draw it
    genesis = records(tmp_path, GenesisRecord)[0]
    assert [layer.right.shape for layer in KIND.layers(genesis.manifest)] == [(4, 8)]


def test_genesis_has_the_full_rank_even_if_no_site_does(tmp_path):
    """The first member's manifest is no measure of the run's."""
    chosen = settings("svd", {"a": 1, "b": 2, "c": 2}, rounds=2)
    run(chosen, tmp_path)
    assert adapters(tmp_path)[0][A].shape == (4, 8)
    assert verify(tmp_path).findings == []


@pytest.mark.parametrize(("ranks", "codec"), [({}, "int8"), ({"b": 2, "c": 1}, "fp32")])
def test_floras_product_is_the_sum_of_all_that_the_sites_sent(tmp_path, ranks, codec):
    """Round by round, with a site that is left out of the second; what is trained begins anew."""
    policy = {"on_failure": "exclude", "max_attempts": 1}
    chosen = settings("flora", ranks, policy=policy, codec={"name": codec})
    sites = learners(chosen)
    sites["b"].fault = fails_in_round(2)
    run(chosen, tmp_path, sites)
    found, total, rank = adapters(tmp_path), 0, 4
    first = found[0]
    for number, closed in enumerate(records(tmp_path, ClosedRecord), start=1):
        after = found[number]
        names = [item.site for item in records(tmp_path, ClosingRecord)[number - 1].inputs]
        assert names == (["a", "c"] if number == 2 else ["a", "b", "c"])
        for site, (weight, values) in zip(names, deltas(tmp_path, chosen, number), strict=True):
            own = ranks.get(site, 4)
            assert values[A].shape == (own, 8)
            total = total + weight * values[B].astype(float) @ (
                first[A][:own] + values[A].astype(float)
            )
            rank += own
        assert (after[A].shape, after[B].shape) == ((rank, 8), (8, rank))
        assert np.abs(after[B].astype(float) @ after[A] - total).max() < 1e-5
        assert after[A][:4].tobytes() == first[A].tobytes()
        assert not after[B][:, :4].any()
        assert closed.exactness_gap == 0.0
    assert verify(tmp_path).findings == []


def fails_in_round(number):
    """A training that fails in one round."""

    def fault(task):
        if task.round == number:
            raise DivergedError("not this time")

    return fault


def test_floras_adapters_say_their_rank_to_peft_and_in_the_model_card(tmp_path):
    """Alpha / r is 2 in every round: 4, then 4 + 7, then 4 + 14; another config is a finding."""
    run(settings("flora", {"b": 2, "c": 1}, rounds=2), tmp_path)
    store = store_of(tmp_path)
    results = records(tmp_path, GenesisRecord) + records(tmp_path, ClosedRecord)
    keys = [topology.adapter_key("test", r.adapter_sha, "adapter_config.json") for r in results]
    made = [json.loads(store.get(key)) for key in keys]
    assert [(one["r"], one["lora_alpha"]) for one in made] == [(4, 8), (11, 22), (18, 36)]
    history = read_history(store, "test")
    export_adapter(history, store, tmp_path / "out", 1)
    assert "(r=11, alpha=22, scaling classic)" in (tmp_path / "out" / "README.md").read_text()
    store.put(keys[1], store.get(keys[2]))
    assert [finding.key for finding in verify(tmp_path).findings] == [keys[1]]


def test_a_decision_of_flora_that_is_lost_is_the_only_finding(tmp_path):
    """The ranks after it follow from no record then, and are no findings of their own."""
    run(settings("flora", {"b": 2}, rounds=2), tmp_path)
    key = topology.round_key("test", 1, "closing")
    store_of(tmp_path).delete(key)
    assert {finding.key for finding in verify(tmp_path).findings} == {key}


def test_a_lost_decision_hides_no_damaged_config_of_the_other_modes(tmp_path):
    """Their rank is the run's, whatever the rounds counted."""
    run(settings("ffa", rounds=2), tmp_path)
    store = store_of(tmp_path)
    last = records(tmp_path, ClosedRecord)[-1].adapter_sha
    config = topology.adapter_key("test", last, "adapter_config.json")
    lost = topology.round_key("test", 1, "closing")
    store.delete(lost)
    store.put(config, b"{}")
    assert {finding.key for finding in verify(tmp_path).findings} == {lost, config}


def test_flora_goes_on_beyond_the_rounds_that_were_asked_for(tmp_path):
    """An adapter has room for as many stacks as there are rounds."""
    chosen = settings("flora", rounds=2)
    sites = learners(chosen)
    real = sites["a"].learn

    def learn(task, *rest):
        if task.round == 2 and not sites["a"].trained[1:]:
            ask(tmp_path, "extend", rounds=1)
        return real(task, *rest)

    sites["a"].learn = learn
    assert run(chosen, tmp_path, sites).last_round == 3
    assert adapters(tmp_path)[-1][A].shape == (4 + 3 * 12, 8)
    assert verify(tmp_path).findings == []


def test_flora_has_no_branches(tmp_path):
    """Neither from its adapters, which no site of a branch could hold, nor into it."""
    run(settings("flora", rounds=1), tmp_path / "parent")
    store = store_of(tmp_path / "parent")
    ledgers = [Ledger(store, name, "operator", lambda: 7.0) for name in ("test", "child")]
    with pytest.raises(ConfigError, match=r'averaging = "flora" cannot be branched'):
        branch_run(ledgers[0], 1, ledgers[1])
    assert list(store.list("runs/child/")) == []
    run(settings("fedavg", rounds=1), tmp_path)
    ledgers = [Ledger(store_of(tmp_path), n, "operator", lambda: 7.0) for n in ("test", "child")]
    branch_run(ledgers[0], 1, ledgers[1])
    with pytest.raises(RunFailedError, match=r'"flora" begins with an adapter that changes'):
        run(settings("flora", rounds=1, name="child"), tmp_path)


@pytest.mark.parametrize("averaging", ["ffa", "rolora", "svd", "flora"])
@pytest.mark.parametrize(("at", "after"), [(8, True), (17, False), (22, True), (25, False)])
def test_a_coordinator_killed_at_a_write_ends_in_the_same_adapter(tmp_path, averaging, at, after):
    """To the sha256, whichever write it died at."""
    ranks = {"b": 2} if averaging in ("svd", "flora") else None
    chosen = settings(averaging, ranks, rounds=2)
    whole = run(chosen, tmp_path / "whole")
    folder = tmp_path / "killed"
    store = Mortal(folder / "store", at, after=after)
    with pytest.raises(Crash):
        run(chosen, folder, store=store)
    assert store.fired
    assert run(chosen, folder).adapter_sha == whole.adapter_sha
    assert verify(folder).findings == []


@pytest.mark.parametrize(
    ("averaging", "other", "says"),
    [
        ("ffa", "fedavg", r"lora_A.*expected 1 tensors without it, got 2"),
        ("rolora", "svd", r"lora_A.*expected 1 tensors without it, got 2"),
        ("fedavg", "ffa", r"lora_A.*expected it, got a file without it"),
        ("flora", "ffa", r"lora_A.*expected it, got a file without it"),
    ],
)
def test_a_delta_of_the_wrong_tensors_is_refused(tmp_path, averaging, other, says):
    """A site of an older release sends both factors: the refusal names the tensor."""
    chosen = settings(averaging, rounds=1, policy={"on_failure": "exclude", "max_attempts": 1})
    sites = learners(chosen)
    real = sites["c"].learn

    def learn(task, *rest):
        return real(task.model_copy(update={"averaging": other}), *rest)

    sites["c"].learn = learn
    run(chosen, tmp_path, sites)
    refused = records(tmp_path, RefusedRecord)
    assert [record.site for record in refused] == ["c"]
    assert re.search(says, refused[0].reason)
    assert [item.site for item in records(tmp_path, ClosingRecord)[0].inputs] == ["a", "b"]


@pytest.mark.parametrize("averaging", ["svd", "flora"])
def test_a_delta_of_another_rank_than_the_sites_is_refused(tmp_path, averaging):
    """A site of rank 2 sends the whole rank: the shape is not what its settings give."""
    chosen = settings(averaging, {"c": 2}, policy={"on_failure": "exclude", "max_attempts": 1})
    sites = learners(chosen)
    real = sites["c"].learn

    def learn(task, *rest):
        sites["c"].manifest = MANIFEST
        return real(task, *rest)

    sites["c"].learn = learn
    run(chosen, tmp_path, sites)
    assert r"expected shape (2, 8), got (4, 8)" in records(tmp_path, RefusedRecord)[0].reason


def test_a_site_with_another_rank_than_its_settings_is_waited_for(tmp_path):
    """Named, with the rank that it should have; here nobody is left to mend it."""
    chosen = settings("svd", {"c": 2})
    sites = learners(chosen)
    real = sites["c"].prepare

    def prepare(announced, report):
        other = announced.lora.model_copy(update={"rank": 3})
        return real(announced.model_copy(update={"lora": other}), report)

    sites["c"].prepare = prepare
    with pytest.raises(RunStuckError, match=r"c trains factors of another rank than the 2"):
        run(chosen, tmp_path, sites)


@pytest.mark.parametrize(("factor", "differs"), [(1 + 1e-6, False), (1.01, True)])
def test_a_fit_of_another_cpu_is_a_note_and_another_fit_a_finding(
    tmp_path, monkeypatch, factor, differs
):
    """One round fitted a little otherwise, as LAPACK may elsewhere; or a lot, as nothing would."""
    real, fired = svd.fit, []

    def other(lefts, rights, spare):
        fired.append(1)
        found = real(lefts, rights, spare)
        return found._replace(b=found.b * factor)

    monkeypatch.setattr(svd, "fit", other)
    run(settings("svd", rounds=2), tmp_path)
    monkeypatch.undo()
    assert len(fired) == 2
    result = verify(tmp_path)
    assert result.recomputed == 2
    if differs:
        assert {finding.round for finding in result.findings} == {1, 2}
        assert all("adapter_sha: expected" in finding.problem for finding in result.findings)
        assert result.notes == []
    else:
        assert result.findings == []
        assert [note.round for note in result.notes] == [1, 2]
        assert all("equal to within 1.0e-06" in note.problem for note in result.notes)


def test_each_site_is_told_its_own_rank_and_nobody_elses(tmp_path):
    """And the alpha that keeps the scale: alpha / r is 2 at each of them."""
    chosen = settings("svd", {"c": 1}, rounds=1)
    sites, told = learners(chosen), {}
    for name, site in sites.items():
        real = site.prepare

        def prepare(announced, report, name=name, real=real):
            told[name] = announced.lora
            return real(announced, report)

        site.prepare = prepare
    run(chosen, tmp_path, sites)
    assert {name: (lora.rank, lora.alpha) for name, lora in told.items()} == {
        "a": (4, 8.0),
        "b": (4, 8.0),
        "c": (1, 2.0),
    }
    assert all(lora.ranks == {} for lora in told.values())


def test_an_altered_adapter_of_svd_is_still_found(tmp_path):
    """Its bytes are not those of its name: no tolerance for that."""
    run(settings("svd", rounds=2), tmp_path)
    sha = records(tmp_path, ClosedRecord)[-1].adapter_sha
    store, key = store_of(tmp_path), topology.adapter_key("test", sha)
    data = bytearray(store.get(key))
    data[-1] ^= 1
    store.put(key, bytes(data))
    assert any(key in finding.key for finding in verify(tmp_path).findings)


def test_a_branch_takes_the_ranks_of_its_own_settings(tmp_path):
    """The parent's adapter is of the full rank, whoever of the branch holds less."""
    parent = run(settings("fedavg", rounds=1), tmp_path)
    store = store_of(tmp_path)
    ledgers = [Ledger(store, name, "operator", lambda: 7.0) for name in ("test", "child")]
    branch_run(ledgers[0], 1, ledgers[1])
    run(settings("svd", {"b": 2}, rounds=1, name="child"), tmp_path)
    genesis = records(tmp_path, GenesisRecord, "child")[0]
    assert genesis.adapter_sha == parent.adapter_sha
    assert verify(tmp_path, "child").findings == []


class Toy(Lora):
    """The left factor comes first in name order, unlike LoRA's."""

    name = "toy"
    factors = {"left": Factor(".one", "zeros"), "right": Factor(".two", "kaiming_uniform")}  # noqa: RUF012


MODELS = [name for name in modes.names("averaging") if not get_averaging(name).makes_bases]


@pytest.mark.parametrize("averaging", MODELS)
def test_no_mode_knows_the_names_of_the_factors(tmp_path, monkeypatch, averaging):
    """An adapter kind with other names runs, is recomputed without a finding, and is exported."""
    monkeypatch.setattr(lora, "KIND", Toy())
    right, left = MANIFEST.tensors
    tensors = (
        left.model_copy(update={"name": "x.one"}),
        right.model_copy(update={"name": "x.two"}),
    )
    chosen = settings(averaging)
    sites = learners(chosen)
    for learner in sites.values():
        learner.manifest = MANIFEST.model_copy(update={"tensors": tensors})
    assert run(chosen, tmp_path, sites).last_round == 3
    assert verify(tmp_path).findings == []
    gaps = [record.exactness_gap for record in records(tmp_path, ClosedRecord)]
    assert all(gaps) if averaging in {"fedavg", "svd"} else not any(gaps)
    store = store_of(tmp_path)
    history = read_history(store, "test")
    export_adapter(history, store, tmp_path / "out", None)
    with TensorFile(tmp_path / "out" / "adapter_model.safetensors") as file:
        assert set(file.layouts) == {"x.one", "x.two"}
    assert "toy" in (tmp_path / "out" / "README.md").read_text()
