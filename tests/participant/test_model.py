"""A base model is loaded, named by its content, and lends its adapter's tensors by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch

torch = pytest.importorskip("torch")

from participant.data import TokenisedExample  # noqa: E402
from participant.model import LocalModel, pick_device, settle_threads  # noqa: E402
from participant.model.fingerprint import fingerprint_of  # noqa: E402
from participant.model.libraries import (  # noqa: E402
    bitsandbytes,
    huggingface_hub,
    offline,
    peft,
    transformers,
)
from participant.model.numerics import pick_compute_dtype  # noqa: E402
from shared.adapters.lora import KIND  # noqa: E402  # after the skip
from shared.config import BaseSection, LoraSection  # noqa: E402
from shared.errors import ConfigError, ModelError  # noqa: E402
from shared.tensors.tensor_file import ADAPTER_METADATA, TensorLayout, write_tensors  # noqa: E402

pytestmark = pytest.mark.model

CPU = torch.device("cpu")
EXAMPLES = [TokenisedExample(tuple(range(3 + i, 15 + 2 * i)), 6) for i in range(4)]


def load(path, quantisation="none", compute_dtype="float32", **lora):
    settle_threads(1)
    base = BaseSection(model=str(path), quantisation=quantisation, compute_dtype=compute_dtype)
    return LocalModel(base, LoraSection(**{"rank": 4, **lora}), CPU)


@pytest.fixture(scope="module")
def model(tiny_model):
    return load(tiny_model)


def gradients(model):
    """Bytes of the gradient of one batch, by tensor."""
    with model.training(gradient_checkpointing=False):
        torch.manual_seed(5)
        model.answer_nll(EXAMPLES).backward()
        return {name: p.grad.numpy().tobytes() for name, p in model.parameters.items()}


def test_an_adapter_that_is_loaded_is_read_back_bit_for_bit(model, draw):
    """Values go into the float32 parameters in place, and come out as they went in."""
    wanted = draw(model.manifest())
    places = {name: p.data_ptr() for name, p in model.parameters.items()}
    model.load_adapter(wanted)
    for spec in model.manifest().tensors:
        got = model.read(spec.name)
        assert got.dtype == np.float32
        assert got.tobytes() == wanted(spec.name).tobytes()
    assert places == {name: p.data_ptr() for name, p in model.parameters.items()}


def test_names_and_values_are_those_of_pefts_saved_files(model, draw):
    """Whatever loads PEFT adapters loads ours."""
    model.load_adapter(draw(model.manifest()))
    saved = peft.get_peft_model_state_dict(model._network, save_embedding_layers=False)
    assert sorted(saved) == [spec.name for spec in model.manifest().tensors]
    assert all(np.array_equal(model.read(name), value.numpy()) for name, value in saved.items())


def test_the_manifest_tells_how_each_tensor_begins_and_which_modules_are_adapted(model):
    """Two tensors for each of the seven linear layers of both blocks; the head is left out."""
    manifest = model.manifest()
    modules = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"
    assert list(manifest.target_modules) == modules.split()
    assert len(manifest.tensors) == 2 * 2 * 7
    prefix = "base_model.model.model.layers.0.mlp.down_proj"
    first, second = manifest.tensors[:2]
    assert (first.name, first.shape, first.init) == (
        f"{prefix}.lora_A.weight",
        (4, 128),
        "kaiming_uniform",
    )
    assert (second.name, second.shape, second.init) == (f"{prefix}.lora_B.weight", (64, 4), "zeros")


def test_named_target_modules_are_the_only_ones_adapted(tiny_model):
    """lora.target_modules may name them instead."""
    manifest = load(tiny_model, target_modules=("q_proj", "v_proj")).manifest()
    assert manifest.target_modules == ("q_proj", "v_proj")
    assert len(manifest.tensors) == 2 * 2 * 2


def test_target_modules_that_do_not_exist_are_named(tiny_model):
    """A misspelt layer is a ModelError, not PEFT's ValueError."""
    with pytest.raises(ModelError, match=r"lora\.target_modules.*nowhere"):
        load(tiny_model, target_modules=("nowhere",))


def test_the_scale_of_the_product_is_alpha_by_r_or_by_its_root(tiny_model):
    """With alpha = 6 and r = 4 it is 1.5, and 3 for rsLoRA (arXiv:2312.03732), in every layer."""
    for scaling, wanted in (("classic", 1.5), ("rslora", 3.0)):
        network = load(tiny_model, alpha=6.0, scaling=scaling)._network
        scales = {
            m.scaling["default"]
            for m in network.modules()
            if hasattr(m, "scaling") and isinstance(m.scaling, dict)
        }
        assert scales == {wanted}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 asks
def test_a_stored_rslora_adapter_is_the_same_model_in_plain_peft(tiny_model, draw, tmp_path):
    """The ledger's two files, loaded by PEFT alone: equal logits, and others than classic's."""
    found = {}
    for scaling in ("classic", "rslora"):
        model = load(tiny_model, alpha=6.0, scaling=scaling)
        manifest, read = model.manifest(), draw(model.manifest())
        model.load_adapter(read)
        folder = tmp_path / scaling
        folder.mkdir()
        lora = LoraSection(rank=4, alpha=6.0, scaling=scaling)
        base = BaseSection(model=str(tiny_model))
        (folder / "adapter_config.json").write_bytes(KIND.peft_config(base, lora, manifest))
        layouts = [TensorLayout(spec.name, "F32", spec.shape) for spec in manifest.tensors]
        values = (read(spec.name) for spec in manifest.tensors)
        write_tensors(folder / "adapter_model.safetensors", layouts, values, ADAPTER_METADATA)
        with offline():
            plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
            loaded = peft.PeftModel.from_pretrained(plain, folder).eval()
        ids = torch.arange(3, 20).unsqueeze(0)
        with torch.inference_mode():
            found[scaling] = loaded(input_ids=ids).logits
            assert torch.equal(found[scaling], model._network(input_ids=ids).logits)
    assert not torch.allclose(found["classic"], found["rslora"], atol=1e-3)


def test_an_adapter_that_does_not_fit_is_refused_by_tensor(model, draw):
    """Missing, misshapen or in another dtype."""
    wanted = draw(model.manifest())
    name = model.manifest().tensors[0].name

    def missing(asked):
        return {}[asked]

    for read, reason in (
        (missing, "found none"),
        (lambda asked: wanted(asked)[:1] if asked == name else wanted(asked), "expected float32"),
        (lambda asked: wanted(asked).astype(np.float64), "got float64"),
    ):
        with pytest.raises(ModelError, match=reason) as caught:
            model.load_adapter(read)
        assert name in str(caught.value)


@pytest.mark.parametrize("quantisation", ["nf4", "int8", "none"])
def test_an_evaluation_in_between_changes_no_gradient(tiny_model, draw, quantisation):
    """4-bit weights must not be repacked for good at the first look in eval mode."""
    model = load(tiny_model, quantisation, "bfloat16")
    model.load_adapter(draw(model.manifest()))
    first = gradients(model)
    with torch.inference_mode():
        before = float(model.answer_nll(EXAMPLES))
    assert gradients(model) == first
    with torch.inference_mode():
        assert float(model.answer_nll(EXAMPLES)) == before
    states = [
        m.weight.quant_state
        for m in model._network.modules()
        if isinstance(m, bitsandbytes.nn.Linear4bit)
    ]
    assert bool(states) == (quantisation == "nf4")
    assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)


@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
def test_training_and_evaluation_compute_with_the_same_base(tiny_model, draw, quantisation):
    """Without dropout both modes give one loss, so a held-out loss is that of what was trained."""
    model = load(tiny_model, quantisation, "bfloat16", dropout=0.0)
    model.load_adapter(draw(model.manifest()))
    with torch.inference_mode():
        evaluated = float(model.answer_nll(EXAMPLES))
    with model.training(gradient_checkpointing=False):
        assert float(model.answer_nll(EXAMPLES).detach()) == pytest.approx(evaluated, rel=1e-3)


def test_the_fingerprint_follows_what_a_base_is_and_not_how_it_is_computed(tiny_model, tmp_path):
    """Quantisation counts; compute dtype and who saved the model do not."""
    plain = load(tiny_model).fingerprint
    assert load(tiny_model, compute_dtype="bfloat16").fingerprint == plain
    assert load(tiny_model, "nf4").fingerprint != plain
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0.0"}))
    assert load(copy).fingerprint == plain


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json"]
)
def test_another_file_gives_another_fingerprint(tiny_model, tmp_path, name):
    """Weights, tokenizer, template and architecture each count."""
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    before = fingerprint_of(copy, {})
    if name == "config.json":
        config = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    else:
        with (copy / name).open("ab") as file:
            file.write(b" ")
    assert fingerprint_of(copy, {}) != before


def test_weights_that_are_a_pickle_are_not_opened(tiny_model, tmp_path):
    """A folder without safetensors is refused with a way out."""
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load(copy)


def test_a_folder_that_is_no_model_and_a_damaged_one_say_so(tiny_model, tmp_path):
    """Both name the folder; neither asks the hub."""
    with pytest.raises(ModelError, match=r"config\.json"):
        load(tmp_path)
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(copy)


def test_weights_that_lack_a_tensor_are_refused_by_name(tiny_model, tmp_path):
    """Drawn at random, as transformers does, it would differ from site to site."""
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del weights[name]
    safetensors.torch.save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=name):
        load(copy)


def test_weights_of_another_shape_than_the_config_are_refused(tiny_model, tmp_path):
    """A config.json that belongs to another model."""
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(copy)


def test_a_hub_id_that_cannot_be_had_is_an_error_that_says_what_to_do():
    """Offline, so that no test asks for it; the message is the same without a network."""
    with offline(), pytest.raises(ModelError, match="from the hub"):
        load("nobody/nothing")


def test_offline_mode_ends_with_its_block():
    """Whoever named a hub id may still download it afterwards."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    variable = os.environ.get("HF_HUB_OFFLINE")
    with offline():
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE
    assert os.environ.get("HF_HUB_OFFLINE") == variable


IMPORTED = """
import socket

def refuse(*arguments, **settings):
    raise SystemExit("the import opened a connection")

socket.socket.connect = socket.create_connection = refuse
import participant.model
"""


def test_importing_the_libraries_is_silent_and_asks_nobody(tmp_path):
    """Even where the package is installed through which bitsandbytes would fetch a kernel."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__): raise SystemExit('fetched')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_numerics_tell_what_bytes_depend_on(model):
    """Versions, CPU type, threads and dtype."""
    told = model.numerics()
    assert set(told.versions) == {"torch", "transformers", "peft", "bitsandbytes"}
    assert (told.device, told.cpu_threads, told.compute_dtype) == ("cpu", 1, "float32")
    assert told.cpu_capability == torch.backends.cpu.get_cpu_capability()


def test_threads_can_be_settled_again_and_algorithms_stay_deterministic():
    """Torch takes the number of interop threads once; a second run in one process may not fail."""
    for count in (2, 1):
        settle_threads(count)
        assert torch.get_num_threads() == count
    assert torch.are_deterministic_algorithms_enabled()


def test_a_device_that_is_not_there_is_a_config_error(monkeypatch):
    """Without a GPU "cuda" names the setting; auto takes the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device\.kind"):
        pick_device("cuda")
    assert pick_device("auto") == CPU


@pytest.mark.parametrize(
    ("capabilities", "wanted"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)],
)
def test_auto_computes_in_bfloat16_only_where_the_cpu_multiplies_it(
    monkeypatch, capabilities, wanted
):
    """Emulated bfloat16 is slower than float32 and less exact."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert pick_compute_dtype("auto", CPU) == wanted
    assert pick_compute_dtype("bfloat16", CPU) == torch.bfloat16
    assert pick_compute_dtype("float32", CPU) == torch.float32
