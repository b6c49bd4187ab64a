"""What a site takes part in: each limit by itself, and what it says."""

from __future__ import annotations

import pytest

from participant.acceptance import objection_to_delta, objection_to_round, objections
from participant.learner.port import Learned, Readiness
from shared.config import AcceptSection
from shared.protocol.events import RoundStarted, RunAnnounced, WireBase, WireLora, WireTraining
from shared.protocol.manifest import LocalMetrics
from shared.tensors.tensor_file import FileDigest
from tests.numpy_learner import MANIFEST, NUMERICS


def run(**training) -> RunAnnounced:
    return RunAnnounced(
        run="r1",
        config_digest="a" * 64,
        base=WireBase(model="owner/m"),
        lora=WireLora(rank=8),
        training=WireTraining(**(training or {"local_steps": 10})),
        rounds=5,
        participants=3,
    )


@pytest.mark.parametrize(
    ("fits", "not_so"),
    [
        ({"models": ("owner/m", "n")}, {"models": ("n",)}),
        ({"runs": ("r1",)}, {"runs": ("r2",)}),
        ({"max_rank": 8}, {"max_rank": 7}),
        ({"max_steps": 10}, {"max_steps": 9}),
        ({"max_rounds": 5}, {"max_rounds": 4}),
        ({"min_participants": 3}, {"min_participants": 4}),
        ({"min_steps": 10}, {"min_steps": 11}),
        ({"min_batch": 4}, {"min_batch": 5}),
        ({"min_answer_tokens": 512}, {"min_answer_tokens": 513}),
    ],
)
def test_a_limit_is_met_or_named(fits, not_so):
    """At the limit it takes part; beyond it the setting, the limit and the value are said."""
    assert objections(run(), AcceptSection(**fits)) == ""
    said = objections(run(), AcceptSection(**not_so))
    assert f"accept.{next(iter(not_so))}: expected" in said
    assert "got" in said


def ready(examples=21, distinct=None, exposed=()) -> Readiness:
    return Readiness(MANIFEST, "f" * 64, NUMERICS, examples, distinct, exposed)


@pytest.mark.parametrize(
    ("training", "limit"),
    [
        ({"local_steps": 3}, "min_steps"),
        ({"local_steps": 4, "batch_size": 3, "gradient_accumulation": 1}, "min_batch"),
        ({"local_steps": 4, "max_answer_tokens": 7}, "min_answer_tokens"),
    ],
)
def test_a_run_of_telling_deltas_is_declined_without_a_word_in_the_file(training, limit):
    """The defaults; what one of them is not about is as the demo has it."""
    assert objections(run(local_steps=4, batch_size=4), AcceptSection()) == ""
    assert (
        objections(run(local_steps=4, batch_size=2, gradient_accumulation=2), AcceptSection()) == ""
    )
    assert f"accept.{limit}: expected at least" in objections(run(**training), AcceptSection())


def test_copies_of_one_example_are_one_example():
    """15 different rows among 21 are too few for a delta, and one row many times is no batch."""
    accept, epoch = AcceptSection(), run(local_epochs=1, batch_size=4)
    assert objections(epoch, accept, ready(21, 16)) == ""
    assert "min_examples: expected at least 16, got 15" in objections(epoch, accept, ready(21, 15))
    said = objections(epoch, accept, ready(21, 1))
    assert "min_batch: expected at least 4, got 1" in said
    learned = Learned(FileDigest("a" * 64, 1), 21, 99, LocalMetrics(steps=4), "fresh", distinct=15)
    assert "expected at least 16 different examples, got 15" in objection_to_delta(learned, accept)


def test_an_epoch_of_few_steps_is_declined_once_the_examples_are_known():
    """Three steps, however large."""
    epoch = run(local_epochs=1, batch_size=8)
    assert objections(epoch, AcceptSection()) == ""
    assert "min_steps: expected at least 4, got 3" in objections(epoch, AcceptSection(), ready())


def test_a_decay_that_leaves_the_last_step_alone_is_declined():
    """A rate of 1 with a decay of 1 makes every step forget the ones before."""
    said = objections(run(local_steps=4, learning_rate=1.0, weight_decay=1.0), AcceptSection())
    assert "training.learning_rate x training.weight_decay" in said


def test_layers_are_judged_by_what_they_are_and_by_what_the_site_names():
    """What the model says of its layers; and a site's own shorter list."""
    said = objections(run(), AcceptSection(modules=("layer",)), ready(exposed=("lm_head",)))
    assert "accept.modules: expected adapters on attention and MLP layers only" in said
    assert "lm_head" in said
    assert objections(run(), AcceptSection(modules=("layer",)), ready()) == ""
    said = objections(run(), AcceptSection(modules=("q_proj",)), ready())
    assert "accept.modules: expected only q_proj, got layer" in said


def test_a_folder_is_used_only_where_the_site_names_it():
    """Which folders are here, nobody learns by asking."""
    folder = run().model_copy(update={"base": WireBase(model="/srv/models/m")})
    assert "accept.models: expected base.model to be a hub id" in objections(
        folder, AcceptSection()
    )
    assert objections(folder, AcceptSection(models=("/srv/models/m",))) == ""


def test_own_factors_go_to_other_sites_only_where_the_site_says_so():
    """Stacking shows them; every other averaging gives out a mean."""
    stacked = run().model_copy(update={"averaging": "flora"})
    assert 'accept.flora: expected true for a run with aggregation.averaging = "flora"' in (
        objections(stacked, AcceptSection())
    )
    assert objections(stacked, AcceptSection(flora=True)) == ""


def test_gradients_leave_only_where_the_site_says_so():
    """One tells more of a text than a training does; few examples are declined all the same."""
    bases = run().model_copy(update={"averaging": "range-finder"})
    assert (
        'accept.gradients: expected true for a run with aggregation.averaging = "range-finder"'
        in (objections(bases, AcceptSection()))
    )
    assert objections(bases, AcceptSection(gradients=True)) == ""
    few = AcceptSection(gradients=True, min_examples=22)
    assert "accept.min_examples: expected at least 22, got 21" in objections(bases, few, ready())


def test_epochs_are_counted_once_the_examples_are_known():
    """21 examples in batches of 4, twice: 12 steps."""
    epochs = run(local_epochs=2, batch_size=4)
    accept = AcceptSection(max_steps=11)
    assert objections(epochs, accept) == ""
    assert "accept.max_steps: expected at most 11, got 12" in objections(epochs, accept, ready())


def test_all_objections_are_said_at_once():
    """One round trip for the two engineers."""
    said = objections(run(), AcceptSection(max_rank=1, max_rounds=1))
    assert "max_rank" in said
    assert "max_rounds" in said


def test_a_run_that_is_extended_beyond_the_limit_is_left():
    """The limit holds for what is asked, not only for what was announced."""
    assert objection_to_round(started(5), run(), AcceptSection(max_rounds=5)) == ""
    assert objection_to_round(started(6), run(), AcceptSection()) == ""
    said = objection_to_round(started(6), run(), AcceptSection(max_rounds=5))
    assert "accept.max_rounds: expected at most 5, got 6" in said


def started(number=1, **fields) -> RoundStarted:
    values = {
        "run": "r1",
        "round": number,
        "source_sha": "a" * 64,
        "get_url": "https://store/k",
        "expires_at": 1.0,
        "training": WireTraining(local_steps=10),
        "progress_from": 0.0,
        "progress_to": 0.2,
        "seed": 1,
        "codec": "fp32",
    }
    return RoundStarted(**{**values, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"training": WireTraining(local_steps=200)}, "training.local_steps: expected 10 as"),
        ({"training": WireTraining(local_steps=10, batch_size=1)}, "training.batch_size"),
        ({"averaging": "flora"}, "aggregation.averaging: expected fedavg as announced, got flora"),
        ({"progress_to": 2.0}, "progress: expected a stretch within 0 and 1, got 0.0 to 2.0"),
        ({"progress_to": 0.0}, "progress"),
    ],
)
def test_a_round_asks_for_what_was_announced(fields, said):
    """Nothing else is trained under the run's name."""
    assert objection_to_round(started(), run(), AcceptSection()) == ""
    assert said in objection_to_round(started(**fields), run(), AcceptSection())
