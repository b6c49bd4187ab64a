"""Federations of core and (IA)3 adapters over a tiny quantised model, killed and not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest
from safetensors.numpy import load_file

from shared import topology
from tests.federation.test_simulate import command, gradualdiff, summary
from tests.patience import PATIENCE_SECONDS
from tests.tiny_model import make_tiny_model, write_federation

pytestmark = [pytest.mark.model, pytest.mark.slow]

RATE = "training.learning_rate=0.02"


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
    """The folder and the summary of a core run that nothing disturbed; int8 on the wire."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = simulate(folder, model, "core", "--set", "codec.name=int8")
    return folder, summary(gradualdiff("simulate", *arguments, "--json"))


def test_cores_lower_the_loss_and_every_round_can_be_recomputed(whole):
    """Over a quantised base, with a quantising codec."""
    found = losses(whole[0])
    assert found[-1] < found[0] - 0.1
    done = gradualdiff("runs", "verify", "tiny", "--store", whole[0] / "store")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_core_run_that_is_killed_ends_in_the_same_adapter(whole, model, tmp_path):
    """In round 2, after one of two deltas is in."""
    arguments = simulate(tmp_path, model, "core", "--set", "codec.name=int8")
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
