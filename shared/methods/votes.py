"""A round's deltas side by side, for the rules: of one tensor a slice of all deltas at a time.

Never K deltas are in memory, and not even K whole tensors where those are large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from shared.tensors.arithmetic import blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from shared.protocol.manifest import TensorSpec
    from shared.tensors.delta_file import DeltaFile

ROOM: Final = 2**22  # fp64 values of all deltas in memory at a time, a thread: 32 MiB


@dataclass(frozen=True)
class Votes:
    """A round's deltas in name order: open files, and what their values are multiplied by."""

    files: Sequence[DeltaFile]
    scales: Sequence[float]

    def slices(self, spec: TensorSpec) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        """One tensor, slice by slice: where it begins and ends, and one row of values a delta.

        The rows are overwritten once the next slice is asked for. Where one slice is not the whole
        tensor each delta is decoded once a slice: that costs time, K whole tensors cost memory.
        """
        size = max(1, min(spec.elements, ROOM // len(self.files)))
        room = np.empty((len(self.files), size), np.float64)
        for at in blocks(spec.elements, size):
            rows = room[:, : at.stop - at.start]
            for row, file, scale in zip(rows, self.files, self.scales, strict=True):
                np.copyto(row, file.read(spec).reshape(-1)[at])
                if scale != 1:
                    np.multiply(row, scale, out=row)
            yield at, rows
