"""``gradualdiff runs pause|resume|stop|extend|exclude|branch``: an operator's word on a run."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.deeds import NO_REASON, ReasonOption, on_record
from gradualdiff.cli.output import (
    DEFAULT_STORE,
    JsonOption,
    RunArgument,
    StoreOption,
    console,
    print_json,
)
from shared.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from coordinator.audit_log import Deed
    from coordinator.runs.operating import Action
    from shared.protocol.ledger import Ledger

DEEDS: dict[Action, Deed] = {
    "pause": "run.pause",
    "resume": "run.resume",
    "stop": "run.stop",
    "extend": "run.extend",
    "exclude": "run.exclude",
}
WHEN = "A running coordinator sees it within seconds, otherwise the next start does."


def pause(
    run: RunArgument,
    reason: ReasonOption = NO_REASON,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Open no further round, and do not end. The open round may close."""
    from coordinator.runs.operating import open_round

    ledger = _ledger(store, run)
    if not _order(ledger, store, "pause", reason, as_json=as_json):
        return
    number = open_round(ledger)
    _say(
        f"Round {number} continues to its end; no further round begins."
        if number
        else "No further round begins.",
        WHEN,
        f"Resume it with: gradualdiff runs resume {run} --store {store}",
    )


def resume(
    run: RunArgument,
    reason: ReasonOption = NO_REASON,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Undo a pause."""
    if _order(_ledger(store, run), store, "resume", reason, as_json=as_json):
        _say("The next round begins.", WHEN, "A simulation that ended: start it again.")


def stop(
    run: RunArgument,
    reason: ReasonOption,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """End the run at once with the last closed round's adapter. For good."""
    from coordinator.runs.operating import last_closed

    ledger = _ledger(store, run)
    if not _order(ledger, store, "stop", reason, as_json=as_json):
        return
    last = last_closed(ledger)
    if last < 0:
        _say("The run ends without a result: it had not begun.", WHEN)
        return
    _say(
        f"The run ends with the adapter of round {last} (of the next one, if that is closing now).",
        WHEN,
        f"From there: gradualdiff runs branch {run} --at {last} --name NEW --store {store}",
    )


def extend(
    run: RunArgument,
    rounds: Annotated[int, typer.Argument(min=1, max=100_000, help="So many rounds more.")],
    reason: ReasonOption = NO_REASON,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Extend the run beyond the rounds of its settings."""
    from coordinator.round.controls import steer

    ledger = _ledger(store, run)
    if not _order(ledger, store, "extend", reason, rounds=rounds, as_json=as_json):
        return
    total = ledger.config().run.rounds + steer(tuple(ledger.controls())).more_rounds
    _say(
        f"The run now ends after round {total}. Rounds that open from now on take their place on "
        f"the learning rate's schedule by {total}.",
        "A site whose accept.max_rounds is lower does not take part in the rounds beyond it.",
        WHEN,
    )


def exclude(
    run: RunArgument,
    site: Annotated[str, typer.Argument(help="The site to exclude.")],
    reason: ReasonOption,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Wait for this site no longer: not in the open round, and in none after it. For good."""
    from coordinator.runs.operating import open_round

    ledger = _ledger(store, run)
    if not _order(ledger, store, "exclude", reason, site=site, as_json=as_json):
        return
    number = open_round(ledger)
    here = f"Round {number} closes without {site}, and it" if number else site
    _say(
        f"{here} is not asked again; what it gave to earlier rounds stays in them.",
        "A round in which no site is left stays open until the run is stopped.",
        WHEN,
    )


def branch(
    run: RunArgument,
    at: Annotated[int, typer.Option("--at", min=0, help="Begin with this round's adapter.")],
    name: Annotated[str, typer.Option("--name", help="The new run's name.")],
    reason: ReasonOption = NO_REASON,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Prepare a new run that begins with the adapter of one of this run's rounds."""
    import re

    from coordinator.runs.branching import branch_run
    from coordinator.runs.operating import operator_ledger
    from gradualdiff.store import open_store
    from shared.config import NAME_PATTERN

    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(f"--name: expected 1 to 40 of a-z, 0-9 and dashes, got {name!r}")
    objects = open_store(store, writable=True).objects
    child = operator_ledger(objects, name, time.time)
    with on_record(objects, store, "run.branch", f"{run}@{at} {name}", reason):
        origin = branch_run(operator_ledger(objects, run, time.time), at, child)
    if as_json:
        print_json(origin)
        return
    _say(
        f"{name} will begin with the adapter of round {at} of {run}, sha256 {origin.adapter_sha}",
        f"Next: in a copy of {run}'s federation.toml set run.name to {name!r}. Other settings may "
        "change, except for the base model, lora.rank, lora.alpha, lora.scaling and "
        "lora.target_modules.",
        "Then start it: gradualdiff coordinator COPY (or: gradualdiff simulate COPY)",
    )


def _ledger(store: Path, run: str) -> Ledger:
    from coordinator.runs.operating import operator_ledger
    from gradualdiff.store import open_store

    return operator_ledger(open_store(store, writable=True).objects, run, time.time)


def _order(
    ledger: Ledger,
    store: Path,
    action: Action,
    reason: str,
    *,
    rounds: int | None = None,
    site: str | None = None,
    as_json: bool,
) -> bool:
    """Put it on record and say so; whether there is more to say to a person."""
    from coordinator.runs.operating import order

    about = " ".join(str(word) for word in (ledger.run, rounds, site) if word is not None)
    around = partial(on_record, ledger.store, store, DEEDS[action], about, reason)
    record = order(ledger, action, reason, around, rounds=rounds, site=site)
    if as_json:
        print_json(record)
        return False
    if record is None:
        known = {"pause": "paused already", "resume": "not paused"}
        _say(f"run {ledger.run} is {known.get(action, f'without {site} already')}; nothing done")
        return False
    _say(f"{record.key(ledger.run)}: {action} is on record")
    return True


def _say(*lines: str) -> None:
    for line in lines:
        console().print(line, markup=False, soft_wrap=True, highlight=False)
