"""Held-out loss against the bytes of a round as a picture, and which arms are best for theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from gradualdiff.figures.held_out import looks, new_figure, save_figure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


SIZE = (8, 5)


class Point(Protocol):
    """One arm: bytes of one site in one round, both ways, and nats per answer token."""

    @property
    def arm(self) -> str:
        """Its name."""

    @property
    def bytes(self) -> float:
        """Both ways."""

    @property
    def loss(self) -> float | None:
        """None for one that is not drawn."""


def write_frontier(points: Sequence[Point], best: Sequence[Point], base: float, path: Path) -> None:
    """Draw ``points``, and a line through ``best``, which are some of them in order of bytes.

    ``base``: the loss without training, told and not drawn, as all arms are far from it. Raises
    MissingPackageError without matplotlib, ConfigError on the path.
    """
    figure = new_figure(SIZE)
    axes = figure.add_subplot()
    for look, point in zip(looks(), points, strict=False):
        if point.loss is not None:
            look |= {"linestyle": "none", "markersize": 8}
            axes.plot(point.bytes, point.loss, **look)
            axes.annotate(
                point.arm,
                (point.bytes, point.loss),
                xytext=(6, 4),
                textcoords="offset points",
                fontsize="small",
            )
    line = [(one.bytes, one.loss) for one in best]
    if line:
        axes.step(*zip(*line, strict=True), where="post", color="grey", linewidth=1, zorder=0)
    axes.set(
        title=f"held-out loss against bytes; base model: {base:.3f}; line: best for its bytes",
        xlabel="bytes of one site in one round, up and down",
        ylabel="nats per answer token",
        xscale="log",
    )
    axes.grid(alpha=0.3)
    axes.margins(x=0.15, y=0.1)
    save_figure(figure, path, "--picture")
