"""The adapter of a round on a model that a notebook holds."""

from __future__ import annotations

import pytest

import gradualdiff as gd
from tests.command_line import gradualdiff
from tests.tiny_model import make_tiny_model, write_federation

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model."""
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A finished run of two rounds over it."""
    folder = tmp_path_factory.mktemp("run")
    path = write_federation(folder, model, quantisation="none", rounds=2)
    done = gradualdiff("simulate", path, "--json")
    assert done.returncode == 0, done.stderr
    return gd.open_store(path).run("tiny")


def logits(network):
    """What it says of some tokens."""
    network.eval()
    with torch.inference_mode():
        return network(input_ids=torch.tensor([[1, 2, 3, 4]])).logits


def test_an_adapter_is_put_on_a_bare_model_and_on_a_peft_model(run, model, tmp_path):
    """Each computes as the saved adapter does, and the adapters stay side by side."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    expected = {}
    for number in (1, 2):
        run.adapter(number).save(tmp_path / str(number))
        base = AutoModelForCausalLM.from_pretrained(model)
        expected[number] = logits(PeftModel.from_pretrained(base, tmp_path / str(number)))
    loaded = run.adapter(1).load_into(AutoModelForCausalLM.from_pretrained(model))
    assert torch.equal(logits(loaded), expected[1])
    assert run.adapter(2).load_into(loaded) is loaded
    assert torch.equal(logits(loaded), expected[2])
    assert not torch.equal(expected[1], expected[2])
    loaded.set_adapter("tiny@1")
    assert torch.equal(logits(loaded), expected[1])


def test_a_model_that_it_does_not_fit_is_refused(run, model):
    """More layers than it has weights for, fewer, or none of those names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for other in (
        {"num_hidden_layers": 3},
        {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1},
    ):
        changed = AutoConfig.from_pretrained(model, **other)
        with pytest.raises(gd.errors.ModelError, match="does not fit this LlamaForCausalLM"):
            run.adapter().load_into(AutoModelForCausalLM.from_config(changed))
    with pytest.raises(gd.errors.ModelError, match="does not fit this Sequential"):
        run.adapter().load_into(torch.nn.Sequential(torch.nn.Linear(2, 2)))
