"""Averaging modes over a real (tiny) quantised model, in processes that are really killed."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest

from shared import topology
from shared.adapters.lora import KIND
from shared.methods.averaging import delta_manifest, get_averaging
from shared.protocol.ledger import Ledger
from shared.protocol.records import AcceptedRecord, ClosedRecord, ClosingRecord, GenesisRecord
from shared.tensors.delta_file import DeltaFile
from shared.tensors.tensor_file import TensorFile
from tests.federation.test_simulate import gradualdiff, plain_loss
from tests.participant.test_killed_in_a_round import federation, simulate
from tests.steering import records, store_of, verify
from tests.tiny_model import make_tiny_model

pytestmark = [pytest.mark.model, pytest.mark.slow]

STEPS = 'local_steps = 5\n[aggregation]\naveraging = "{}"\n'
CASES = {
    "fedavg": STEPS.format("fedavg"),
    "ffa": 'optimizer_state = "keep"\n' + STEPS.format("ffa"),
    "rolora": STEPS.format("rolora"),
    "svd": STEPS.format("svd") + "[lora.ranks]\nb = 2\n",
    "flora": STEPS.format("flora") + "[lora.ranks]\nb = 2\n",
}
ROUNDS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def prepared(folder, model, case):
    """The federation.toml of a case; flora's base is not quantised."""
    path = federation(folder, model, CASES[case], ROUNDS)
    if case == "flora":
        text = path.read_text().replace('"nf4"', '"none"\ncompute_dtype = "float32"')
        path.write_text(text)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    """By case: folder and summary of a run that nothing disturbed."""
    made = {}

    def run(case):
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            done, _ = simulate(prepared(folder, model, case))
            assert done.returncode == 0, done.stderr
            made[case] = (folder, json.loads(done.stdout))
        return made[case]

    return run


def tensors(folder, key):
    path = folder / "fetched"
    store_of(folder).fetch_file(key, path)
    with TensorFile(path) as file:
        return {name: file.read(name).copy() for name in file.layouts}


def adapters(folder):
    """The adapter of each round, A(1) first."""
    results = records(folder, GenesisRecord, "tiny") + records(folder, ClosedRecord, "tiny")
    return [tensors(folder, topology.adapter_key("tiny", r.adapter_sha)) for r in results]


@pytest.mark.parametrize("case", ["ffa", "rolora", "svd", "flora"])
def test_kills_in_a_training_and_in_a_closing_end_in_the_same_adapter(whole, model, tmp_path, case):
    """To the sha256; and what is on record is recomputed without a finding."""
    folder, wanted = whole(case)
    path = prepared(tmp_path, model, case)
    kills = [("training.stepped", 17), ("round.aggregated", 1)]  # in round 2, after a checkpoint
    options = []
    for point, nth in kills:
        done, passed = simulate(path, *options, point=point, nth=nth)
        assert (done.returncode, passed[-1]) == (-signal.SIGKILL, "SIGKILL"), done.stderr
        options = ["--resume"]
    done, _ = simulate(path, "--resume")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapter_sha"] == wanted["adapter_sha"]
    for ran in (folder, tmp_path):
        result = verify(ran, "tiny")
        assert (result.findings, result.notes, result.recomputed) == ([], [], ROUNDS)


@pytest.mark.parametrize("case", ["ffa", "rolora"])
def test_the_factor_that_rests_keeps_its_bytes_and_does_not_travel(whole, case):
    """And the other one is really trained; about half of fedavg's bytes go over the wire."""
    folder, _ = whole(case)
    manifest = records(folder, GenesisRecord, "tiny")[0].manifest
    found = adapters(folder)
    for number in range(1, ROUNDS + 1):
        trained = {spec.name for spec in get_averaging(case).trained_in(manifest, number).tensors}
        assert 2 * len(trained) == len(manifest.tensors)
        before, after = found[number - 1], found[number]
        for name, values in after.items():
            assert (values.tobytes() != before[name].tobytes()) == (name in trained)
    sizes, wholes = (
        sum(record.size for record in records(at, AcceptedRecord, "tiny"))
        for at in (folder, whole("fedavg")[0])
    )
    assert 0.35 < sizes / wholes < 0.65


def test_svd_fits_the_mean_of_what_the_sites_sent(whole):
    """Rank 4 and rank 2, against the dense mean product; and the first round learns something."""
    folder, _ = whole("svd")
    manifest = records(folder, GenesisRecord, "tiny")[0].manifest
    before, after = adapters(folder)[:2]
    inputs = records(folder, ClosingRecord, "tiny")[0].inputs
    config = Ledger(store_of(folder), "tiny", "test", lambda: 0.0).config()
    means = {}
    for item in inputs:
        path = folder / "delta"
        key = topology.delta_key("tiny", 1, item.site, item.sha)
        store_of(folder).fetch_file(key, path)
        own = delta_manifest(manifest, config, item.site, 1)
        with DeltaFile(path, own) as file:
            for _, b, a in KIND.layers(own):
                rank = a.shape[0]
                assert rank == {"a": 4, "b": 2}[item.site]
                product = (before[b.name][:, :rank] + file.read(b).astype(float)) @ (
                    before[a.name][:rank] + file.read(a).astype(float)
                )
                means[a.name, b.name] = means.get((a.name, b.name), 0) + item.weight * product
    assert len(means) * 2 == len(after)
    for (a, b), mean in means.items():
        u, s, v = np.linalg.svd(mean)
        wanted = (u[:, :4] * s[:4]) @ v[:4]
        assert np.abs(wanted).max() > 1e-4
        assert np.abs(after[b].astype(float) @ after[a] - wanted).max() < 1e-6
    assert all((KIND.side(a), KIND.side(b)) == ("right", "left") for a, b in means)


@pytest.mark.filterwarnings("ignore")  # third-party loading code; ours runs in processes
def test_floras_export_has_the_reported_loss_in_plain_peft(whole, model, tmp_path):
    """Rank 4 + 2 x 6 beside the base, where the sites measured it merged into theirs."""
    import torch
    from transformers import AutoModelForCausalLM

    folder, reported = whole("flora")
    store = folder / "store"
    done = gradualdiff("runs", "export", "tiny", "--to", tmp_path / "out", "--store", store)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (made["r"], made["lora_alpha"]) == (16, 64)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loss = plain_loss(base, tmp_path / "out", folder, model, torch.float32)
    assert loss == pytest.approx(reported["held_out_nll"], abs=1e-4)
    shown = gradualdiff("rounds", "show", "tiny", "2", "--store", store, "--json")
    assert shown.returncode == 0, shown.stderr
    assert all(row["norm"] > 0 for row in json.loads(shown.stdout)["sites"])


def test_each_mode_lowers_the_held_out_loss(whole):
    """From the base model's to the last adapter's."""
    for case in CASES:
        state = records(whole(case)[0], ClosedRecord, "tiny")
        losses = [record.source_held_out.nll for record in state]
        assert losses[-1] < losses[0], case
