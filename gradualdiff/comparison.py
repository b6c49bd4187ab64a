"""Several runs set side by side, whichever stores they are in."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.runs.comparison import ComparedRun, gather, warnings
from shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from gradualdiff.recorded import Recorded


@dataclass(frozen=True)
class Comparison:
    """What is known of each run. ``warnings``: why their losses may not be compared."""

    runs: tuple[ComparedRun, ...]
    warnings: list[str]

    def plot(self, axes: Sequence[Axes] | None = None) -> tuple[Axes, Axes, Axes, Axes]:
        """Draw loss by round, loss against bytes, drift and seconds; the four axes.

        ``axes``: four to draw on. Raises MissingPackageError without matplotlib.
        """
        from gradualdiff.figures.comparison import plot_comparison

        return plot_comparison(self.runs, axes)


def compare(runs: Sequence[Recorded]) -> Comparison:
    """Compare runs, in the order given. Raises ConfigError for a run that is there twice."""
    places = [(run.path.resolve(), run.name) for run in runs]
    twice = [place for place, n in Counter(places).items() if n > 1]
    if twice:
        raise ConfigError(
            f"compare: expected different runs, got {twice[0][1]} of {twice[0][0]} more than "
            "once; name each run once"
        )
    repeated = {name for name, n in Counter(name for _, name in places).items() if n > 1}
    common = os.path.commonpath([path.parent for path, _ in places])
    gathered = tuple(
        gather(run.history, f"{path.relative_to(common)}:{name}" if name in repeated else name)
        for run, (path, name) in zip(runs, places, strict=True)
    )
    return Comparison(gathered, warnings(gathered))
