"""Figure 1 as a PNG: loss by round, each arm, mean over seeds with its spread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradualdiff.figures.held_out import new_figure, save_figure
from gradualdiff.reproduction.arms import ARMS
from gradualdiff.reproduction.figures import mean_and_sd

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gradualdiff.reproduction.figures import ArmFigures

SHOWN = {"client_nll": "client training loss", "test_nll": "held-out loss of the global adapter"}


def draw_losses(figures: Sequence[ArmFigures], path: Path) -> None:
    """One row of axes per batch size. Raises MissingPackageError, ConfigError on the path."""
    sizes = sorted({one.batch_size for one in figures})
    picture = new_figure((10, 4 * len(sizes)))
    grid = picture.subplots(len(sizes), len(SHOWN), squeeze=False)
    for line, size in zip(grid, sizes, strict=True):
        for axes, (name, title) in zip(line, SHOWN.items(), strict=True):
            for index, (arm, word) in enumerate(ARMS.items()):
                mine = [f for f in figures if (f.batch_size, f.arm) == (size, arm) and f.rounds]
                curves = [[getattr(one, name) for one in f.rounds] for f in mine]
                if not curves or any(value is None for curve in curves for value in curve):
                    continue
                spread = [mean_and_sd(values) for values in zip(*curves, strict=True)]
                numbers = [one.round for one in mine[0].rounds]
                means = [mean for mean, _ in spread]
                colour = f"C{index}"  # an arm has one in all axes
                axes.plot(numbers, means, marker=".", label=word, color=colour)
                axes.set_xticks(numbers)
                low = [mean - (sd or 0.0) for mean, sd in spread]
                high = [mean + (sd or 0.0) for mean, sd in spread]
                axes.fill_between(numbers, low, high, alpha=0.15, color=colour)
            if name == "test_nll":
                base = [
                    f.losses["test"]["nll"]
                    for f in figures
                    if (f.batch_size, f.arm) == (size, "base")
                ]
                if base:
                    axes.axhline(base[0], color="grey", linestyle=":", label=ARMS["base"])
            axes.set(title=f"{title}, batch {size}", xlabel="round", ylabel="nats per answer token")
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[1]:
                axes.legend(fontsize="small")
    save_figure(picture, path, "--dir")
