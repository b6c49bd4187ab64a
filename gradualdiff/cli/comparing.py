"""``gradualdiff runs compare``: several runs side by side, as tables, JSON and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.output import (
    DEFAULT_STORE,
    JsonOption,
    StoreOption,
    console,
    print_json,
    print_table,
)
from gradualdiff.units import fixed
from shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coordinator.runs.comparison import ComparedRound, ComparedRun
    from gradualdiff.comparison import Comparison

MEGA = 1e6


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Runs' names; STORE:RUN for one in another store (directory or federation.toml).",
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Write the comparison as a picture: a .png, .pdf or .svg file."),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Runs side by side: held-out loss, bytes, drift and seconds by round."""
    found = gather_all(runs, store)
    if to is not None:
        from gradualdiff.figures.comparison import write_comparison

        write_comparison(found.runs, to)
    if as_json:
        print_json(found)
        return
    _print(found.runs)
    for doubt in found.warnings:
        console().print(f"warning: {doubt}", markup=False, soft_wrap=True)
    if to is not None:
        console().print(f"Wrote {to}", markup=False, soft_wrap=True)


def gather_all(names: Sequence[str], default: Path) -> Comparison:
    """The comparison of these runs, in the order given.

    Raises ConfigError for a run named twice or a name without a store or run around its colon,
    StoreError and RunNotFoundError as for one run.
    """
    from gradualdiff.store import open_store

    places = [_place(name, default) for name in names]
    stores = {path: open_store(path) for path in dict.fromkeys(path for path, _ in places)}
    first, *others = (stores[path].run(run) for path, run in places)
    return first.compare(*others)


def _place(name: str, default: Path) -> tuple[Path, str]:
    """Store and run; no run's name holds a colon, so the last one parts them."""
    folder, colon, run = name.rpartition(":")
    if not run or (colon and not folder):
        raise ConfigError(f"runs compare: expected RUN or STORE:RUN, got {name!r}; name both parts")
    return (Path(folder) if folder else default), run


def _print(runs: Sequence[ComparedRun]) -> None:
    labels = [run.label for run in runs]
    print_table(
        "Runs",
        ("run", "base model", "members", "rounds", "loss before", "after", "perplexity"),
        [_summary(run) for run in runs],
    )
    from coordinator.runs.differing import differing_settings

    differing = differing_settings([run.settings for run in runs])
    if differing:
        print_table("Settings that differ", ("setting", *labels), differing)
    quantities: list[tuple[str, Callable[[ComparedRound], str | None]]] = [
        (
            "Held-out loss (nats per answer token); round 0: the base",
            lambda r: fixed(r.held_out_nll, 4),
        ),
        ("Perplexity", lambda r: fixed(r.perplexity, 3)),
        ("MB uploaded so far by each member", lambda r: fixed(r.uploaded / MEGA, 3)),
        ("MB down so far by each member, messages included", lambda r: _mega(r.down)),
        ("MB up so far by each member, messages included", lambda r: _mega(r.up)),
        ("Cosine of the deltas to their mean: mean (lowest)", _drift),
    ]
    for title, show in quantities:
        print_table(title, ("round", *labels), _by_round(runs, show))
    sites = sorted({site for run in runs if run.last for site in run.last.by_site})
    if sites:
        rows = [(site, *(_of_site(run, site) for run in runs)) for site in sites]
        print_table("Held-out loss by site after the last round", ("site", *labels), rows)
    seconds = [run.seconds() for run in runs]
    from coordinator.runs.comparison import phases

    print_table(
        "Seconds by phase, all rounds: the slowest site of each, then what the round took beside",
        ("phase", *labels),
        [
            *((phase, *(fixed(s.get(phase), 1) for s in seconds)) for phase in phases(seconds)),
            ("total", *(fixed(sum(s.values()), 1) for s in seconds)),
        ],
    )


def _summary(run: ComparedRun) -> tuple[object, ...]:
    first, last = (run.rounds[0], run.rounds[-1]) if run.rounds else (None, None)
    return (
        run.label,
        run.model,
        len(run.members),
        last.round if last else 0,
        first.held_out_nll if first else None,
        last.held_out_nll if last else None,
        fixed(last.perplexity, 3) if last else None,
    )


def _by_round(
    runs: Sequence[ComparedRun], show: Callable[[ComparedRound], str | None]
) -> list[tuple[object, ...]]:
    cells = [{facts.round: show(facts) for facts in run.rounds} for run in runs]
    rounds = sorted({number for of_run in cells for number in of_run})
    return [(number, *(of_run.get(number) for of_run in cells)) for number in rounds]


def _mega(count: float | None) -> str | None:
    return None if count is None else fixed(count / MEGA, 3)


def _drift(facts: ComparedRound) -> str | None:
    if facts.cosine is None:
        return None
    return f"{facts.cosine:.3f} ({facts.lowest_cosine:.3f})"


def _of_site(run: ComparedRun, site: str) -> float | None:
    return run.last.by_site.get(site) if run.last else None
