"""The gradient pass over a tiny Llama: a sketch of the whole weights' gradient."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from participant.data import TokenisedExample
from participant.learner.gradient import gradient_pass, sample_place
from participant.learner.training import RoundPlace, step_batches
from participant.model import LocalModel, pick_device, settle_threads
from shared.adapters.lora import KIND
from shared.config import BaseSection, LoraSection, TrainingSection
from shared.errors import InterruptedRunError
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.model

PLACE = RoundPlace("site", 2, 7, 0.5, 1.0)
SAMPLE = sample_place(PLACE, "digest")
LORA = LoraSection(rank=12, alpha=16.0, dropout=0.0)
SETTINGS = TrainingSection(local_steps=3, batch_size=2, gradient_accumulation=2)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party code building a model, not ours
        return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def load(path, quantisation):
    settle_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = BaseSection(model=str(path), quantisation=quantisation, compute_dtype="float32")
        return LocalModel(base, LORA, pick_device("cpu"))


def examples():
    """Answers of several lengths: a mean over tokens is not one over examples."""
    return [TokenisedExample(tuple(range(3 + i, 15 + 2 * i)), 6 + i % 3) for i in range(16)]


def random_adapter(model):
    """Both factors from fixed streams: the pass itself begins at zeros."""
    return {
        spec.name: np.random.Generator(np.random.Philox(at)).standard_normal(spec.shape, np.float32)
        for at, spec in enumerate(model.manifest().tensors)
    }


def of(model, side):
    return [spec.name for spec in KIND.only(model.manifest(), side, "range-finder").tensors]


def take(model, values, side, should_stop=lambda: False, report=lambda _: None):
    """The gradient of one factor by name, the other one being that of ``values``."""
    model.load_adapter(values.__getitem__)
    only = of(model, side)
    result = gradient_pass(model, examples(), SETTINGS, PLACE, SAMPLE, only, should_stop, report)
    return result, {name: model.read(name).copy() for name in only}


def base_layer(model, layer):
    return model._network.get_submodule(layer).base_layer


def whole_gradients(model):
    """G of each layer, as nobody but a test would: by autograd over the base's own weights."""
    model.load_adapter(lambda name: np.zeros(model.parameters[name].shape, np.float32))
    layers = [layer.name for layer in KIND.layers(model.manifest())]
    for layer in layers:
        base_layer(model, layer).weight.requires_grad_(True)
    drawn = [examples()[at] for batch in step_batches(16, SETTINGS, SAMPLE) for at in batch]
    tokens = sum(len(one.input_ids) - one.answer_start for one in drawn)
    (sum(model.answer_nll([one]) for one in drawn) / tokens).backward()
    found = {}
    for layer in layers:
        weight = base_layer(model, layer).weight
        found[layer] = weight.grad.double().numpy()
        weight.grad = None
        weight.requires_grad_(False)
    return found


def check_sketches(model, whole):
    """B's gradient is s G A^T and A's is s B^T G, to within float32."""
    values, scale = random_adapter(model), LORA.alpha / LORA.rank
    for side in ("left", "right"):
        _, found = take(model, values, side)
        for layer in KIND.layers(model.manifest()):
            g = whole[layer.name]
            if side == "left":
                name, wanted = layer.left.name, scale * g @ values[layer.right.name].T
            else:
                name, wanted = layer.right.name, scale * values[layer.left.name].T @ g
            assert np.linalg.norm(found[name] - wanted) < 2e-5 * np.linalg.norm(wanted)


def test_both_factors_gradients_are_sketches_of_the_whole_weights(path):
    """Of the mean loss over all answer tokens, and at the base whatever the adapter holds."""
    model = load(path, "none")
    check_sketches(model, whole_gradients(model))


def test_over_four_bits_it_is_the_gradient_at_the_weights_they_stand_for(path):
    """Against a model that holds these weights unpacked."""
    import bitsandbytes

    packed, plain = load(path, "nf4"), load(path, "none")
    for layer in KIND.layers(packed.manifest()):
        weight = base_layer(packed, layer.name).weight
        unpacked = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        base_layer(plain, layer.name).weight.data.copy_(unpacked)
    check_sketches(packed, whole_gradients(plain))


def test_it_is_the_same_again_also_after_an_interruption(path):
    """To the byte; nothing of what was stopped stays, and each step is told."""
    model, told = load(path, "nf4"), []
    values = random_adapter(model)
    result, first = take(model, values, "left", report=told.append)
    assert [(p.activity, p.done, p.total) for p in told] == [("train", n, 3) for n in (1, 2, 3)]
    assert (result.steps, result.tokens, told[-1].tokens) == (3, result.tokens, result.tokens)
    asked = iter([False, False, False, True])
    with pytest.raises(InterruptedRunError, match="round 2 of site"):
        take(model, values, "left", should_stop=lambda: next(asked))
    assert next(asked, None) is None
    assert all(parameter.grad is None for parameter in model.parameters.values())
    _, again = take(model, values, "left")
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_only_gradients_of_the_trained_factor_are_held(path):
    """Neither the base's weights nor the other factor get any."""
    model = load(path, "none")
    held = []
    only = set(of(model, "right"))

    def look(_progress):
        held.extend(name for name, p in model._network.named_parameters() if p.grad is not None)

    take(model, random_adapter(model), "right", report=look)
    assert {name.replace(".default.", ".") for name in held} == only


def test_every_round_of_a_run_draws_the_same_examples():
    """Its rounds are passes over one matrix; another run draws others."""
    other_round = RoundPlace("site", 1, 99, 0.0, 0.5)
    assert sample_place(other_round, "digest").seed == SAMPLE.seed
    assert sample_place(other_round, "digest").number == SAMPLE.number
    assert sample_place(PLACE, "another").seed != SAMPLE.seed
