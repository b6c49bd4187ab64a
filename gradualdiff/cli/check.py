"""``gradualdiff check``: a dry run. Model and text of every simulated site, and two timed steps."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.doctor import tell
from gradualdiff.cli.output import JsonOption, print_json, print_table
from gradualdiff.doctor.checks import CheckResult, check_folder
from gradualdiff.units import fixed
from shared.errors import GradualDiffError, StoreUnavailableError

if TYPE_CHECKING:
    from gradualdiff.embedded.display import Display
    from participant.learner.port import Rehearsal
    from participant.learner.torch_learner import TorchLearner
    from shared.config import FederationConfig


def check(
    federation: Annotated[Path, typer.Argument(help="The run's federation.toml.")] = Path(
        "federation.toml"
    ),
    as_json: JsonOption = False,
) -> None:
    """Load model and text at each simulated site, and say how long a round will take.

    Two optimiser steps are trained at each site and forgotten; nothing is written to the store.
    What is wrong is told of all sites; the exit code is that of the first mistake.
    """
    from coordinator.runs.bases import bases_here
    from gradualdiff.cli.progress import make_display
    from gradualdiff.embedded.sites import load_learners
    from shared.config import load_federation
    from shared.log import configure
    from shared.stores.directory import DirectoryStore

    configure(level="warning")
    config = load_federation(federation)
    folder = federation.resolve().parent
    learners = load_learners(config, folder)
    store = folder / config.store.directory
    found = [*check_folder("store", store, make=True)]
    there = DirectoryStore(store) if (store / "runs").is_dir() else None  # which makes nothing
    errors: list[GradualDiffError] = [
        StoreUnavailableError(f"store: {bad.says}") for bad in found if bad.verdict == "FAIL"
    ]
    with (
        bases_here(config, there, folder) as (config, bases),
        make_display(quiet=as_json) as display,
    ):
        if bases is not None:
            for learner in learners.values():
                learner.take_bases(config.run.name, bases)
        rehearsed = _rehearse(config, learners, display, found, errors)
        if not errors:
            _fit_together(config, learners, store, bases, display, found, errors)
    if as_json:
        print_json({"findings": found, "sites": rehearsed})
    else:
        for finding in found:
            tell(finding)
        _show(config, rehearsed)
    if errors:
        raise type(errors[0])("; ".join(dict.fromkeys(map(str, errors))))


def _rehearse(
    config: FederationConfig,
    learners: dict[str, TorchLearner],
    display: Display,
    found: list[CheckResult],
    errors: list[GradualDiffError],
) -> dict[str, Rehearsal]:
    from coordinator.announcing import announcement
    from participant.data import NOTHING_HELD_OUT

    rehearsed: dict[str, Rehearsal] = {}
    for site, learner in sorted(learners.items()):

        def report(step: object, site: str = site) -> None:
            display.report(site, None, step)  # type: ignore[arg-type]

        try:
            rehearsed[site] = learner.rehearse(announcement(config, site), report)
        except GradualDiffError as error:
            errors.append(error)
            found.append(CheckResult(site, "FAIL", str(error)))
            continue
        if rehearsed[site].held_out:
            found.append(CheckResult(site, "OK", "model and text are there; it trains"))
        else:
            found.append(CheckResult(site, "WARN", NOTHING_HELD_OUT))
    return rehearsed


def _fit_together(
    config: FederationConfig,
    learners: dict[str, TorchLearner],
    store: Path,
    bases: Path | None,
    display: Display,
    found: list[CheckResult],
    errors: list[GradualDiffError],
) -> None:
    """As the start of a run asks it, in a store that is thrown away on the same disk."""
    from gradualdiff.embedded.preflight import check_start
    from shared.stores.directory import DirectoryStore

    beside = next(path for path in (store, *store.parents) if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=".gradualdiff-check-", dir=beside) as scratch:
        try:
            place = DirectoryStore(Path(scratch))
            check_start(config, learners, place, display.report, bases=bases)
        except GradualDiffError as error:
            errors.append(error)
            found.append(CheckResult("run", "FAIL", str(error)))


def _show(config: FederationConfig, rehearsed: dict[str, Rehearsal]) -> None:
    columns = ("site", "examples", "held out", "tokens", "steps", "s a step", "min a round", "GB")
    rows = [
        (
            site,
            r.examples,
            r.held_out,
            r.tokens,
            r.steps,
            fixed(r.step_seconds, 2),
            fixed(r.round_seconds / 60, 1),
            fixed(max(r.memory.values(), default=0) / 1e9, 1),
        )
        for site, r in rehearsed.items()
    ]
    if not rows:
        return
    print_table(f"Run {config.run.name}, measured by two steps at each site", columns, rows)
    total = sum(r.round_seconds for r in rehearsed.values())
    typer.echo(
        f"a round takes about {_spoken(total)} here, where sites train in turn; "
        f"{config.run.rounds} rounds {_spoken(total * config.run.rounds)}"
    )


def _spoken(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"
