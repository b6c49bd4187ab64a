"""Runs compared as a picture: loss by round, loss against bytes, drift, seconds by phase."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from coordinator.runs.comparison import phases
from gradualdiff.figures.held_out import COLOURS, add_legend, looks, new_figure, save_figure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from coordinator.runs.comparison import ComparedRound, ComparedRun

# Where exp(loss) still says something on an axis.
_READABLE_NATS = 20.0


SIZE = (12, 8.4)


def write_comparison(runs: Sequence[ComparedRun], path: Path) -> None:
    """Write the picture. Raises MissingPackageError without matplotlib, ConfigError on the path."""
    figure = new_figure(SIZE)
    axes = figure.subplots(2, 2).flat
    _draw(runs, *axes)
    add_legend(figure, axes[0])
    save_figure(figure, path, "--to")


def plot_comparison(
    runs: Sequence[ComparedRun], axes: Sequence[Axes] | None = None
) -> tuple[Axes, Axes, Axes, Axes]:
    """Draw on four axes, or on those of a new figure of pyplot's; the axes.

    They are: loss by round, loss against bytes, drift, seconds by phase.
    """
    if axes is not None:
        loss, cost, drift, time = axes
        _draw(runs, loss, cost, drift, time)
        loss.legend(fontsize="small")
    else:
        figure = new_figure(SIZE, shown=True)
        loss, cost, drift, time = figure.subplots(2, 2).flat
        _draw(runs, loss, cost, drift, time)
        add_legend(figure, loss)
    return loss, cost, drift, time


def _draw(runs: Sequence[ComparedRun], loss: Axes, cost: Axes, drift: Axes, time: Axes) -> None:
    for run, look in zip(runs, looks(), strict=False):
        faint = {"linewidth": 0.7, "alpha": 0.5, "color": look["color"]}
        bold = {"linewidth": 2, "markersize": 5, "label": run.label, **look}
        _curve(loss, run, lambda r: r.round, lambda r: r.held_out_nll, bold)
        for site in sorted({site for facts in run.rounds for site in facts.by_site}):
            _curve(loss, run, lambda r: r.round, _at(site), faint)
        _curve(cost, run, lambda r: r.uploaded / 1e6, lambda r: r.held_out_nll, bold)
        _curve(drift, run, lambda r: r.round, lambda r: r.cosine, bold)
        _curve(drift, run, lambda r: r.round, lambda r: r.lowest_cosine, faint)
    loss.set(title="held-out loss (thick: pooled, thin: each site)", xlabel="round (0: the base)")
    cost.set(title="loss against bytes", xlabel="MB uploaded so far by each member")
    for axes in (loss, cost):
        axes.set_ylabel("nats per answer token")
        _with_perplexity(axes, runs)
    drift.set(
        title="drift: cosine to the mean delta (thick: mean, thin: lowest)",
        xlabel="round",
        ylabel="cosine",
    )
    _bars(time, runs)
    for axes in (loss, drift):
        axes.locator_params(axis="x", integer=True)
    for axes in (loss, cost, drift):
        axes.grid(alpha=0.3)


def _at(site: str) -> Callable[[ComparedRound], float | None]:
    return lambda facts: facts.by_site.get(site)


def _curve(
    axes: Any,
    run: ComparedRun,
    across: Callable[[ComparedRound], float],
    up: Callable[[ComparedRound], float | None],
    style: dict[str, Any],
) -> None:
    points = [(across(facts), y) for facts in run.rounds if (y := up(facts)) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def _with_perplexity(axes: Any, runs: Sequence[ComparedRun]) -> None:
    losses = [r.held_out_nll for run in runs for r in run.rounds if r.held_out_nll is not None]
    if not losses or max(losses) > _READABLE_NATS:
        return
    right = axes.twinx()
    low, high = axes.get_ylim()
    right.set(ylim=(math.exp(low), math.exp(high)), ylabel="perplexity", yscale="log")
    right.yaxis.set_major_formatter("{x:.4g}")
    right.yaxis.set_minor_formatter("{x:.4g}")


def _bars(axes: Any, runs: Sequence[ComparedRun]) -> None:
    seconds = [run.seconds() for run in runs]
    floor = [0.0] * len(runs)
    for index, phase in enumerate(phases(seconds)):
        heights = [of_run.get(phase, 0.0) for of_run in seconds]
        axes.bar(
            range(len(runs)),
            heights,
            bottom=floor,
            width=0.6,
            label=phase,
            color=COLOURS[index % len(COLOURS)],
            hatch=("", "//", "..", "xx", "\\\\", "++", "oo")[index % 7],
            edgecolor="white",
        )
        floor = [below + height for below, height in zip(floor, heights, strict=True)]
    axes.set(title="seconds by phase, all rounds", ylabel="s (slowest site of each round)")
    axes.set_xticks(range(len(runs)), [run.label for run in runs])
    if any(floor):
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
