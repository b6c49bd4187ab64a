"""Bases made by a federation of numpy learners: what they hold of the mean gradient."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from coordinator.history import read_history
from coordinator.runs.bases import bases_here, named_bases, put_bases
from coordinator.runs.branching import branch_run
from coordinator.runs.captured import captured
from coordinator.runs.export import export_adapter
from shared import topology
from shared.disk.files import digest_file
from shared.errors import ConfigError, LedgerDamagedError
from shared.methods.averaging.range_finder import depths
from shared.protocol.ledger import Ledger
from shared.protocol.manifest import Manifest, TensorSpec
from shared.protocol.records import ClosedRecord, GenesisRecord
from shared.tensors.tensor_file import TensorFile
from tests.federations import config, learners, run
from tests.numpy_learner import full_gradient
from tests.steering import Crash, Mortal, records, store_of, verify

RANK = 24
SHAPES = {"x.one": (96, 128), "x.two": (128, 64)}  # outputs, inputs


def manifest_of(rank):
    tensors = []
    for layer, (outputs, inputs) in SHAPES.items():
        right = TensorSpec(
            name=f"{layer}.lora_A.weight", shape=(rank, inputs), init="kaiming_uniform"
        )
        left = TensorSpec(name=f"{layer}.lora_B.weight", shape=(outputs, rank), init="zeros")
        tensors += [right, left]
    return Manifest(tensors=tuple(tensors), target_modules=("one", "two"))


def settings(rank=RANK, rounds=2, **sections):
    aggregation = {"averaging": "range-finder", **sections.pop("aggregation", {})}
    lora = {"rank": rank, "dropout": 0.0, **sections.pop("lora", {})}
    return config(rounds=rounds, lora=lora, aggregation=aggregation, **sections)


def sites_of(chosen):
    found = learners(chosen)
    for learner in found.values():
        learner.manifest = manifest_of(chosen.lora.rank)
    return found


def adapters(folder):
    found = []
    for record in records(folder, GenesisRecord) + records(folder, ClosedRecord):
        path = folder / f"read-{len(found)}"
        store_of(folder).fetch_file(topology.adapter_key("test", record.adapter_sha), path)
        with TensorFile(path) as file:
            found.append({name: file.read(name).astype(float) for name in file.layouts})
    return found


def mean_gradient(layer, sites="abc"):
    return sum(full_gradient(site, layer, SHAPES[layer]) for site in sites) / len(sites)


def test_the_bases_hold_nearly_all_that_the_best_ones_would(tmp_path):
    """Of the mean gradient, by layer; they are orthonormal, and their signs are fixed."""
    chosen = settings()
    run(chosen, tmp_path, sites_of(chosen))
    genesis, sketched, bases = adapters(tmp_path)
    for layer, (outputs, inputs) in SHAPES.items():
        whole, b, a = (
            mean_gradient(layer),
            bases[f"{layer}.lora_B.weight"],
            bases[f"{layer}.lora_A.weight"],
        )
        assert (b.shape, a.shape) == ((outputs, RANK), (RANK, inputs))
        assert np.abs(b.T @ b - np.eye(RANK)).max() < 1e-6
        assert np.abs(a @ a.T - np.eye(RANK)).max() < 1e-6
        assert not sketched[f"{layer}.lora_A.weight"].any()
        assert not genesis[f"{layer}.lora_B.weight"].any()
        values = np.linalg.svd(whole, compute_uv=False)
        for rank in (4, 8, 16):
            held = np.linalg.norm(b[:, :rank].T @ whole @ a[:rank].T) ** 2
            assert 0.97 < held / np.sum(values[:rank] ** 2) <= 1
        for column in range(RANK):
            assert b[np.abs(b[:, column]).argmax(), column] > 0
    assert verify(tmp_path).findings == []


def test_the_energy_on_record_is_that_of_the_directions(tmp_path):
    """What they hold exactly, and the whole gradient's to within its estimate."""
    chosen = settings()
    run(chosen, tmp_path, sites_of(chosen))
    first, second = records(tmp_path, ClosedRecord)
    bases = adapters(tmp_path)[-1]
    assert depths(RANK) == (8, 16, RANK)
    for layer in SHAPES:
        whole = mean_gradient(layer)
        held = second.gradient_energy[layer]
        for depth, energy in zip(depths(RANK), held, strict=True):
            b = bases[f"{layer}.lora_B.weight"][:, :depth]
            a = bases[f"{layer}.lora_A.weight"][:depth]
            assert energy == pytest.approx(np.linalg.norm(b.T @ whole @ a.T) ** 2, rel=1e-4)
        (outside,) = first.gradient_energy[layer]
        total = np.linalg.norm(whole) ** 2
        assert held[-1] + outside == pytest.approx(total, rel=0.03)


def test_what_the_bases_hold_is_shown_by_rank_and_by_layer(tmp_path):
    """Beside the dense gradients; a round that makes no bases says nothing, nor another run."""
    chosen = settings()
    run(chosen, tmp_path, sites_of(chosen))
    history = read_history(store_of(tmp_path), "test")
    assert captured(history, 1) is None
    found = captured(history)
    assert (found.round, found.layers, captured(history, 2)) == (2, 2, found)
    assert [held.rank for held in found.ranks] == [8, 16, RANK]
    bases = adapters(tmp_path)[-1]
    for held in found.ranks:
        assert held.worst.keys() == SHAPES.keys()
        for layer, part in held.worst.items():
            whole = mean_gradient(layer)
            b = bases[f"{layer}.lora_B.weight"][:, : held.rank]
            a = bases[f"{layer}.lora_A.weight"][: held.rank]
            known = np.linalg.norm(b.T @ whole @ a.T) ** 2 / np.linalg.norm(whole) ** 2
            assert part == pytest.approx(known, rel=0.03)
        assert held.least == min(held.worst.values()) <= held.median <= held.most
        assert held.least < held.whole < held.most
    run(config(rounds=1, name="other"), tmp_path)
    assert captured(read_history(store_of(tmp_path), "other")) is None


def test_sites_that_say_the_same_give_the_bases_of_one(tmp_path):
    """To the byte: a mean of equal gradients is that gradient."""
    shas = []
    for names in ("a", "abcd"):
        chosen = settings(sites=tuple(names), aggregation={"weights": "equal"})
        found = sites_of(chosen)
        for learner in found.values():
            learner.gradient = lambda layer, shape: full_gradient("a", layer, shape)
        shas.append(run(chosen, tmp_path / names, found).adapter_sha)
    assert shas[0] == shas[1]


@pytest.mark.parametrize(("codec", "least"), [("int8", 0.97), ("uniform16", 0.9)])
def test_a_coarse_codec_costs_little(tmp_path, codec, least):
    """Of what the best bases of rank 16 would hold."""
    chosen = settings(codec={"name": codec})
    run(chosen, tmp_path, sites_of(chosen))
    bases = adapters(tmp_path)[-1]
    for layer in SHAPES:
        whole = mean_gradient(layer)
        values = np.linalg.svd(whole, compute_uv=False)
        b, a = bases[f"{layer}.lora_B.weight"][:, :16], bases[f"{layer}.lora_A.weight"][:16]
        assert np.linalg.norm(b.T @ whole @ a.T) ** 2 > least * np.sum(values[:16] ** 2)
    assert verify(tmp_path).findings == []


def test_a_second_pair_of_rounds_holds_more(tmp_path):
    """It goes on with the directions of the first; only round 1 estimates the whole."""
    chosen = settings(rounds=4)
    run(chosen, tmp_path, sites_of(chosen))
    energies = [record.gradient_energy for record in records(tmp_path, ClosedRecord)]
    assert energies[2] == {}
    for layer in SHAPES:
        best = np.cumsum(np.linalg.svd(mean_gradient(layer), compute_uv=False) ** 2)
        once, again = (energies[at][layer][1] for at in (1, 3))
        assert once < again <= best[15] * (1 + 1e-4)
        assert again > 0.999 * best[15]
    assert verify(tmp_path).findings == []


@pytest.mark.parametrize("rank", [70, 140])
def test_more_directions_than_a_layer_has_are_zeros(tmp_path, rank):
    """Beyond inputs and outputs there are none; what there is holds all of the gradient."""
    chosen = settings(rank)
    run(chosen, tmp_path, sites_of(chosen))
    bases = adapters(tmp_path)[-1]
    for layer, shape in SHAPES.items():
        whole = mean_gradient(layer)
        b, a = bases[f"{layer}.lora_B.weight"], bases[f"{layer}.lora_A.weight"]
        assert not b[:, min(shape) :].any()
        assert not a[min(shape) :].any()
        if rank >= max(shape):
            assert np.linalg.norm(b @ (b.T @ whole @ a.T) @ a - whole) < 1e-5
    assert verify(tmp_path).findings == []


def test_a_layer_without_a_gradient_gets_zeros(tmp_path):
    """No direction is better than another there, and nothing is divided by zero."""
    chosen = settings()
    found = sites_of(chosen)
    for site, learner in found.items():
        learner.gradient = lambda layer, shape, site=site: (
            np.zeros(shape) if layer == "x.two" else full_gradient(site, layer, shape)
        )
    run(chosen, tmp_path, found)
    bases = adapters(tmp_path)[-1]
    assert not bases["x.two.lora_B.weight"].any()
    assert bases["x.one.lora_B.weight"].any()
    assert verify(tmp_path).findings == []


@pytest.mark.parametrize(("at", "after"), [(8, True), (17, False), (20, True), (22, False)])
def test_a_coordinator_killed_at_a_write_ends_in_the_same_bases(tmp_path, at, after):
    """To the sha256, whichever write it died at."""
    chosen = settings()
    whole = run(chosen, tmp_path / "whole", sites_of(chosen))
    store = Mortal(tmp_path / "killed" / "store", at, after=after)
    with pytest.raises(Crash):
        run(chosen, tmp_path / "killed", sites_of(chosen), store=store)
    assert store.fired
    assert run(chosen, tmp_path / "killed", sites_of(chosen)).adapter_sha == whole.adapter_sha
    assert verify(tmp_path / "killed").findings == []


def test_bases_are_no_model(tmp_path):
    """They are neither measured nor exported, and no run begins with them as its adapter."""
    chosen = settings()
    run(chosen, tmp_path, sites_of(chosen))
    store = store_of(tmp_path)
    history = read_history(store, "test")
    assert not any(history.held_out(number) for number in history.rounds)
    with pytest.raises(ConfigError, match=r'run test makes bases .* lora\.bases = "test@2"'):
        export_adapter(history, store, tmp_path / "out", None)
    ledgers = [Ledger(store, name, "operator", lambda: 7.0) for name in ("test", "child")]
    with pytest.raises(ConfigError, match="bases and no model"):
        branch_run(ledgers[0], 2, ledgers[1])


def named(folder, bases, scratch="scratch", **sections):
    """The settings of a core run by the bases that it names, and their file."""
    lora = {"kind": "core", "rank": 16, "bases": bases, **sections.pop("lora", {})}
    chosen = config(rounds=1, name="core", lora=lora, **sections)
    (folder / scratch).mkdir(exist_ok=True)
    return named_bases(chosen, store_of(folder), folder, folder / scratch)


def test_a_core_run_takes_its_bases_of_a_run_by_name(tmp_path):
    """Of a round, or of the last one; the sha256 and the base model are pinned on record."""
    chosen = settings(rounds=4)
    last = run(chosen, tmp_path, sites_of(chosen)).adapter_sha
    shas = [record.adapter_sha for record in records(tmp_path, ClosedRecord)]
    (genesis,) = records(tmp_path, GenesisRecord)
    for bases, sha in (("test", last), ("test@4", last), ("test@2", shas[1])):
        found, path = named(tmp_path, bases)
        assert (found.lora.bases, found.lora.bases_sha) == (f"{bases}#{sha}", sha)
        assert found.base.fingerprint == genesis.fingerprint
        assert digest_file(path)[0] == sha
    (tmp_path / "test").write_bytes(path.read_bytes())  # what could be a run is one
    assert named(tmp_path, "./test")[0].lora.bases == f"./test#{sha}"
    assert named(tmp_path, "test")[0].lora.bases_sha == last


def test_a_run_on_record_keeps_its_bases_when_the_run_that_made_them_is_gone(tmp_path):
    """What is on record counts, and it has a copy of its own."""
    chosen = settings()
    first = run(chosen, tmp_path, sites_of(chosen)).adapter_sha
    found, path = named(tmp_path, "test")
    put_bases(found, store_of(tmp_path), path)
    Ledger(store_of(tmp_path), "core", "w", lambda: 0.0).begin(found)
    shutil.rmtree(tmp_path / "store" / "runs" / "test")
    again, nothing = named(tmp_path, "test")
    assert (again.digest, again.lora.bases_sha, nothing) == (found.digest, first, None)
    with bases_here(core_settings("test"), store_of(tmp_path), tmp_path) as (same, here):
        assert (same.digest, digest_file(here)[0]) == (found.digest, first)
    assert not here.exists()


def core_settings(bases):
    return config(rounds=1, name="core", lora={"kind": "core", "rank": 16, "bases": bases})


@pytest.mark.parametrize(
    ("bases", "sections", "says"),
    [
        ("grad", {}, r"lora.bases: expected .*a run of this store.* got 'grad', .*runs list"),
        ("test@1", {}, r"lora.bases: expected a round that made bases .*'test@1'.*rounds list"),
        ("test@6", {}, r"lora.bases: expected a round that made bases .*'test@6'.*rounds list"),
        ("plain", {}, r"lora.bases: expected a run that makes bases, got 'plain', .*\"fedavg\""),
        ("open", {}, r"lora.bases: expected a finished run, got 'open'.*wait.*\"open@2\""),
        ("test", {"lora": {"rank": 25}}, r"lora.rank: expected at most 24.*'test'.*got 25; lower"),
        (
            "test",
            {"base": {"model": "none", "quantisation": "int8"}},
            r"base.quantisation: expected nf4, as of run test.*got int8",
        ),
        (
            "test",
            {"base": {"model": "none", "fingerprint": "0" * 64}},
            r"base.fingerprint: expected .*, as of run test.*got 0+; use",
        ),
    ],
)
def test_a_run_that_has_no_such_bases_is_refused(tmp_path, bases, sections, says):
    """With the field, what was expected, what came and what to do."""
    chosen = settings()
    run(chosen, tmp_path, sites_of(chosen))
    run(config(rounds=1, name="plain"), tmp_path)
    store = store_of(tmp_path)
    Ledger(store, "open", "w", lambda: 0.0).begin(settings(run={"name": "open"}))
    with pytest.raises(ConfigError, match=says):
        named(tmp_path, bases, **sections)
    assert not list((tmp_path / "scratch").iterdir())


def test_bases_that_the_store_altered_are_not_handed_on(tmp_path):
    """The adapter of the run that made them is damaged: the new run does not begin."""
    chosen = settings()
    sha = run(chosen, tmp_path, sites_of(chosen)).adapter_sha
    path = tmp_path / "store" / topology.adapter_key("test", sha)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(LedgerDamagedError, match="does not have its sha256"):
        named(tmp_path, "test")


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"rounds": 3}, r"run.rounds: expected 2 with .*, got 3"),
        ({"rank": 8}, r"lora.rank: expected more than 8 .*, got 8"),
        ({"lora": {"dropout": 0.1}}, r"lora.dropout: expected 0 .*, got 0.1"),
        ({"training": {"proximal_mu": 0.5}}, r"training.proximal_mu: expected 0 .*, got 0.5"),
        ({"convergence": {"patience": 2}}, r"convergence.patience: expected none .*, got 2"),
        ({"selection": {"method": "random"}}, r'selection.method: expected "all" .*"random"'),
        ({"aggregation": {"rule": "median"}}, r"joins products of whole factors"),
        ({"server": {"optimizer": "fedadam"}}, r"expected plain with aggregation.averaging"),
        (
            {"training": {"optimizer_state": "keep"}},
            r'"range-finder" takes a gradient of the other',
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_the_reason(sections, says):
    """Each names the field, what is expected, what came and what to do."""
    with pytest.raises(ConfigError, match=says):
        settings(**sections)
