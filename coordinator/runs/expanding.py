"""A core adapter written as a LoRA adapter of the same function: (B R, A), scale 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shared.adapters.core import KIND
from shared.errors import LedgerDamagedError
from shared.tensors.tensor_file import (
    ADAPTER_METADATA,
    FileDigest,
    TensorFile,
    TensorLayout,
    write_tensors,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray


def write_lora(cores: Path, bases: Path, target: Path) -> FileDigest:
    """Write ``target``: float32 (outputs, rank) B R and (rank, inputs) A of each layer.

    ``cores``: R's, (rank, rank). ``bases``: B's and A's under a LoRA adapter's names, of that rank
    or a higher one, of which the first directions count. Raises LedgerDamagedError where they do
    not belong together.
    """
    with TensorFile(cores) as inner, TensorFile(bases) as outer:
        names = {name: KIND.lora_names(name) for name in sorted(inner.layouts)}
        layouts: list[TensorLayout] = []
        for name, (left, right) in names.items():
            rank = inner.layouts[name].shape[0]
            b, a = outer.layouts.get(left), outer.layouts.get(right)
            if b is None or a is None or b.shape[1] < rank or a.shape[0] < rank:
                raise LedgerDamagedError(
                    f"{name}: expected bases of rank {rank} or more for its layer, got "
                    f"{b.shape if b else 'none'} and {a.shape if a else 'none'}; give the bases "
                    "of this run"
                )
            layouts += [
                TensorLayout(right, "F32", (rank, a.shape[1])),
                TensorLayout(left, "F32", (b.shape[0], rank)),
            ]

        def values() -> Iterator[NDArray[np.float32]]:
            for name, (left, right) in names.items():
                r = inner.read(name)
                yield KIND.first_directions(right, outer.read(right), len(r))
                b = KIND.first_directions(left, outer.read(left), len(r)).astype(np.float64)
                yield (b @ r.astype(np.float64)).astype(np.float32)

        return write_tensors(target, layouts, values(), ADAPTER_METADATA)
