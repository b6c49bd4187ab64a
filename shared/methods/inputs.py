"""What an averaging mode joins, and who keeps the figures of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from shared.tensors.arithmetic import square_and_product, squared_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.protocol.manifest import Manifest, TensorSpec
    from shared.tensors.tensor_file import Stopwatch


@dataclass(frozen=True)
class WeightedDelta:
    """One input of a round: a checked delta file and its share.

    ``site``: its name in the figures; a site's delta of an earlier round has a label of its own.
    ``scale``: what its values are multiplied by before anything else. ``manifest``: what it is made
    of, where that is not all of the adapter (some of its tensors, or factors of a lower rank).
    """

    site: str
    path: Path
    weight: float
    scale: float = 1.0
    manifest: Manifest | None = None


class Figures(Protocol):
    """Who keeps the round's figures."""

    watch: Stopwatch

    def note_mean(self, square: float) -> None:
        """Square of one tensor of the mean delta."""

    def note_delta(self, site: str, square: float, product: float) -> None:
        """Square of a delta's tensor, and its product with the mean's."""

    def note_gap(self, square: float) -> None:
        """Square of what one layer's new product lacks of the mean of the products."""


def measure(
    spec: TensorSpec,
    sites: Sequence[str],
    read: Callable[[int], NDArray[Any]],
    shares: Sequence[float],
    figures: Figures,
) -> None:
    """Figures of one tensor: of the mean of all deltas, and of each beside it.

    ``read(index)``: a delta's values of it. One of a lower rank counts as zeros beyond it.
    """
    mean = np.zeros(spec.shape)
    parts = []
    for index, share in enumerate(shares):
        values = read(index)
        parts.append(mean[tuple(slice(length) for length in values.shape)])
        parts[-1][:] += np.multiply(values, share, dtype=np.float64)
    figures.note_mean(squared_norm(mean))
    for index, site in enumerate(sites):
        figures.note_delta(site, *square_and_product(read(index), parts[index]))
