"""Held-out loss by round as a picture: the global adapter over all text, and at each site."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from shared.errors import ConfigError, MissingPackageError
from shared.protocol.manifest import pool_held_out

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from coordinator.history import History

SUFFIXES = (".png", ".pdf", ".svg")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


SIZE = (7, 4.2)


def write_held_out(history: History, path: Path) -> None:
    """Write the picture. Raises MissingPackageError without matplotlib, ConfigError on the path."""
    figure = new_figure(SIZE)
    axes = figure.add_subplot()
    _draw(history, axes)
    add_legend(figure, axes)
    save_figure(figure, path, "--plot")


def plot_held_out(history: History, axes: Axes | None = None) -> Axes:
    """Draw it on ``axes``, or on those of a new figure of pyplot's; the axes."""
    if axes is not None:
        _draw(history, axes)
        axes.legend(fontsize="small")
        return axes
    figure = new_figure(SIZE, shown=True)
    own = figure.add_subplot()
    _draw(history, own)
    add_legend(figure, own)
    return own


def _draw(history: History, axes: Axes) -> None:
    losses = {n: history.held_out(n) for n in range(history.last_closed + 1)}
    losses = {n: by_site for n, by_site in losses.items() if by_site}
    sites = sorted({site for by_site in losses.values() for site in by_site})
    for look, site in zip(looks(), sites, strict=False):
        points = [(n, by_site[site].nll) for n, by_site in losses.items() if site in by_site]
        axes.plot(*zip(*points, strict=True), linewidth=1, markersize=4, label=site, **look)
    pooled = [(n, pool_held_out(by_site.values())) for n, by_site in losses.items()]
    known = [(n, loss.nll) for n, loss in pooled if loss is not None]
    if known:
        axes.plot(*zip(*known, strict=True), linewidth=3, color="black", label="pooled")
    axes.set(
        title=f"{history.run}: held-out loss of the global adapter",
        xlabel="round (0: the base model)",
        ylabel="nats per answer token",
    )
    axes.set_xticks(sorted(losses))
    axes.grid(alpha=0.3)


def looks() -> Iterator[dict[str, Any]]:
    """How each next line is drawn: told apart by colour, and without seeing colours.

    The colours are those of Okabe and Ito, "Color Universal Design" (2008), but for black and
    yellow, which is hard to see on white; with 5 marks and 4 dashes 420 lines differ.
    """
    for index in itertools.count():
        yield {
            "color": COLOURS[index % len(COLOURS)],
            "marker": "os^Dv"[index % 5],
            "linestyle": ("-", "--", "-.", ":")[index // len(COLOURS) % 4],
        }


def add_legend(figure: Figure, axes: Axes) -> None:
    """Name the curves of ``axes`` below the whole picture, where no curve is hidden."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")


def new_figure(inches: tuple[float, float], *, shown: bool = False) -> Figure:
    """An empty picture, drawn without a display. Raises MissingPackageError without matplotlib.

    ``shown``: one of pyplot's, as a notebook or a window shows it.
    """
    try:
        if shown:
            from matplotlib import pyplot as plt

            return plt.figure(figsize=inches, layout="constrained")
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
    check_picture(path, option)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{option} {path}: cannot be written ({error}); give another path"
        ) from None


def check_picture(path: Path, option: str) -> None:
    """What can be known before there is anything to draw. Raises ConfigError naming ``option``."""
    if path.suffix.lower() not in SUFFIXES:  # matplotlib would append one, or write another format
        raise ConfigError(
            f"{option} {path}: expected a name that ends in {', '.join(SUFFIXES)}, got another"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no {path.parent}; give another path")
