"""What a site takes part in: each limit by itself, and what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from participant.acceptance import objection_to_delta, objection_to_round, objections
from participant.guard import Guard
from participant.learner.port import Learned, Readiness
from participant.privacy import Spend, mechanism
from participant.workspace import Workspace
from shared.config import AcceptSection, PrivacySection, parse
from shared.errors import ConfigError, NotAcceptedError
from shared.protocol.events import (
    RoundStarted,
    RunAnnounced,
    WireBase,
    WireLora,
    WirePrivacy,
    WireTraining,
)
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


# Differential privacy ------------------------------------------------------------------------


def private_run(name="r1", **privacy) -> RunAnnounced:
    section = WirePrivacy(**{"clip": 1.0, "noise_multiplier": 1.0, **privacy})
    return run().model_copy(update={"run": name, "privacy": section})


def private_ready(announced, examples=5_000, batch=64) -> Readiness:
    """At a site of so many examples, over the run's rounds of ten steps."""
    section = PrivacySection(**announced.privacy.model_dump())
    steps = mechanism(section, batch, examples, 10, announced.rounds)
    return replace(ready(examples), privacy=steps, records=frozenset({"a" * 64}))


REQUIRED = AcceptSection(models=("owner/m",), privacy="required")


def test_a_site_that_asks_for_privacy_declines_a_run_without():
    """At the announcement, before anything is loaded."""
    assert objections(private_run(), REQUIRED) == ""
    assert "accept.privacy: expected a run with [privacy], got one without" in objections(
        run(), REQUIRED
    )


def test_gradients_without_noise_are_declined_whatever_the_run_says_of_privacy():
    """Also where the site gives gradients to runs that promise nothing."""
    accept = REQUIRED.model_copy(update={"gradients": True})
    said = objections(private_run().model_copy(update={"averaging": "range-finder"}), accept)
    assert "privacy: expected a run that trains" in said


def test_a_ceiling_without_the_demand_is_a_mistake():
    """A run without noise would go past it unseen."""
    with pytest.raises(ConfigError, match='max_epsilon needs privacy = "required"'):
        parse(AcceptSection, {"max_epsilon": 8.0}, "site.toml")


def test_a_delta_above_one_over_n_is_declined():
    """With it, giving a whole record away would be within the promise."""
    fits = private_run(delta=1 / 5_000)
    assert objections(fits, REQUIRED, private_ready(fits)) == ""
    loose = private_run(delta=1 / 4_999)
    said = objections(loose, REQUIRED, private_ready(loose))
    assert "privacy.delta: expected at most 1 / 5000" in said


def test_much_noise_on_few_records_is_declined_with_the_numbers():
    """Below 1,000 records a strong epsilon over more than 200 steps leaves nothing to learn."""
    few = private_run(target_epsilon=8.0, noise_multiplier=None).model_copy(update={"rounds": 21})
    said = objections(few, REQUIRED, private_ready(few, 999))
    assert "expected at least 1000 different examples here, or at most 200 steps" in said
    assert "got 999 and 210 steps with epsilon" in said
    assert objections(few, REQUIRED, private_ready(few, 1_000)) == ""
    short = few.model_copy(update={"rounds": 20})
    assert objections(short, REQUIRED, private_ready(short, 999)) == ""
    weak = private_run(noise_multiplier=0.3).model_copy(update={"rounds": 21})
    assert objections(weak, REQUIRED, private_ready(weak, 999)) == ""


def test_a_run_that_would_cost_more_than_the_ceiling_is_declined_with_the_number(tmp_path):
    """By what it plans and what other runs spent; its own rounds count once."""
    workspace = Workspace(tmp_path)
    announced = private_run()
    prepared = private_ready(announced)
    planned = prepared.privacy.epsilon

    def check(most, name="r1"):
        accept = REQUIRED.model_copy(update={"max_epsilon": most})
        told = announced.model_copy(update={"run": name})
        Guard(accept, workspace).check_run(told, prepared)

    check(planned)
    with pytest.raises(NotAcceptedError, match=r"accept.max_epsilon: expected at most .*50 steps"):
        check(planned - 1e-6)
    steps = prepared.privacy
    spend = Spend(
        run="r1",
        round=1,
        training="b" * 64,
        text="c" * 64,
        rate=steps.noise.rate,
        multiplier=steps.noise.multiplier,
        steps=50,
    )
    workspace.budget(None).charge(spend, prepared.records, steps.delta)
    check(planned)
    with pytest.raises(NotAcceptedError, match=r"accept.max_epsilon: expected at most"):
        check(planned, "r2")
    check(2 * planned, "r2")


def test_a_round_with_other_noise_than_announced_is_declined():
    """None at all, for one."""
    announced = private_run()
    for other in (None, WirePrivacy(clip=1.0, noise_multiplier=0.5)):
        asked = started(privacy=other)
        said = objection_to_round(asked, announced, AcceptSection())
        assert "privacy: expected the settings that were announced, got others" in said


def test_a_secure_run_can_be_demanded_and_stays_one():
    """Neither a run without masks is joined then, nor a round that asks for none trained."""
    masked = run().model_copy(update={"secure": True})
    assert objections(masked, AcceptSection(secure=True)) == ""
    said = objections(run(), AcceptSection(secure=True))
    assert "accept.secure: expected a run with aggregation.secure = true" in said
    assert objection_to_round(started(5), run(), AcceptSection()) == ""
    said = objection_to_round(started(5), masked, AcceptSection())
    assert "aggregation.secure: expected true as announced" in said
