"""Federations of core and (IA)3 adapters over a tiny quantised model, killed and not."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shared import errors, topology
from shared.protocol.ledger import Ledger
from shared.protocol.records import GenesisRecord
from shared.stores.directory import DirectoryStore
from tests.federation.test_simulate import command, gradualdiff, summary
from tests.patience import PATIENCE_SECONDS
from tests.tiny_model import make_tiny_model, write_federation

pytestmark = [pytest.mark.model, pytest.mark.slow]

RATE = "training.learning_rate=0.02"
WIRE = "--set", "codec.name=int8", "--set", "codec.down=int8"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def simulate(folder, model, kind, *sets, quantisation="nf4"):
    path = write_federation(folder, model, quantisation=quantisation)
    return [path, "--set", f"lora.kind={kind}", "--set", RATE, *sets]


def losses(folder):
    done = gradualdiff("rounds", "list", "tiny", "--store", folder / "store", "--json")
    return [row["held_out_nll"] for row in summary(done)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    """The folder and the summary of a core run that nothing disturbed; int8 both ways."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = simulate(folder, model, "core", *WIRE)
    return folder, summary(gradualdiff("simulate", *arguments, "--json"))


def test_cores_lower_the_loss_and_every_round_can_be_recomputed(whole):
    """Over a quantised base, with a quantising codec."""
    found = losses(whole[0])
    assert found[-1] < found[0] - 0.1
    done = gradualdiff("runs", "verify", "tiny", "--store", whole[0] / "store")
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_bases_hold_is_shown(whole):
    """By site, and equal at both, whose machines are equal."""
    done = gradualdiff("runs", "show", "tiny", "--store", whole[0] / "store", "--json")
    one, two = (member["bases"] for member in summary(done)["members"])
    assert one == two
    assert 0 < one["least"] <= one["median"] <= one["most"] <= 1
    shown = gradualdiff("runs", "show", "tiny", "--store", whole[0] / "store").stdout
    assert f"{one['sha'][:12]}" in shown
    assert f"{one['median']:.1%}" in shown


def test_a_core_run_that_is_killed_ends_in_the_same_adapter(whole, model, tmp_path):
    """In round 2, after one of two deltas is in."""
    arguments = simulate(tmp_path, model, "core", *WIRE)
    accepted = tmp_path / "store" / topology.accepted_key("tiny", 2, "a")
    process = subprocess.Popen(
        command("simulate", *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not accepted.exists() and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.002)  # a poll for the moment of the kill, not an order of events
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = summary(gradualdiff("simulate", *arguments, "--resume", "--json"))
    assert done["adapter_sha"] == whole[1]["adapter_sha"]


def test_a_core_run_is_exported_as_a_lora_adapter(whole, tmp_path):
    """Its config and tensors are those of any LoRA adapter of that rank, and nothing else."""
    out = tmp_path / "out"
    done = gradualdiff("runs", "export", "tiny", "--store", whole[0] / "store", "--to", out)
    assert done.returncode == 0, done.stderr
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    tensors = load_file(out / "adapter_model.safetensors")
    assert len(tensors) == 28
    assert {name.rsplit(".", 2)[1] for name in tensors} == {"lora_A", "lora_B"}
    assert not list(out.glob("*bases*")) + list(out.glob("*cores*"))
    merged = tmp_path / "merged"
    done = gradualdiff(
        "runs", "export", "tiny", "--store", whole[0] / "store", "--to", merged, "--merge"
    )
    assert done.returncode == 0, done.stderr
    assert (merged / "model.safetensors").is_file()


def test_a_branch_of_a_core_run_goes_on_with_its_cores(whole):
    """The bases are a function of base model and rank: the parent's cores stay what they were."""
    arguments = ("tiny", "--at", "2", "--name", "more", "--store", whole[0] / "store")
    done = gradualdiff("runs", "branch", *arguments)
    assert done.returncode == 0, done.stderr
    path = whole[0] / "federation.toml"
    sets = ("run.name=more", "lora.kind=core", RATE, "codec.name=int8", "run.rounds=1")
    summary(gradualdiff("simulate", path, *(x for s in sets for x in ("--set", s)), "--json"))
    done = gradualdiff("rounds", "list", "more", "--store", whole[0] / "store", "--json")
    first = summary(done)[0]["held_out_nll"]
    assert first == losses(whole[0])[2]


def test_ia3_lowers_the_loss_and_is_exported_as_ia3(model, tmp_path):
    """The adapter in the ledger is PEFT's already."""
    arguments = simulate(tmp_path, model, "ia3", "--set", "server.optimizer=fedavgm")
    summary(gradualdiff("simulate", *arguments, "--json"))
    found = losses(tmp_path)
    assert found[-1] < found[0]
    done = gradualdiff("runs", "verify", "tiny", "--store", tmp_path / "store")
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    done = gradualdiff("runs", "export", "tiny", "--store", tmp_path / "store", "--to", out)
    assert done.returncode == 0, done.stderr
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "IA3"
    assert config["feedforward_modules"] == ["down_proj"]


# Bases that come as a file ---------------------------------------------------------------------


def given_bases(folder, model, rank=4):
    """Orthonormal and drawn, under a LoRA adapter's names."""
    from participant.model import LocalModel, pick_device  # as the other tests load it
    from shared.adapters.core import KIND
    from shared.config import BaseSection, LoraSection

    lora = LoraSection(kind="core", rank=rank)
    made = LocalModel(BaseSection(model=str(model)), lora, pick_device("cpu"))
    tensors, draw = {}, np.random.Generator(np.random.Philox(5))
    for spec in made.manifest().tensors:
        left, right = KIND.lora_names(spec.name)
        b, a = made.frozen(KIND.layer_of(spec.name))
        tensors[left] = np.linalg.qr(draw.standard_normal(b.shape))[0].astype(np.float32)
        tensors[right] = (
            np.linalg.qr(draw.standard_normal(a.T.shape))[0].T.astype(np.float32).copy()
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "bases.safetensors")
    return tensors


@pytest.fixture(scope="module")
def given(tmp_path_factory, model):
    """A run whose bases are a file of the coordinator's."""
    folder = tmp_path_factory.mktemp("given")
    tensors = given_bases(folder, model)
    arguments = simulate(folder, model, "core", "--set", "lora.bases=bases.safetensors")
    return folder, arguments, summary(gradualdiff("simulate", *arguments, "--json")), tensors


def test_bases_of_a_file_are_on_record_and_handed_to_each_site_once(given):
    """By their sha256: in the settings, in the first adapter's manifest and at each site."""
    folder = given[0]
    assert losses(folder)[-1] < losses(folder)[0]
    sha = hashlib.sha256((folder / "bases.safetensors").read_bytes()).hexdigest()
    ledger = Ledger(DirectoryStore(folder / "store"), "tiny", "t", lambda: 0.0)
    assert ledger.federation().config["lora"]["bases"] == f"bases.safetensors#{sha}"
    (genesis,) = (r for r in ledger.history() if isinstance(r, GenesisRecord))
    assert (genesis.manifest.kind, genesis.manifest.bases) == ("core", sha)
    for site in "ab":
        kept = folder / "sites" / site / "tiny" / "bases" / f"{sha}.safetensors"
        assert hashlib.sha256(kept.read_bytes()).hexdigest() == sha
    done = gradualdiff("runs", "verify", "tiny", "--store", folder / "store")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_core_run_with_given_bases_is_exported_with_them(given, tmp_path):
    """A of the file as it is; no base model is needed for it."""
    out = tmp_path / "out"
    done = gradualdiff("runs", "export", "tiny", "--store", given[0] / "store", "--to", out)
    assert done.returncode == 0, done.stderr
    found = load_file(out / "adapter_model.safetensors")
    assert found.keys() == given[3].keys()
    for name, value in given[3].items():
        if ".lora_A." in name:
            assert (found[name] == value).all()


@pytest.fixture(scope="module")
def made(tmp_path_factory, model):
    """A folder with a finished run ``grad`` that made bases of rank 12, and their sha256."""
    folder = tmp_path_factory.mktemp("made")
    arguments = simulate(folder, model, "lora", "--set", "aggregation.averaging=range-finder")
    for one in ("run.name=grad", "lora.rank=12", "lora.dropout=0", "run.rounds=2"):
        arguments += ["--set", one]
    return folder, summary(gradualdiff("simulate", *arguments, "--json"))["adapter_sha"]


def test_bases_of_the_mean_gradient_are_those_of_a_core_run(made, model, tmp_path):
    """A run of two rounds makes them; named, of a higher rank, it gives their first directions."""
    folder, sha = tmp_path / "core", made[1]
    shutil.copytree(made[0], folder)
    store = folder / "store"
    refused = gradualdiff("runs", "export", "grad", "--store", store, "--to", tmp_path / "no")
    assert 'lora.bases = "grad@2"' in refused.stderr
    arguments = simulate(folder, model, "core", "--set", "lora.bases=grad@2")
    checked = gradualdiff("check", arguments[0])  # with other settings: it leaves the run alone
    assert checked.returncode == 0, checked.stderr
    done = summary(gradualdiff("simulate", *arguments, "--json"))
    assert losses(folder)[-1] < losses(folder)[0]
    settings = Ledger(DirectoryStore(store), "tiny", "t", lambda: 0.0).federation().config
    assert settings["lora"]["bases"] == f"grad@2#{sha}"
    assert settings["base"]["fingerprint"] is not None
    bases = tmp_path / "bases.safetensors"
    shutil.copy(store / topology.adapter_key("grad", sha), bases)
    deleted = gradualdiff("runs", "delete", "grad", "--yes", "--store", store)
    assert deleted.returncode == 0, deleted.stderr
    again = gradualdiff("simulate", *arguments, "--resume", "--json")  # it needs that run no more
    assert summary(again) == done
    assert not list(folder.glob(".gradualdiff-bases-*"))
    verified = gradualdiff("runs", "verify", "tiny", "--store", store)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    done = gradualdiff("runs", "export", "tiny", "--store", store, "--to", tmp_path / "x")
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "x" / "adapter_model.safetensors")
    for name, value in load_file(bases).items():
        if ".lora_A." in name:
            assert len(value) == 12
            assert (found[name] == value[:4]).all()
        else:
            assert found[name].shape == (len(value), 4)


def test_a_store_that_altered_the_bases_is_found_out(given, tmp_path):
    """By verify and by export, which name the object."""
    shutil.copytree(given[0] / "store", tmp_path / "store")
    (path,) = (tmp_path / "store" / "runs" / "tiny" / "bases").iterdir()
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    done = gradualdiff("runs", "verify", "tiny", "--store", tmp_path / "store")
    assert done.returncode != 0
    assert "/bases/" in done.stderr
    out = tmp_path / "out"
    done = gradualdiff("runs", "export", "tiny", "--store", tmp_path / "store", "--to", out)
    assert "does not have its sha256" in done.stderr


def test_a_run_goes_on_without_the_file_and_not_with_another_one(given, tmp_path, model):
    """What is on record counts; the file is read once."""
    shutil.copytree(given[0], tmp_path / "run")
    path = tmp_path / "run" / "federation.toml"
    arguments = [path, *given[1][1:], "--resume", "--json"]
    (tmp_path / "run" / "bases.safetensors").unlink()
    assert summary(gradualdiff("simulate", *arguments)) == given[2]
    other = {name: -value for name, value in given[3].items()}
    save_file(other, tmp_path / "run" / "bases.safetensors")
    done = gradualdiff("simulate", *arguments)
    assert done.returncode == errors.RunExistsError.exit_code, done.stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("missing", r'lora.bases: expected "weights", a run of this store or a file'),
        ("no-bases", r"expected a LoRA adapter's safetensors file"),
        ("another-rank", r"expected float32 \(\d+, 4\).*lora.rank"),
        ("too-few-layers", r"expected a tensor .*lora_B.weight, found none"),
    ],
)
def test_bases_that_do_not_fit_are_refused_before_the_run_begins(model, tmp_path, change, says):
    """With the field, what was expected and what to do."""
    if change == "no-bases":
        (tmp_path / "bases.safetensors").write_bytes(b"no tensors")
    if change == "another-rank":
        given_bases(tmp_path, model, rank=3)
    if change == "too-few-layers":
        tensors = given_bases(tmp_path, model)
        kept = {name: value for name, value in tensors.items() if "layers.0" in name}
        save_file(kept, tmp_path / "bases.safetensors")
    arguments = simulate(tmp_path, model, "core", "--set", "lora.bases=bases.safetensors")
    done = gradualdiff("simulate", *arguments)
    assert done.returncode != 0
    assert re.search(says, " ".join(done.stderr.split())), done.stderr
    assert not (tmp_path / "store" / "runs" / "tiny" / "federation.json").exists()
