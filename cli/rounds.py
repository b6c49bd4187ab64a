"""``gradualdiff rounds``: list and show the rounds of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.output import (
    DEFAULT_STORE,
    JsonOption,
    StoreOption,
    console,
    megabytes,
    open_store,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from coordinator.inspection import History

app = typer.Typer(help="Rounds of a run: list, show.", no_args_is_help=True)
RunArgument = Annotated[str, typer.Argument(help="The run's name.")]


@app.command("list")
def list_(
    run: RunArgument, store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False
) -> None:
    """Every round of a run, one line each. Round 0 is the adapter drawn from the seed."""
    from coordinator.inspection import History

    _list(History(open_store(store), run), as_json=as_json)


@app.command()
def show(
    run: RunArgument,
    round_number: Annotated[
        int | None, typer.Argument(metavar="[ROUND]", help="One round (default: all).")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write held-out loss by round to this PNG.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """One round site by site, or all rounds; with --plot the held-out loss as a picture."""
    from coordinator.inspection import History, show_round, summarise_round

    history = History(open_store(store), run)
    if plot is not None:
        from cli.plot import plot_held_out

        plot_held_out(history, plot)
        if not as_json:
            console().print(f"Wrote {plot}")
    if round_number is None:
        _list(history, as_json=as_json)
        return
    summary, rows = summarise_round(history, round_number), show_round(history, round_number)
    if as_json:
        print_json({"round": summary, "sites": rows})
        return
    columns = ("site", "state", "loss before", "first step", "last step", "tokens", "bytes")
    print_table(
        f"Round {round_number} of {run} ({summary.state}), adapter {summary.adapter_sha or '-'}",
        (*columns, "seconds", "norm", "cosine", "weight", "reason"),
        [
            (
                row.site,
                row.state,
                row.held_out_nll,
                row.first_step_nll,
                row.last_step_nll,
                row.tokens,
                None if row.bytes is None else megabytes(row.bytes),
                row.seconds,
                row.norm,
                row.cosine,
                row.weight,
                row.reason,
            )
            for row in rows
        ],
    )


def _list(history: History, *, as_json: bool) -> None:
    from coordinator.inspection import summarise_rounds

    summaries = summarise_rounds(history)
    if as_json:
        print_json(summaries)
        return
    rows = [
        (
            s.round,
            s.state,
            f"{s.counted}/{s.selected}",
            s.held_out_nll,
            s.perplexity,
            s.mean_norm,
            s.tokens,
            megabytes(s.bytes),
            s.seconds,
            (s.adapter_sha or "-")[:12],
        )
        for s in summaries
    ]
    columns = ("round", "state", "counted", "held-out loss", "perplexity", "mean norm")
    print_table(
        f"Rounds of {history.run}", (*columns, "tokens", "uploaded", "seconds", "adapter"), rows
    )
