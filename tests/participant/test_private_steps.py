"""Private optimiser steps over a tiny Llama: clipped, noisy, repeatable, and still learning."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from participant.data import SiteData, TokenisedExample
from participant.learner.private_steps import PrivateSteps, add_clipped, begin_private
from participant.learner.training import Beginning, RoundPlace, train_round
from participant.model import LocalModel, pick_device, settle_threads
from participant.privacy import Mechanism, Noise, Secret
from shared.config import BaseSection, LoraSection, TrainingSection
from shared.errors import ProtocolError
from shared.protocol.events import WirePrivacy
from tests.participant.test_acceptance import private_run, started
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.model

PLACE = RoundPlace("site", 1, 7, 0.0, 0.5)
SETTINGS = TrainingSection(local_steps=3, batch_size=2, learning_rate=0.01)
SECRET = Secret(bytes(range(32)))
CLIP = 0.5
NO_NOISE = 1e-12


def examples(count=8):
    return [TokenisedExample(tuple(range(3 + i, 15 + i)), 6) for i in range(count)]


def steps(rate=1.0, sigma=NO_NOISE, clip=CLIP, data=None, secret=SECRET):
    data = data or examples()
    noise = Noise(rate, sigma)
    return PrivateSteps(data, Mechanism(len(data), noise, clip, 1e-3, 3, 1), secret)


@pytest.fixture(scope="module", params=["nf4", "none"])
def model(request, tmp_path_factory):
    settle_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party code building a model, not ours
        path = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
        base = BaseSection(model=str(path), quantisation=request.param, compute_dtype="float32")
        return LocalModel(base, LoraSection(rank=4, dropout=0.0), pick_device("cpu"))


@pytest.fixture
def begun(model, draw):
    """The model with the same adapter each time, in training."""
    model.load_adapter(draw(model.manifest()))
    with model.training(gradient_checkpointing=False):
        yield model


def gradient(model, private, step=0):
    private.gradient(model, model.parameters, step, lambda: None)
    found = {name: p.grad.clone() for name, p in model.parameters.items()}
    for parameter in model.parameters.values():
        parameter.grad = None
    return found


def norm_of(tensors):
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))


def alone(model, example):
    """An example's own gradient, of its mean loss."""
    (model.answer_nll([example]) / 6).backward()
    found = {name: p.grad.clone() for name, p in model.parameters.items()}
    for parameter in model.parameters.values():
        parameter.grad = None
    return found


def test_without_noise_it_is_the_mean_of_clipped_gradients(begun):
    """By hand, example by example; some are clipped and some are not."""
    grads = [alone(begun, example) for example in examples()]
    norms = sorted(norm_of(grad) for grad in grads)
    clip = (norms[3] + norms[4]) / 2
    found = gradient(begun, steps(clip=clip))
    for name in found:
        mean = sum(grad[name] * min(1, clip / norm_of(grad)) for grad in grads) / len(grads)
        assert torch.allclose(found[name], mean, atol=1e-6 * clip, rtol=1e-3)


def test_no_examples_gradient_is_longer_than_the_clip(begun):
    """Whatever its norm was, over all tensors together; and short ones stay as they are."""
    for example in examples():
        for clip in (1e-3, CLIP, 1e3):
            (begun.answer_nll([example]) * 10).backward()
            before = norm_of({name: p.grad for name, p in begun.parameters.items()})
            total = {name: torch.zeros_like(p) for name, p in begun.parameters.items()}
            assert add_clipped(total, begun.parameters, clip)
            assert norm_of(total) <= clip
            assert norm_of(total) == pytest.approx(min(before, clip), rel=1e-4)


def test_one_record_more_changes_the_sum_by_the_clip_at_most(begun):
    """The sensitivity that the noise is made for."""
    data = examples(9)
    fewer, more = (gradient(begun, steps(data=part)) for part in (data[:8], data))
    change = {name: more[name] * 9 - fewer[name] * 8 for name in more}
    assert 0 < norm_of(change) <= CLIP * (1 + 1e-3)


def test_the_noise_on_a_step_has_its_deviation(begun):
    """Sigma C / (q n) on every number, where the clip leaves nothing of the gradients."""
    sigma, rate = 4.0, 0.5
    found = gradient(begun, steps(rate=rate, sigma=sigma))
    quiet = gradient(begun, steps(rate=rate))
    noise = torch.cat([(found[name] - quiet[name]).flatten() for name in found])
    assert noise.numel() > 5_000
    assert float(noise.std()) == pytest.approx(sigma * CLIP / (rate * 8), rel=0.03)
    assert abs(float(noise.mean())) < 0.05 * float(noise.std())


def test_noise_and_sample_differ_from_step_to_step_and_from_site_to_site(begun):
    """And are the same again for the same secret and step."""
    one = gradient(begun, steps(rate=0.5, sigma=1.0))
    again = gradient(begun, steps(rate=0.5, sigma=1.0))
    later = gradient(begun, steps(rate=0.5, sigma=1.0), step=1)
    other = gradient(begun, steps(rate=0.5, sigma=1.0, secret=Secret(bytes(32))))
    for name in one:
        assert torch.equal(one[name], again[name])
        assert not torch.allclose(one[name], later[name])
        assert not torch.allclose(one[name], other[name])


def test_a_gradient_that_is_no_number_counts_as_nothing(begun, monkeypatch):
    """A record must not spoil the sum: that alone would tell that it is there."""
    wanted = gradient(begun, steps(data=examples()[:7]))
    answer = begun.answer_nll
    last = examples()[7]

    def broken(batch):
        return answer(batch) * (math.nan if batch == [last] else 1.0)

    monkeypatch.setattr(begun, "answer_nll", broken)
    found = gradient(begun, steps())
    assert all(torch.allclose(found[name] * 8, wanted[name] * 7, atol=1e-6) for name in found)


def train(model, draw, private, **begin):
    model.load_adapter(draw(model.manifest()))
    result = train_round(
        model,
        private.examples,
        SETTINGS,
        PLACE,
        begin=Beginning(private=private, **begin),
        should_stop=lambda: False,
        report=lambda _: None,
    )
    return result, {spec.name: model.read(spec.name).copy() for spec in model.manifest().tensors}


def test_a_private_round_moves_the_adapter_and_lowers_the_loss(model, draw):
    """The self-test: with little noise, training works (opacus issue 820 was one where it did not).

    Every tensor moves, the loss falls, and only what is trained moves.
    """
    before = {spec.name: draw(model.manifest())(spec.name) for spec in model.manifest().tensors}
    result, after = train(model, draw, steps(sigma=0.01))
    assert result.last_step_nll < result.first_step_nll
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    only = [name for name in before if "lora_B" in name]
    _, after = train(model, draw, steps(sigma=0.01), only=only)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == set(only)


def test_a_step_that_draws_nobody_is_noise_alone(model, draw):
    """A Poisson sample may be empty: the step is taken all the same, and nothing divides by it."""
    private = steps(rate=1e-9, sigma=1.0)
    assert [private.sample(step) for step in range(3)] == [[], [], []]
    result, _ = train(model, draw, private)
    assert (result.steps, result.first_step_nll) == (3, 0.0)
    assert result.mean_grad_norm > 0


def test_a_round_without_what_was_announced_is_not_trained():
    """A word that lost its [privacy] on the way would else be trained without noise."""
    announced = private_run()
    data = SiteData(tuple(examples()), (), 0, 0)
    for privacy in (None, WirePrivacy(clip=9.0, noise_multiplier=1.0)):
        with pytest.raises(
            ProtocolError, match=r"privacy: expected for round 1 of run r1 what was"
        ):
            begin_private(started(privacy=privacy), announced, "site", data, "", None)


def test_gradients_are_not_clipped_a_second_time(model, draw):
    """max_grad_norm would tell nothing more, but it would undo what the clip was chosen for."""
    result, _ = train(model, draw, steps(sigma=50.0))
    assert result.mean_grad_norm > 10 * SETTINGS.max_grad_norm
