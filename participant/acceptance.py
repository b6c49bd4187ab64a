"""What a site takes part in: its own word against a run's settings. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from participant.learning import steps_in_round

if TYPE_CHECKING:
    from shared.config import AcceptSection
    from shared.events import RunAnnounced


def objections(run: RunAnnounced, accept: AcceptSection, examples: int | None = None) -> str:
    """Why this site does not take part, by setting; empty when it does.

    ``examples``: the site's training examples once they are known; a run that counts in epochs can
    only then be held against ``max_steps``.
    """
    found = []
    if accept.runs is not None and run.run not in accept.runs:
        found.append(f"accept.runs: expected one of {', '.join(accept.runs)}, got {run.run}")
    if accept.models is not None and run.base.model not in accept.models:
        allowed = ", ".join(accept.models)
        found.append(f"accept.models: expected one of {allowed}, got {run.base.model}")
    limits = [
        ("max_rank", run.lora.rank, accept.max_rank),
        ("max_rounds", run.rounds, accept.max_rounds),
    ]
    if run.training.local_steps is not None or examples is not None:
        limits.append(("max_steps", steps_in_round(examples or 0, run.training), accept.max_steps))
    found += [
        f"accept.{name}: expected at most {limit}, got {value}"
        for name, value, limit in limits
        if limit is not None and value > limit
    ]
    least = accept.min_participants
    if least is not None and run.participants < least:
        found.append(f"accept.min_participants: expected at least {least}, got {run.participants}")
    if run.averaging == "flora" and not accept.flora:
        found.append(
            'accept.flora: expected true for a run with aggregation.averaging = "flora", which '
            "gives each site's own factors to all others, got false"
        )
    if not found:
        return ""
    return (
        f"this site does not take part: {'; '.join(found)}. Change the run's settings (under "
        "another run.name), or ask the site to change [accept] in its site.toml"
    )


def objection_to_round(number: int, accept: AcceptSection) -> str:
    """Why this site trains no more in a run that it joined; empty when it does.

    A run may be extended after it was announced; what the site accepts holds all the same.
    """
    if accept.max_rounds is None or number <= accept.max_rounds:
        return ""
    return (
        f"this site takes no part in round {number}: accept.max_rounds: expected at most "
        f"{accept.max_rounds}, got {number}; the run was extended. Exclude the site, or ask it to "
        "change [accept] in its site.toml"
    )
