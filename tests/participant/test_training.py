"""The training loop over a tiny quantised Llama: repeatable, token-weighted, stoppable."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from participant.data import TokenisedExample
from participant.learner.evaluation import evaluate_held_out
from participant.learner.optimizer_state import save_optimizer
from participant.learner.training import (
    Beginning,
    RoundPlace,
    learning_rate,
    step_batches,
    steps_in_round,
    train_round,
)
from participant.model import LocalModel, pick_device, settle_threads
from shared.config import BaseSection, LoraSection, TrainingSection
from shared.errors import InterruptedRunError, ModelError
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.model

PLACE = RoundPlace("site", 1, 7, 0.0, 0.5)


def settings(**values):
    return TrainingSection(**{"local_steps": 3, "batch_size": 2, "learning_rate": 0.01, **values})


def examples(count=8):
    return [TokenisedExample(tuple(range(3 + i, 15 + i)), 6) for i in range(count)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party code building a model, not ours
        return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def load(path, quantisation="nf4", dropout=0.1, compute_dtype="auto"):
    settle_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = BaseSection(model=str(path), quantisation=quantisation, compute_dtype=compute_dtype)
        return LocalModel(base, LoraSection(rank=4, dropout=dropout), pick_device("cpu"))


@pytest.fixture(scope="module")
def model(path):
    return load(path)


def start(model):
    """The same small adapter each time: A from a fixed stream, B zero."""
    specs = {spec.name: spec for spec in model.manifest().tensors}

    def read(name):
        spec = specs[name]
        if spec.init == "zeros":
            return np.zeros(spec.shape, np.float32)
        stream = np.random.Generator(np.random.Philox(sorted(specs).index(name)))
        return stream.standard_normal(spec.shape, dtype=np.float32) / 8

    model.load_adapter(read)


def adapter(model):
    return {spec.name: model.read(spec.name).copy() for spec in model.manifest().tensors}


def train(model, place=PLACE, data=None, state=None, should_stop=lambda: False, **values):
    return train_round(
        model,
        data or examples(),
        settings(**values),
        place,
        begin=Beginning(state),
        should_stop=should_stop,
        report=lambda _: None,
    )


def trained(model, **values):
    start(model)
    train(model, **values)
    return adapter(model)


def same(one, two):
    return all(np.array_equal(one[name], two[name]) for name in one)


def test_the_same_round_gives_the_same_bytes_even_after_another_sites_training(model):
    """Nothing leaks: dropout, data order and moments come from the seed alone."""
    first = trained(model)
    other = trained(model, place=RoundPlace("other", 1, 7, 0.0, 0.5))
    assert not same(first, other)
    assert same(first, trained(model))


@pytest.mark.parametrize("quantisation", ["nf4", "int8", "none"])
def test_training_changes_the_adapter_and_nothing_else(path, quantisation):
    """The base is frozen under every quantisation; all adapter tensors are float32 and move."""
    model = load(path, quantisation)
    start(model)
    before = adapter(model)
    trainable = sum(p.requires_grad for p in model._network.parameters())
    frozen = {
        name: p.detach().clone()
        for name, p in model._network.named_parameters()
        if not p.requires_grad
    }
    train(model)
    after = adapter(model)
    assert trainable == len(before)
    assert all(value.dtype == np.float32 for value in after.values())
    assert all(not np.array_equal(before[n], after[n]) for n in before if "lora_B" in n)
    now = dict(model._network.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in frozen.items())


def test_two_batches_accumulated_are_one_batch_twice_the_size(path):
    """Loss is weighted by token over the whole step, so 2 x 2 equals 4 without dropout."""
    model = load(path, "none", dropout=0.0, compute_dtype="float32")
    one = trained(model, batch_size=4, local_steps=1)
    two = trained(model, batch_size=2, gradient_accumulation=2, local_steps=1)
    assert all(np.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_gradient_checkpointing_saves_memory_and_changes_nothing(path):
    """Recomputed activations give the same gradients, dropout included."""
    model = load(path, "none", compute_dtype="float32")
    plain = trained(model)
    again = trained(model, gradient_checkpointing=True)
    assert all(np.allclose(plain[name], again[name], atol=1e-6) for name in plain)


def test_loss_is_taken_over_answer_tokens_only(path):
    """answer_nll against full logits by hand, for examples of different lengths."""
    model = load(path, "none")
    start(model)
    data = [TokenisedExample(tuple(range(3, 13)), 4), TokenisedExample(tuple(range(20, 27)), 5)]
    expected = 0.0
    with torch.inference_mode(), model._autocast():
        for example in data:
            ids = torch.tensor([example.input_ids])
            logits = model._network(input_ids=ids).logits[0].float().log_softmax(-1)
            for position in range(example.answer_start, len(example.input_ids)):
                expected -= float(logits[position - 1, example.input_ids[position]])
        got = float(model.answer_nll(data))
    assert got == pytest.approx(expected, rel=5e-3)
    held_out = evaluate_held_out(model, data, lambda: False, lambda _: None)
    assert held_out.tokens == 8
    assert held_out.nll == pytest.approx(expected / 8, rel=5e-3)


def test_the_schedule_is_one_over_the_whole_run():
    """Golden values: warm-up to 10 %, then the named shape down to the end of the run."""
    at = [0.05, 0.1, 0.55, 1.0]
    golden = {
        "constant": [0.5, 1.0, 1.0, 1.0],
        "linear": [0.5, 1.0, 0.5, 0.0],
        "cosine": [0.5, 1.0, 0.5, 0.0],
    }
    for schedule, wanted in golden.items():
        run = settings(learning_rate=1.0, schedule=schedule, warmup_ratio=0.1)
        assert [learning_rate(run, p) for p in at] == pytest.approx(wanted, abs=1e-12)


def test_an_epoch_shows_each_example_once_and_steps_run_on_into_the_next():
    """local_epochs = 1 over 5 examples by 2: 3 steps; local_steps = 4: 8 examples, in turn."""
    epoch = settings(local_steps=None, local_epochs=1)
    assert steps_in_round(5, epoch) == 3
    shown = [i for batch in step_batches(5, epoch, PLACE) for i in batch]
    assert sorted(shown) == [0, 1, 2, 3, 4]
    shown = [i for batch in step_batches(5, settings(local_steps=4), PLACE) for i in batch]
    assert len(shown) == 8
    assert sorted(shown[:5]) == [0, 1, 2, 3, 4]


def test_a_kept_optimiser_goes_on_where_it_was(model, tmp_path):
    """State through safetensors: another result than a reset, and the same one twice."""
    start(model)
    first = train(model)
    save_optimizer(first.optimizer, model.parameters, tmp_path / "state.safetensors")
    later = RoundPlace("site", 2, 7, 0.5, 1.0)
    kept = trained(model, place=later, state=tmp_path / "state.safetensors")
    again = trained(model, place=later, state=tmp_path / "state.safetensors")
    assert same(kept, again)
    assert not same(kept, trained(model, place=later))


def test_a_loss_that_is_not_finite_is_an_error_of_the_tree(model):
    """A rate that blows the adapter up ends the round by name, not with NaN in a delta."""
    start(model)
    with pytest.raises(ModelError, match="finite"):
        train(model, learning_rate=1e30, local_steps=20)


def test_a_stop_is_seen_between_micro_batches(model):
    """should_stop ends the training with InterruptedRunError."""
    start(model)
    asked = iter([False, False, True])
    with pytest.raises(InterruptedRunError):
        train(model, should_stop=lambda: next(asked))


def test_an_unknown_model_is_an_error_that_says_what_to_do(tmp_path):
    """A path that is no model and no hub id that can be had."""
    with pytest.raises(ModelError, match=r"base\.model"):
        load(tmp_path / "nowhere")


def test_training_lowers_the_loss(path):
    """Twenty steps on eight examples are learnt."""
    model = load(path)
    start(model)
    before = evaluate_held_out(model, examples(), lambda: False, lambda _: None).nll
    train(model, local_steps=20)
    after = evaluate_held_out(model, examples(), lambda: False, lambda _: None).nll
    assert math.isfinite(after)
    assert after < before - 0.5
