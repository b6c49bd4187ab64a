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

    ``cores``: R's, (rank, rank). ``bases``: B's and A's under a LoRA adapter's names. Raises
    LedgerDamagedError where they do not belong together.
    """
    with TensorFile(cores) as inner, TensorFile(bases) as outer:
        names = {name: KIND.lora_names(name) for name in inner.layouts}
        for name, (left, right) in names.items():
            shape = inner.layouts[name].shape
            b, a = outer.layouts.get(left), outer.layouts.get(right)
            if b is None or a is None or (b.shape[1], a.shape[0]) != shape:
                raise LedgerDamagedError(
                    f"{name}: expected bases of rank {shape[0]} for its layer, got "
                    f"{b.shape if b else 'none'} and {a.shape if a else 'none'}; give the bases "
                    "of this run"
                )

        def values() -> Iterator[NDArray[np.float32]]:
            for name, (left, right) in sorted(names.items()):
                yield outer.read(right)
                b, r = (
                    file.read(of).astype(np.float64) for file, of in ((outer, left), (inner, name))
                )
                yield (b @ r).astype(np.float32)

        layouts = [
            TensorLayout(of, "F32", outer.layouts[of].shape)
            for _, (left, right) in sorted(names.items())
            for of in (right, left)
        ]
        return write_tensors(target, layouts, values(), ADAPTER_METADATA)
