"""``gradualdiff rounds``: list and show the rounds of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.bases import print_captured
from gradualdiff.cli.output import (
    DEFAULT_STORE,
    JsonOption,
    RunArgument,
    StoreOption,
    console,
    print_json,
    print_table,
)
from gradualdiff.units import fixed, megabytes, octets
from shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradualdiff.run import Round, Run

app = typer.Typer(help="Rounds of a run: list, show.", no_args_is_help=True)


@app.command("list")
def list_(
    run: RunArgument, store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False
) -> None:
    """Every round of a run, one line each. Round 0 is the adapter drawn from the seed."""
    from gradualdiff.store import open_store

    _list(open_store(store).run(run), as_json=as_json)


@app.command()
def show(
    run: RunArgument,
    round_number: Annotated[
        int | None, typer.Argument(metavar="ROUND", help="One round (default: all).")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Write held-out loss by round: a .png, .pdf or .svg."),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", help="Watch the newest round (or ROUND) until the run is finished."
        ),
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """One round site by site, or all rounds; with --plot the held-out loss as a picture.

    With --follow each participant's state, again every second: a table on a terminal, lines
    elsewhere, with --json one object a line. Ctrl-C ends it.
    """
    from coordinator.runs.captured import captured
    from gradualdiff.store import open_store

    if follow:
        from gradualdiff.cli.follow import follow as watch_on

        if plot is not None:
            raise ConfigError("--follow: expected no --plot beside it, got both; give one of them")
        watch_on(store, run, round_number, as_json=as_json)
        return
    opened = open_store(store).run(run)
    if plot is not None:
        from gradualdiff.figures.held_out import write_held_out

        write_held_out(opened.history, plot)
        if not as_json:
            console().print(f"Wrote {plot}")
    if round_number is None:
        _list(opened, as_json=as_json)
        return
    shown, held = opened.round(round_number), captured(opened.history, round_number)
    if as_json:
        print_json({"round": shown.summary, "sites": shown.sites, "captured": held})
        return
    _print(run, shown)
    if held is not None:
        print_captured(held)


def _print(run: str, shown: Round) -> None:
    """Site by site, and what is to be remarked."""
    summary = shown.summary
    console().print(f"adapter {summary.adapter_sha or '-'}", soft_wrap=True)
    if summary.update_bytes is not None:
        whole = f"instead of {octets(summary.adapter_bytes or 0)} whole"
        console().print(f"its update {octets(summary.update_bytes)}, {whole}", soft_wrap=True)
    if summary.server_sha is not None:
        norms = f"mean delta {fixed(summary.mean_norm, 4)}, step {fixed(summary.step_norm, 4)}"
        console().print(f"server state {summary.server_sha}; norms: {norms}", soft_wrap=True)
    columns = ("site", "state", "held-out", "first", "last", "tokens", "MB", "s")
    print_table(
        f"Round {summary.round} of {run} ({summary.state}); losses before it, first and last step",
        (*columns, "norm", "cosine", "weight"),
        [
            (
                row.site,
                row.state,
                fixed(row.held_out_nll, 3),
                fixed(row.first_step_nll, 3),
                fixed(row.last_step_nll, 3),
                row.tokens,
                megabytes(row.bytes),
                fixed(row.seconds, 1),
                fixed(row.norm, 2),
                fixed(row.cosine, 2),
                fixed(row.weight, 3),
            )
            for row in shown.sites
        ],
    )
    for remark in _remarks(shown):
        console().print(remark, markup=False, soft_wrap=True)


def _remarks(shown: Round) -> Iterator[str]:
    from coordinator.runs.audits import in_words

    summary = shown.summary
    for row in shown.sites:
        if row.traffic is not None:
            moved = row.traffic
            yield (
                f"{row.site}: {octets(moved.down)} down, {octets(moved.up)} up; messages "
                f"{octets(moved.messages_down)} down, {octets(moved.messages_up)} up"
                + (f"; {octets(moved.setup)} once, to get ready" if moved.setup else "")
            )
            if moved.refused:
                yield f"{row.site}: updates that led to no announced adapter: {moved.refused}"
        if row.audit is not None:
            yield f"{row.site}: {in_words(row.audit)}"
    yield from (f"{row.site}: {row.privacy.words()}" for row in shown.sites if row.privacy)
    yield from (f"{row.site}: {row.reason}" for row in shown.sites if row.reason)
    for label, scale in summary.clipped.items():
        yield f"{label}: clipped, its delta was multiplied by {scale:.3g}"
    if summary.waits_for:
        yield f"the round does not close yet: {summary.waits_for}"
    if shown.problem:
        yield shown.problem


def _list(run: Run, *, as_json: bool) -> None:
    summaries = run.rounds
    if as_json:
        print_json(summaries)
        return
    rows = [
        (
            s.round,
            s.state,
            f"{s.counted}/{s.selected}",
            s.held_out_nll,
            fixed(s.perplexity, 2),
            fixed(s.mean_norm, 2),
            s.tokens,
            megabytes(s.bytes),
            fixed(s.seconds, 1),
            (s.adapter_sha or "-")[:12],
        )
        for s in summaries
    ]
    columns = ("round", "state", "counted", "loss", "ppl", "norm", "tokens", "MB", "s")
    print_table(f"Rounds of {run.name}: held-out loss", (*columns, "adapter"), rows)
