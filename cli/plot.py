"""Held-out loss by round as a PNG: the global adapter over all text, and at each site."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.errors import ConfigError, MissingPackageError
from shared.records import pool_held_out

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from coordinator.inspection import History


def plot_held_out(history: History, path: Path) -> None:
    """Write the picture. Raises MissingPackageError without matplotlib, ConfigError on the path."""
    figure = new_figure((7, 4.2))
    losses = {n: history.held_out(n) for n in range(history.last_closed + 1)}
    losses = {n: by_site for n, by_site in losses.items() if by_site}
    axes = figure.add_subplot()
    for site in sorted({site for by_site in losses.values() for site in by_site}):
        points = [(n, by_site[site].nll) for n, by_site in losses.items() if site in by_site]
        axes.plot(*zip(*points, strict=True), marker=".", linewidth=1, alpha=0.6, label=site)
    pooled = [(n, pool_held_out(by_site.values())) for n, by_site in losses.items()]
    known = [(n, loss.nll) for n, loss in pooled if loss is not None]
    if known:
        axes.plot(*zip(*known, strict=True), marker="o", linewidth=2.5, color="black", label="all")
    axes.set(
        title=f"{history.run}: held-out loss of the global adapter",
        xlabel="round (0: the base model)",
        ylabel="nats per answer token",
    )
    axes.set_xticks(sorted(losses))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path, "--plot")


def new_figure(inches: tuple[float, float]) -> Figure:
    """An empty picture, drawn without a display. Raises MissingPackageError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError(
            "plotting needs matplotlib; run: pip install 'gradualdiff-fed[plot]'"
        ) from None
    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, option: str) -> None:
    """Write it. Raises ConfigError, which names ``option``, where it cannot be written."""
    if path.suffix.lower() != ".png":  # matplotlib would append it, or write another format
        raise ConfigError(f"{option} {path}: expected a name that ends in .png, got another")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{option} {path}: cannot be written ({error}); give a .png path"
        ) from None
