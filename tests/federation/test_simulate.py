"""``gradualdiff simulate`` with a tiny quantised model, in processes that are really killed."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared import errors, topology
from shared.protocol.ledger import Ledger
from shared.protocol.records import AcceptedRecord, ClosedRecord
from shared.stores.directory import DirectoryStore
from tests.patience import PATIENCE_SECONDS
from tests.tiny_model import make_tiny_model, write_federation

pytestmark = [pytest.mark.model, pytest.mark.slow]


def command(*arguments):
    return [sys.executable, "-m", "gradualdiff.cli.main", *map(str, arguments)]


def gradualdiff(*arguments):
    """Run the command to its end."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False)


def summary(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    """The folder and the summary of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, summary(gradualdiff("simulate", write_federation(folder, model), "--json"))


def test_two_runs_with_one_seed_end_in_the_same_adapter(whole, model, tmp_path):
    """Other process, other folder, same bytes: NF4 base, dropout and all."""
    again = summary(gradualdiff("simulate", write_federation(tmp_path, model), "--json"))
    assert again["adapter_sha"] == whole[1]["adapter_sha"]
    assert again["rounds_closed"] == 3


def test_training_lowers_the_held_out_loss(whole):
    """Otherwise equal digests would prove nothing about learning."""
    done = gradualdiff("rounds", "list", "tiny", "--store", whole[0] / "store", "--json")
    losses = [r["held_out_nll"] for r in summary(done)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_sigkill_inside_a_round_and_resume_end_in_the_same_adapter(whole, model, tmp_path):
    """Killed after one of two deltas of round 2 is in; only the other site trains it again."""
    path = write_federation(tmp_path, model)
    accepted = tmp_path / "store" / topology.accepted_key("tiny", 2, "a")
    process = subprocess.Popen(
        command("simulate", path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not accepted.exists() and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.002)  # a poll for the moment of the kill, not an order of events
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    history = list(Ledger(DirectoryStore(tmp_path / "store"), "tiny", "t", lambda: 0.0).history())
    assert [r.round for r in history if isinstance(r, ClosedRecord)] == [1]
    resumed = summary(gradualdiff("simulate", path, "--resume", "--json"))
    assert resumed["adapter_sha"] == whole[1]["adapter_sha"]


def test_ctrl_c_ends_with_its_code_and_the_command_to_go_on(whole, model, tmp_path):
    """SIGINT: exit code 130, nothing lost, and the same adapter after --resume."""
    path = write_federation(tmp_path, model)
    first = tmp_path / "store" / topology.accepted_key("tiny", 1, "a")
    process = subprocess.Popen(command("simulate", path), stderr=subprocess.PIPE, text=True)
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not first.exists() and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.002)  # a poll for the moment of the signal, not an order of events
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == errors.InterruptedRunError.exit_code
    assert "--resume" in stderr
    resumed = summary(gradualdiff("simulate", path, "--resume", "--json"))
    assert resumed["adapter_sha"] == whole[1]["adapter_sha"]


def test_a_second_process_on_the_same_run_is_turned_away(whole, model, tmp_path):
    """They would share the sites' workspaces; the first one is not disturbed."""
    path = write_federation(tmp_path, model)
    first = subprocess.Popen(command("simulate", path), stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + PATIENCE_SECONDS
    begun = tmp_path / "store" / topology.member_key("tiny", "a")
    while not begun.exists() and first.poll() is None and time.monotonic() < give_up:
        time.sleep(0.002)  # a poll for the moment to interfere, not an order of events
    try:
        os.kill(first.pid, signal.SIGSTOP)
        second = gradualdiff("simulate", path, "--resume")
    finally:
        os.kill(first.pid, signal.SIGCONT)
        ended = first.wait(timeout=PATIENCE_SECONDS)
    assert second.returncode == errors.FencedError.exit_code, second.stderr
    assert ended == 0
    done = gradualdiff("runs", "show", "tiny", "--store", tmp_path / "store", "--json")
    assert summary(done)["summary"]["adapter_sha"] == whole[1]["adapter_sha"]


def test_verify_is_green_and_names_a_flipped_byte(whole):
    """Recomputed without the model; one byte of one delta is found by round and key."""
    folder = whole[0]
    assert gradualdiff("runs", "verify", "tiny", "--store", folder / "store").returncode == 0
    store = DirectoryStore(folder / "store")
    history = Ledger(store, "tiny", "t", lambda: 0.0).history()
    record = next(r for r in history if isinstance(r, AcceptedRecord) and r.round == 2)
    key = topology.delta_key("tiny", 2, record.site, record.sha)
    good = store.get(key)
    store.put(key, good[:-1] + bytes([good[-1] ^ 1]))
    try:
        done = gradualdiff("runs", "verify", "tiny", "--store", folder / "store")
    finally:
        store.put(key, good)
    assert done.returncode == errors.LedgerDamagedError.exit_code
    assert f"round 2: {key}" in done.stderr


def plain_loss(base, adapter, folder, model, dtype):
    """Nats per held-out answer token of both sites, with PEFT alone and from plain logits."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    from participant.data import load_site_data
    from shared.config import load_site

    device = next(base.parameters()).device
    peft = PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    total, tokens = 0.0, 0
    for name in "ab":
        site = load_site(folder / f"{name}.toml")
        for example in load_site_data(site.data, folder, tokenizer, 32, 16).held_out:
            ids = torch.tensor([example.input_ids], device=device)
            mixed = torch.autocast(device.type, dtype, dtype == torch.bfloat16)
            with torch.inference_mode(), mixed:
                logits = peft(input_ids=ids).logits[0].float()
            start = example.answer_start
            wanted = ids[0, start:]
            loss = torch.nn.functional.cross_entropy(
                logits[start - 1 : -1], wanted, reduction="sum"
            )
            total, tokens = total + float(loss), tokens + len(wanted)
    return total / tokens


@pytest.mark.filterwarnings("ignore")  # third-party loading code; ours runs in the processes above
def test_the_exported_adapter_loads_with_peft_and_has_the_reported_loss(whole, model, tmp_path):
    """PeftModel.from_pretrained on the same NF4 base; NLL computed here from plain logits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from participant.model.numerics import pick_compute_dtype, pick_device

    folder, reported = whole
    target = tmp_path / "adapter"
    done = gradualdiff("runs", "export", "tiny", "--to", target, "--store", folder / "store")
    assert done.returncode == 0, done.stderr
    device = pick_device("auto")  # as the runs above did
    dtype = pick_compute_dtype("auto", device)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, quantization_config=quantisation, device_map={"": device}
    )
    loss = plain_loss(base, target, folder, model, dtype)
    assert math.isclose(loss, reported["held_out_nll"], abs_tol=1e-3)


def test_a_relative_base_model_is_relative_to_its_file(whole, model, tmp_path):
    """Started from anywhere else, with the sites' files in another folder: the same adapter."""
    here = tmp_path / "mine"
    path = write_federation(here, Path("models/tiny"))
    (here / "models").mkdir()
    (here / "models" / "tiny").symlink_to(model)
    done = subprocess.run(
        command("simulate", path, "--json"), capture_output=True, text=True, cwd="/", check=False
    )
    assert summary(done)["adapter_sha"] == whole[1]["adapter_sha"]
    config = Ledger(DirectoryStore(here / "store"), "tiny", "t", lambda: 0.0).config()
    assert config.base.model == "models/tiny"


def used_as_its_card_says(folder):
    """What the program in a card prints, run as it stands in the exported folder."""
    program = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.filterwarnings("ignore")  # third-party loading code
def test_an_export_is_used_as_its_card_says_and_merged_it_says_the_same(whole, model, tmp_path):
    """Both programs run as printed and give the same reply; the merged weights are PEFT's sum."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    store = ("--store", whole[0] / "store")
    plain, merged = tmp_path / "plain", tmp_path / "merged"
    for to, options in ((plain, ()), (merged, ("--merge",))):
        done = gradualdiff("runs", "export", "tiny", "--to", to, *options, *store)
        assert done.returncode == 0, done.stderr
    assert json.loads((plain / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(model)
    assert (plain / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert (merged / "model.safetensors").is_file()
    assert not (merged / "adapter_model.safetensors").exists()
    assert used_as_its_card_says(plain) == used_as_its_card_says(merged)
    ids = AutoTokenizer.from_pretrained(merged)("count 3 at a", return_tensors="pt").input_ids
    base = AutoModelForCausalLM.from_pretrained(model)
    with torch.inference_mode():
        before = base(input_ids=ids).logits
        beside = PeftModel.from_pretrained(base, plain)(input_ids=ids).logits
        within = AutoModelForCausalLM.from_pretrained(merged)(input_ids=ids).logits
    assert torch.allclose(beside, within, atol=1e-4)
    assert not torch.allclose(before, within, atol=1e-2)


def test_only_the_base_that_the_run_had_is_merged_into(whole, model, tmp_path):
    """Another model under the same path: exit code 12 with both fingerprints."""
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    script = (
        "import participant.model.merging as merging, sys\n"
        f"merging.find_folder = lambda _: __import__('pathlib').Path({str(other)!r})\n"
        "from gradualdiff.cli.main import main\nmain()\n"
    )
    options = ("--merge", "--to", str(tmp_path / "m"), "--store", str(whole[0] / "store"))
    done = subprocess.run(
        [sys.executable, "-c", script, "runs", "export", "tiny", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == errors.ModelError.exit_code, done.stderr
    assert "expected fingerprint" in done.stderr


@pytest.mark.parametrize("quantisation", ["int8", "none"])
def test_other_quantisations_run_and_verify(model, tmp_path, quantisation):
    """The same federation over an 8-bit and an unquantised base."""
    path = write_federation(tmp_path, model, quantisation=quantisation, rounds=1)
    assert summary(gradualdiff("simulate", path, "--json"))["state"] == "finished"
    assert gradualdiff("runs", "verify", "tiny", "--store", tmp_path / "store").returncode == 0


def test_optimiser_state_is_kept_between_rounds_when_asked(whole, model, tmp_path):
    """keep: every site says so from round 2 on, and the result is another one than with reset."""
    path = write_federation(tmp_path, model, extra='optimizer_state = "keep"')
    kept = summary(gradualdiff("simulate", path, "--json"))
    assert kept["adapter_sha"] != whole[1]["adapter_sha"]
    history = Ledger(DirectoryStore(tmp_path / "store"), "tiny", "t", lambda: 0.0).history()
    states = {(r.round, r.state) for r in history if isinstance(r, AcceptedRecord)}
    assert states == {(1, "fresh"), (2, "kept"), (3, "kept")}
