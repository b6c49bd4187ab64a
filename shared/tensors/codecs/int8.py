"""``int8``: blocks of 256 values, each a whole number times its block's scale. 1.008 bytes a value.

The tensor is flattened row by row and cut into blocks of 256 (the last may be shorter). For a
block with largest magnitude m the scale is s = m / 127, rounded *up* to bfloat16, so that no value
needs clipping; x becomes q = round(x / s), half to even, and comes back as q * s, which is exact in
fp32 (7 bits times 8 bits).

Error: ``|x - x'| <= s / 2 <= m / 254 * (1 + 2**-7)``, m being that of x's own block, for
m / 127 >= 2**-126 (below, s is at most one bfloat16 subnormal, 2**-133, too large).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np

from shared.tensors.tensor_file import TensorLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from shared.protocol.manifest import TensorSpec
    from shared.tensors.codecs import Codec

BLOCK: Final = 256
_LEVELS: Final = 127


@dataclass(frozen=True)
class Int8:
    """``X``: int8 in the tensor's own shape; ``X:scale``: bfloat16, one for each block."""

    name: str = "int8"
    version: int = 1
    exact: bool = False

    def layout(self, spec: TensorSpec, /) -> tuple[TensorLayout, ...]:
        """Whole numbers, then scales of shape (blocks,)."""
        return (
            TensorLayout(spec.name, "I8", spec.shape),
            TensorLayout(f"{spec.name}:scale", "BF16", (-(-spec.elements // BLOCK),)),
        )

    def encode(
        self, spec: TensorSpec, values: NDArray[np.float32], _seed: int, /
    ) -> tuple[NDArray[Any], ...]:
        """Whole numbers from -127 to 127 and scales. Divides in fp64, so that the bound holds."""
        rows = _blocks(values, spec.elements)
        largest = np.abs(rows).max(axis=1)
        scales = _rounded_up(largest.astype(np.float64) / _LEVELS)
        divisors = np.where(scales == 0, 1, scales).astype(np.float64)
        wide = np.divide(rows, divisors[:, np.newaxis], dtype=np.float64)
        whole = np.rint(wide, out=wide).astype(np.int8)
        return whole.reshape(-1)[: spec.elements].reshape(spec.shape), scales

    def decode(self, spec: TensorSpec, parts: Sequence[NDArray[Any]], /) -> NDArray[np.float32]:
        """Whole numbers times scales; a scale that is not finite gives values that are not."""
        rows = _blocks(parts[0], spec.elements).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            values = np.multiply(rows, parts[1].astype(np.float32)[:, np.newaxis], out=rows)
        return values.reshape(-1)[: spec.elements].reshape(spec.shape)


def _blocks(values: NDArray[Any], elements: int) -> NDArray[Any]:
    """The flattened values as rows of BLOCK, the last row filled up with zeros."""
    flat = values.reshape(-1)
    if elements % BLOCK:
        flat = np.pad(flat, (0, -elements % BLOCK))
    return flat.reshape(-1, BLOCK)


def _rounded_up(values: NDArray[np.float64]) -> NDArray[Any]:
    """The smallest bfloat16 not below each of ``values`` (all >= 0, far from overflow)."""
    near = values.astype(ml_dtypes.bfloat16)
    # The next larger of a float that is not negative is its bit pattern plus one.
    bits = near.view(np.uint16) + (near.astype(np.float64) < values)
    return bits.astype(np.uint16).view(ml_dtypes.bfloat16)


MODE: Final[Codec] = Int8()
