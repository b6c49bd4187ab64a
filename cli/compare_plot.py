"""Runs compared as a PNG: loss by round, loss against bytes, drift, seconds by phase."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from cli.comparison import phases
from cli.plot import new_figure, save_figure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from cli.comparison import RoundFacts, RunFacts

# Where exp(loss) still says something on an axis.
_READABLE_NATS = 20.0


def plot_comparison(runs: Sequence[RunFacts], path: Path) -> None:
    """Write the picture. Raises MissingPackageError without matplotlib, ConfigError on the path."""
    figure = new_figure((12, 8.4))
    (loss, cost), (drift, time) = figure.subplots(2, 2)
    colours = [f"C{index % 10}" for index in range(len(runs))]
    for run, colour in zip(runs, colours, strict=True):
        _curve(loss, run, lambda r: r.round, lambda r: r.held_out_nll, color=colour)
        for site in sorted({site for facts in run.rounds for site in facts.by_site}):
            points = [(r.round, r.by_site[site]) for r in run.rounds if site in r.by_site]
            loss.plot(*zip(*points, strict=True), linewidth=0.7, alpha=0.35, color=colour)
        _curve(cost, run, lambda r: r.uploaded / 1e6, lambda r: r.held_out_nll, color=colour)
        _curve(drift, run, lambda r: r.round, lambda r: r.cosine, color=colour)
        _curve(drift, run, lambda r: r.round, lambda r: r.lowest_cosine, color=colour, faint=True)
    loss.set(title="held-out loss (thin: each site)", xlabel="round (0: the base)")
    cost.set(title="loss against bytes", xlabel="MB uploaded so far by each member")
    for axes in (loss, cost):
        axes.set_ylabel("nats per answer token")
        _with_perplexity(axes, runs)
    drift.set(
        title="drift: cosine of the deltas to their mean (thin: the lowest)",
        xlabel="round",
        ylabel="cosine",
    )
    _bars(time, runs)
    for axes in (loss, drift):
        axes.locator_params(axis="x", integer=True)
    for axes in (loss, cost, drift):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small")
    save_figure(figure, path, "--to")


def _curve(
    axes: Any,
    run: RunFacts,
    across: Callable[[RoundFacts], float],
    up: Callable[[RoundFacts], float | None],
    *,
    color: str,
    faint: bool = False,
) -> None:
    points = [(across(facts), y) for facts in run.rounds if (y := up(facts)) is not None]
    if points:
        style: dict[str, Any] = (
            {"linewidth": 0.7, "alpha": 0.5}
            if faint
            else {"linewidth": 2, "marker": "o", "label": run.label}
        )
        axes.plot(*zip(*points, strict=True), color=color, **style)


def _with_perplexity(axes: Any, runs: Sequence[RunFacts]) -> None:
    losses = [r.held_out_nll for run in runs for r in run.rounds if r.held_out_nll is not None]
    if not losses or max(losses) > _READABLE_NATS:
        return
    right = axes.twinx()
    low, high = axes.get_ylim()
    right.set(ylim=(math.exp(low), math.exp(high)), ylabel="perplexity", yscale="log")
    right.yaxis.set_major_formatter("{x:.4g}")
    right.yaxis.set_minor_formatter("{x:.4g}")


def _bars(axes: Any, runs: Sequence[RunFacts]) -> None:
    seconds = [run.seconds() for run in runs]
    floor = [0.0] * len(runs)
    for phase in phases(seconds):
        heights = [of_run.get(phase, 0.0) for of_run in seconds]
        axes.bar(range(len(runs)), heights, bottom=floor, width=0.6, label=phase)
        floor = [below + height for below, height in zip(floor, heights, strict=True)]
    axes.set(title="seconds by phase, all rounds", ylabel="s (slowest site of each round)")
    axes.set_xticks(range(len(runs)), [run.label for run in runs])
    if any(floor):
        axes.legend(fontsize="small")
