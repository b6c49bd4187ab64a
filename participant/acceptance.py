"""What a site takes part in: its own word against a run's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from participant.learner.port import steps_in_round
from shared import modes
from shared.adapters import kind_of
from shared.base_model import HUB_ID
from shared.methods.averaging import get_averaging

if TYPE_CHECKING:
    from collections.abc import Iterator

    from participant.learner.port import Learned, Readiness
    from participant.privacy import Mechanism
    from shared.config import AcceptSection, TrainingSection
    from shared.protocol.events import RoundStarted, RunAnnounced

# One site's trainings under one round number. More than one is honest where a run was begun anew
# under its name; each tells a little more about the text.
TRAININGS_PER_ROUND = 3
# And how often one that failed is tried again.
FAILURES_PER_ROUND = 10
# A step of AdamW multiplies what was trained before by 1 minus this: near 1 only the last step of
# a round would be left in its delta.
MOST_DECAY = 0.1
# So much noise over so few records hides what they have in common too.
LEAST_RECORDS, MOST_STEPS_OF_FEW, STRONG_EPSILON = 1_000, 200, 8.0
_UNANNOUNCED = "expected a built-in mode, or one that the run was announced with"
_REMEDY = (
    "Change the run's settings (under another run.name), or ask the site to change [accept] in "
    "its site.toml"
)


def objections(run: RunAnnounced, accept: AcceptSection, ready: Readiness | None = None) -> str:
    """Why this site does not take part, by setting; empty when it does.

    ``ready``: what the loaded model and text turned out to be, once they are. Which layers hold an
    adapter, how many different examples there are and how many steps an epoch takes is known then.
    """
    found = [*_unwanted(run, accept), *(_foreign(run, accept) or _consent(run, accept))]
    found += _too_large(run, accept, ready)
    found += _too_telling(run.training, accept, ready)
    found += _without_privacy(run, accept, ready)
    if ready is not None:
        found += _layers(accept, ready)
    return f"this site does not take part: {'; '.join(found)}. {_REMEDY}" if found else ""


def _unwanted(run: RunAnnounced, accept: AcceptSection) -> Iterator[str]:
    if accept.runs is not None and run.run not in accept.runs:
        yield f"accept.runs: expected one of {', '.join(accept.runs)}, got {run.run}"
    if accept.secure and not run.secure:
        yield "accept.secure: expected a run with aggregation.secure = true, got one without"
    if accept.models is not None and run.base.model not in accept.models:
        yield f"accept.models: expected one of {', '.join(accept.models)}, got {run.base.model}"
    if accept.models is None and not HUB_ID.fullmatch(run.base.model):
        # Before anything is looked for: which folders are here is nobody else's business.
        yield (
            f"accept.models: expected base.model to be a hub id, got {run.base.model}; a folder is "
            "used only where accept.models names it"
        )


def _foreign(run: RunAnnounced, accept: AcceptSection) -> list[str]:
    """Modes of other packages that this site does not run, or not in this version."""
    found = []
    for mode in run.modes:
        name = f"{mode.kind}.{mode.name}"
        if name not in accept.modes:
            allowed = ", ".join(accept.modes) or "no mode of another package"
            found.append(f"accept.modes: expected {allowed}, got {mode}")
        else:
            found += filter(None, [modes.lack(mode)])
    if _is_unannounced("averaging", run.averaging, run):
        found.append(f"aggregation.averaging: {_UNANNOUNCED}, got {run.averaging}")
    return found


def _is_unannounced(kind: str, name: str, run: RunAnnounced) -> bool:
    announced = {(mode.kind, mode.name) for mode in run.modes}
    return not modes.is_built_in(kind, name) and (kind, name) not in announced


def _consent(run: RunAnnounced, accept: AcceptSection) -> Iterator[str]:
    mode = get_averaging(run.averaging)
    if mode.consent and not getattr(accept, mode.consent, False):
        yield (
            f"accept.{mode.consent}: expected true for a run with aggregation.averaging = "
            f'"{run.averaging}", which {mode.shows}, got false'
        )


def _too_large(run: RunAnnounced, accept: AcceptSection, ready: Readiness | None) -> Iterator[str]:
    limits = [
        ("max_rank", kind_of(run.lora).rank(run.lora), accept.max_rank),
        ("max_rounds", run.rounds, accept.max_rounds),
    ]
    if run.training.local_steps is not None or ready is not None:
        steps = steps_in_round(ready.examples if ready else 0, run.training)
        limits.append(("max_steps", steps, accept.max_steps))
    for name, value, limit in limits:
        if limit is not None and value > limit:
            yield f"accept.{name}: expected at most {limit}, got {value}"
    least = accept.min_participants
    if least is not None and run.participants < least:
        yield f"accept.min_participants: expected at least {least}, got {run.participants}"


def _too_telling(
    training: TrainingSection, accept: AcceptSection, ready: Readiness | None
) -> Iterator[str]:
    """A delta of few steps or few examples gives its text away."""
    batch = training.batch_size * training.gradient_accumulation
    limits = [("min_answer_tokens", training.max_answer_tokens, accept.min_answer_tokens)]
    steps = training.local_steps
    if ready is not None:
        steps = steps_in_round(ready.examples, training)
        different = ready.examples if ready.distinct is None else ready.distinct
        batch = min(batch, different)
        limits.append(("min_examples", min(different, steps * batch), accept.min_examples))
    if steps is not None:
        limits.append(("min_steps", steps, accept.min_steps))
    limits.append(("min_batch", batch, accept.min_batch))
    for name, value, least in limits:
        if value < least:
            yield f"accept.{name}: expected at least {least}, got {value}"
    decay = training.learning_rate * training.weight_decay
    if decay > MOST_DECAY:
        yield (
            "training.learning_rate x training.weight_decay: expected at most "
            f"{MOST_DECAY}, got {decay:g}"
        )


def _without_privacy(
    run: RunAnnounced, accept: AcceptSection, ready: Readiness | None
) -> Iterator[str]:
    """What is no protection, or one that leaves nothing to be learnt."""
    if run.privacy is None:
        if accept.privacy != "any":
            yield "accept.privacy: expected a run with [privacy], got one without"
        return
    if accept.privacy == "site" and not run.privacy.of_sites:
        yield 'accept.privacy: expected a run with privacy.unit = "site", got "record"'
    if accept.privacy == "required" and run.privacy.of_sites and not run.secure:
        yield (
            "accept.privacy: expected noise enough on what leaves this site, got privacy.unit = "
            '"site" without aggregation.secure: each delta by itself has a small part of it; '
            '"site" accepts that'
        )
    if get_averaging(run.averaging).makes_bases:
        yield (
            f'privacy: expected a run that trains, got aggregation.averaging = "{run.averaging}", '
            "which takes gradients without noise"
        )
    steps = ready.privacy if ready is not None else None
    if steps is None:
        return
    if steps.delta * steps.examples > 1:
        one = "site" if steps.of_site else "record"
        yield (
            f"privacy.delta: expected at most 1 / {steps.examples} (one {one} of all), got "
            f"{steps.delta:g}"
        )
    if steps.of_site:
        return
    few = steps.examples < LEAST_RECORDS and steps.steps > MOST_STEPS_OF_FEW
    if few and steps.epsilon <= STRONG_EPSILON:
        yield (
            f"privacy: expected at least {LEAST_RECORDS} different examples here, or at most "
            f"{MOST_STEPS_OF_FEW} steps in all, for an epsilon of {STRONG_EPSILON:g} or less; got "
            f"{steps.examples} and {steps.steps} steps with epsilon {steps.epsilon:.3g}, whose "
            f"noise ({steps.noise.multiplier:.3g} x clip) leaves nothing to be learnt"
        )


def objection_to_epsilon(total: float, planned: Mechanism, most: float) -> str:
    """Why a run would cost too much of a text's privacy; empty where it does not.

    ``total``: epsilon of all other runs on this text and of this one as ``planned``.
    """
    if total <= most:
        return ""
    counted = "that protect the site" if planned.of_site else "on this text"
    return (
        f"this site does not take part: accept.max_epsilon: expected at most {most:g} for all runs "
        f"{counted}, got {total:.4g} at delta {planned.delta:.3g}, of which this run's "
        f"{planned.steps} steps are {planned.epsilon:.4g}. {_REMEDY}"
    )


def _layers(accept: AcceptSection, ready: Readiness) -> Iterator[str]:
    if ready.exposed:
        yield (
            "accept.modules: expected adapters on attention and MLP layers only, got one on "
            f"{', '.join(ready.exposed)}: embeddings and head give away which tokens the text has"
        )
    if accept.modules is not None:
        others = sorted(set(ready.manifest.target_modules) - set(accept.modules))
        if others:
            allowed = ", ".join(accept.modules)
            yield f"accept.modules: expected only {allowed}, got {', '.join(others)}"


def objection_to_round(task: RoundStarted, announced: RunAnnounced, accept: AcceptSection) -> str:
    """Why this site does not train this round of a run that it joined; empty when it does.

    A round asks for what was announced and accepted. A run may be extended after that; what the
    site accepts holds all the same.
    """
    found = []
    if accept.max_rounds is not None and task.round > accept.max_rounds:
        found.append(
            f"accept.max_rounds: expected at most {accept.max_rounds}, got {task.round}; the run "
            "was extended"
        )
    asked, agreed = task.training.model_dump(), announced.training.model_dump()
    found += [
        f"training.{name}: expected {agreed[name]} as announced, got {asked[name]}"
        for name in asked
        if asked[name] != agreed[name]
    ]
    if task.privacy != announced.privacy:
        found.append("privacy: expected the settings that were announced, got others")
    if task.averaging != announced.averaging:
        found.append(
            f"aggregation.averaging: expected {announced.averaging} as announced, "
            f"got {task.averaging}"
        )
    if announced.secure and task.secure is None:
        found.append("aggregation.secure: expected true as announced, got a round that is not")
    if codec := objection_to_codec(task.codec, announced):
        found.append(codec)
    # Beyond the end of a schedule the rate is 0: a round across it would be one of few steps.
    if not 0.0 <= task.progress_from < task.progress_to <= 1.0:
        found.append(
            "progress: expected a stretch within 0 and 1, got "
            f"{task.progress_from} to {task.progress_to}"
        )
    if not found:
        return ""
    return (
        f"this site does not take part in round {task.round}: {'; '.join(found)}. Exclude the "
        "site, or ask it to change [accept] in its site.toml"
    )


def objection_to_codec(name: str, announced: RunAnnounced) -> str:
    """Why this site does not run a codec; empty when it does."""
    unannounced = _is_unannounced("codecs", name, announced)
    if not unannounced:
        return ""
    return f"codec.name: {_UNANNOUNCED}, got {name}; install the coordinator's release at this site"


def objection_to_delta(learned: Learned, accept: AcceptSection) -> str:
    """Why a delta does not leave: it is made of too few different examples. Empty when it may."""
    if learned.distinct is None or learned.distinct >= accept.min_examples:
        return ""
    return (
        f"this site gives out no delta of this round: accept.min_examples: expected at least "
        f"{accept.min_examples} different examples, got {learned.distinct}. {_REMEDY}"
    )
