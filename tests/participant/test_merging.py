"""Directions merged into an unquantised base for a while: the same model, and no trace of it."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from participant.learner.model_pool import ModelPool  # noqa: E402
from participant.learner.port import DELTA_FILE  # noqa: E402
from participant.model.adapter import add_adapter, trainable  # noqa: E402
from participant.model.libraries import offline, peft, transformers  # noqa: E402
from participant.model.merging import adapted_layers, merged  # noqa: E402
from shared.adapters.lora import KIND  # noqa: E402
from shared.config import BaseSection, LoraSection  # noqa: E402
from shared.errors import ModelError  # noqa: E402
from shared.tensors.delta_file import DeltaFile  # noqa: E402
from shared.tensors.genesis import draw_adapter  # noqa: E402  # after the skip
from shared.tensors.tensor_file import ADAPTER_METADATA, TensorLayout, write_tensors  # noqa: E402
from tests.participant.test_model import EXAMPLES, load  # noqa: E402
from tests.participant.test_torch_learner import (  # noqa: E402
    announce,
    ignore,
    learn,
    make_learner,
    start_round,
)

pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
IDS = torch.arange(3, 20).unsqueeze(0)


def weights(model):
    """sha256 of every weight of the base, the adapter left out."""
    sha = hashlib.sha256()
    for name, values in sorted(model._network.state_dict().items()):
        if ".lora_" not in name:
            sha.update(values.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def logits(network):
    with torch.inference_mode():
        return network(input_ids=IDS).logits


def grown(model, draw, rank, fresh):
    """An adapter of ``rank`` directions, the first ``fresh`` of them with B zero; its reader."""
    read = draw(KIND.of_rank(model.manifest(), rank))

    def value(name):
        values = read(name).copy()
        if KIND.side(name) == "left":
            values[:, :fresh] = 0
        return values

    return value


def write(path, manifest, read):
    layouts = [TensorLayout(spec.name, "F32", spec.shape) for spec in manifest.tensors]
    write_tensors(path, layouts, (read(spec.name) for spec in manifest.tensors), ADAPTER_METADATA)


@pytest.mark.parametrize("scaling", ["classic", "rslora"])
def test_merged_it_is_the_same_model_as_the_whole_adapter_in_plain_peft(
    tiny_model, draw, tmp_path, scaling
):
    """Rank 11 from the ledger's two files, against its first 4 directions over a merged base."""
    lora = LoraSection(rank=4, alpha=6.0, scaling=scaling)
    model = load(tiny_model, alpha=6.0, scaling=scaling)
    read = grown(model, draw, 11, 4)
    whole = KIND.of_rank(model.manifest(), 11)
    base = BaseSection(model=str(tiny_model), quantisation="none")
    config = KIND.peft_config(base, KIND.at_rank(lora, 11), whole)
    (tmp_path / "adapter_config.json").write_bytes(config)
    write(tmp_path / "adapter_model.safetensors", whole, read)
    with offline():
        plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
        wanted = logits(peft.PeftModel.from_pretrained(plain, tmp_path).eval())
    model.load_adapter(lambda name: KIND.leading(name, read(name), 4))
    untouched = logits(model._network)
    with model.merged(lambda name: KIND.beyond(name, read(name), 4)):
        assert torch.allclose(logits(model._network), wanted, atol=1e-5)
    assert not torch.allclose(untouched, wanted, atol=1e-3)
    assert torch.equal(logits(model._network), untouched)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_the_base_has_its_bytes_back_whatever_happened(tiny_model, draw, compute_dtype):
    """After a use, a failure inside, and a factor that does not fit the tenth layer."""
    model = load(tiny_model, compute_dtype=compute_dtype)
    before, read = weights(model), draw(model.manifest())
    with model.merged(read):
        assert weights(model) != before
        with model.training(gradient_checkpointing=False):
            model.answer_nll(EXAMPLES).backward()
    assert weights(model) == before
    with pytest.raises(ZeroDivisionError), model.merged(read):
        raise ZeroDivisionError
    assert weights(model) == before
    wrong = [spec.name for spec in model.manifest().tensors][18]

    def misfit(name):
        return np.ones((4, 3), np.float32) if name == wrong else read(name)

    with pytest.raises(ModelError, match=r"expected factors of a weight"), model.merged(misfit):
        pass
    assert weights(model) == before


def test_nothing_is_merged_where_b_is_zero(tiny_model, draw):
    """A file of the first round, or a site of a lower rank: not a bit changes."""
    model = load(tiny_model)
    before = weights(model)
    read = grown(model, draw, 4, 4)
    for rank in (4, 2):
        with model.merged(lambda name, rank=rank: KIND.beyond(name, read(name), rank)):
            assert weights(model) == before


def test_a_quantised_base_cannot_be_merged_into(tiny_model):
    """The layer is named, and what to use instead."""
    for kind in ("nf4", "int8"):
        with pytest.raises(ModelError, match=r'not quantised.*quantisation = "none"'):
            load(tiny_model, kind).check_merges()


def gpt2(**settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **settings)).eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
def test_weights_that_lie_the_other_way_round_are_merged_too(draw):
    """GPT-2's Conv1D keeps (inputs, outputs)."""
    lora = LoraSection(rank=4, alpha=6.0, target_modules=("c_attn", "c_proj"))
    network, manifest, _ = add_adapter(gpt2(), lora)
    parameters, read = trainable(network.eval()), draw(manifest)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(read(name)))
    wanted = logits(network)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
    with merged(adapted_layers(network, manifest), read):
        assert torch.allclose(logits(network), wanted, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model.*tied:UserWarning", "ignore:Model with:UserWarning")
def test_a_weight_that_two_layers_share_is_refused():
    """GPT-2's head is its embedding: merged into one, the adapter would act in both."""
    network, manifest, _ = add_adapter(gpt2(), LoraSection(rank=4, target_modules=("lm_head",)))
    with pytest.raises(ModelError, match=r"lm_head.*shares.*target_modules"):
        adapted_layers(network, manifest)


# Through the port ----------------------------------------------------------------------------


def flora(tiny_model, rank=4):
    announced = announce(tiny_model)
    base = announced.base.model_copy(update={"quantisation": "none", "compute_dtype": "float32"})
    lora = announced.lora.model_copy(update={"rank": rank})
    return announced.model_copy(update={"base": base, "lora": lora, "averaging": "flora"})


@pytest.mark.parametrize("rank", [4, 2])
def test_a_site_trains_and_measures_over_all_rounds_before(tiny_model, draw, tmp_path, rank):
    """Held-out loss, replies and delta are those of the merged base; then the base is as it was."""
    pool = ModelPool("cpu")
    learner = make_learner(tmp_path / "data", pool)
    announced = flora(tiny_model, rank)
    manifest = learner.prepare(announced, ignore).manifest
    genesis = tmp_path / "genesis"
    draw_adapter(KIND.of_rank(manifest, 4), 1, genesis)
    stack = tmp_path / "stack"
    with pool.borrow(announced.base, announced.lora, 1) as model:
        before = weights(model)
        write(stack, KIND.of_rank(manifest, 9), grown(model, draw, 9, 4))
    task = start_round().model_copy(update={"averaging": "flora"})
    losses, shas = [], []
    for path in (genesis, stack):
        folder = tmp_path / f"out-{path.name}"
        learned = learn(learner, path, folder, task)
        losses.append(learned.metrics.held_out)
        shas.append((folder / DELTA_FILE).read_bytes())
        assert learner.evaluate("run", path, ignore) == losses[-1]
        with DeltaFile(folder / DELTA_FILE, manifest) as delta:
            assert delta.read(manifest.tensors[0]).shape == manifest.tensors[0].shape
        with pool.borrow(announced.base, announced.lora, 1) as model:
            assert weights(model) == before
    assert losses[0] != losses[1]
    assert shas[0] != shas[1]


def test_a_site_whose_base_cannot_be_merged_into_says_so_before_the_run(tiny_model, tmp_path):
    """Not in the second round, when there is something to merge."""
    learner = make_learner(tmp_path / "data", ModelPool("cpu"))
    announced = announce(tiny_model).model_copy(update={"averaging": "flora"})
    with pytest.raises(ModelError, match="not quantised"):
        learner.prepare(announced, ignore)
