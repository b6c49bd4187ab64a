"""FedProx: the gradient is that of the objective, and a site is held near the round's adapter."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from participant.learner import training  # noqa: E402  # after the skip
from participant.learner.proximal import ProximalTerm  # noqa: E402
from participant.learner.training import Beginning, train_round  # noqa: E402
from tests.participant.test_training import (  # noqa: E402
    PLACE,
    adapter,
    examples,
    load,
    same,
    settings,
    start,
    trained,
)

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def model(tiny_model):
    return load(tiny_model, quantisation="none", compute_dtype="float32")


def drift(after, before):
    return math.sqrt(sum(float(((after[n] - before[n]) ** 2).sum()) for n in before))


def test_the_gradient_by_hand():
    """Loss 3 w at w = 5, source 2, mu 0.5: 3 + 0.5 x (5 - 2) = 4.5; untrained stays untouched."""
    weight = torch.nn.Parameter(torch.tensor([5.0]))
    idle = torch.nn.Parameter(torch.tensor([1.0]))
    sources = {"w": np.array([2.0], np.float32), "idle": np.array([1.0], np.float32)}
    term = ProximalTerm({"w": weight, "idle": idle}, sources.__getitem__, 0.5)
    sources["w"][:] = 9  # a view of a file that is closed since
    (3 * weight).sum().backward()
    term.add_gradient()
    assert weight.grad.item() == 4.5
    assert idle.grad is None


def test_the_gradient_is_autograds_of_the_whole_objective(model, draw):
    """On the real model: of data loss + mu / 2 x ||theta - A||^2, tensor by tensor."""
    start(model)
    source, mu = adapter(model), 0.3
    away = draw(model.manifest())
    model.load_adapter(away)
    term = ProximalTerm(model.parameters, source.__getitem__, mu)
    with model.training(gradient_checkpointing=False):
        torch.manual_seed(3)
        model.answer_nll(examples()).backward()
        term.add_gradient()
        got = {name: p.grad.clone() for name, p in model.parameters.items()}
        model.clear()
        model._network.train()
        torch.manual_seed(3)
        distance = sum(
            ((p - torch.from_numpy(source[name])) ** 2).sum()
            for name, p in model.parameters.items()
        )
        (model.answer_nll(examples()) + mu / 2 * distance).backward()
        for name, parameter in model.parameters.items():
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_without_mu_nothing_is_added_or_held(model, monkeypatch):
    """Today's bytes: the term is not even made."""
    wanted = trained(model)
    monkeypatch.setattr(training, "ProximalTerm", None)
    assert same(trained(model, proximal_mu=0.0), wanted)


def test_the_first_step_of_a_round_is_free_and_later_ones_are_pulled(model):
    """At the source the term's gradient is zero."""
    assert same(trained(model, local_steps=1, proximal_mu=5.0), trained(model, local_steps=1))
    assert not same(trained(model, local_steps=2, proximal_mu=5.0), trained(model, local_steps=2))


def test_drift_shrinks_as_mu_grows(model):
    """And the loss that is told stays that of the text: the first step's is the same."""
    start(model)
    before = adapter(model)
    drifts, first = [], []
    for mu in (0.0, 0.3, 3.0, 30.0):
        start(model)
        result = train_round(
            model,
            examples(),
            settings(local_steps=30, proximal_mu=mu),
            PLACE,
            begin=Beginning(),
            should_stop=lambda: False,
            report=lambda _: None,
        )
        drifts.append(drift(adapter(model), before))
        first.append(result.first_step_nll)
        assert result.train_nll < first[0] + 0.5
    assert len(set(first)) == 1
    assert drifts == sorted(drifts, reverse=True)
    assert drifts[-1] < drifts[0] / 2


def test_training_that_goes_on_is_pulled_to_the_rounds_adapter(model, draw):
    """Not to what the checkpoint holds: the caller's source is taken."""
    start(model)
    near = adapter(model)
    far = draw(model.manifest(), 1.0)
    ends = []
    for source in (near.__getitem__, far):
        start(model)
        train_round(
            model,
            examples(),
            settings(proximal_mu=1e3),
            PLACE,
            begin=Beginning(source=source),
            should_stop=lambda: False,
            report=lambda _: None,
        )
        ends.append(drift(adapter(model), {spec: far(spec) for spec in near}))
    assert ends[1] < ends[0]
