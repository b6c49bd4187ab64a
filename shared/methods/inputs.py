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
    from shared.tensors.delta_file import DeltaFile
    from shared.tensors.stopwatch import Stopwatch
    from shared.tensors.tensor_file import TensorFile


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

    def note_energy(self, layer: str, squares: tuple[float, ...]) -> None:
        """Squared norms of parts of one layer's mean gradient."""


class Inputs:
    """What one round joins. ``deltas`` and ``files`` are in one order, by site.

    ``manifest``: of the part of the adapter that is trained. A delta of a lower rank is a change of
    the adapter's first directions.
    """

    def __init__(
        self,
        adapter: TensorFile,
        deltas: Sequence[WeightedDelta],
        files: Sequence[DeltaFile],
        figures: Figures,
        manifest: Manifest,
    ) -> None:
        self.adapter = adapter
        self.deltas = deltas
        self.figures = figures
        self.manifest = manifest
        self.sent = [delta.manifest or manifest for delta in deltas]
        self._files = files
        self._specs = [{spec.name: spec for spec in own.tensors} for own in self.sent]

    def read(self, index: int, name: str) -> NDArray[np.float32]:
        """A delta's values of one tensor as they were sent, of its own rank."""
        return self._files[index].read(self._specs[index][name])

    def scaled(self, index: int, name: str) -> NDArray[np.float64]:
        """The same as they count: those of a delta that was too long are scaled down."""
        return np.multiply(self.read(index, name), self.deltas[index].scale, dtype=np.float64)

    def release(self, name: str) -> None:
        """Give back the memory of one tensor of the adapter and of all deltas."""
        self.adapter.release(name)
        for file, specs in zip(self._files, self._specs, strict=True):
            file.release(specs[name])

    def measure(
        self,
        spec: TensorSpec,
        read: Callable[[int, str], NDArray[Any]],
        shares: Sequence[float],
    ) -> NDArray[np.float64]:
        """The mean of one tensor of all deltas by ``shares``; note its figures, and each delta's.

        A delta of a lower rank counts as zeros beyond it.
        """
        mean = np.zeros(spec.shape)
        parts = []
        for index, share in enumerate(shares):
            values = read(index, spec.name)
            parts.append(mean[tuple(slice(length) for length in values.shape)])
            parts[-1][:] += np.multiply(values, share, dtype=np.float64)
        self.figures.note_mean(squared_norm(mean))
        for index, delta in enumerate(self.deltas):
            found = square_and_product(read(index, spec.name), parts[index])
            self.figures.note_delta(delta.site, *found)
        return mean
