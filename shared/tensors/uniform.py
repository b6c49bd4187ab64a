"""Stochastic uniform quantisation to k levels (Suresh et al. 2017, arXiv:1611.00429).

The tensor is flattened row by row and cut into blocks of 256 (the last may be shorter). A block
with least value lo and largest hi has k levels lo + q x step, step = (hi - lo) / (k - 1); x becomes
q = floor((x - lo) / step + u) with u uniform in [0, 1), so that the level above or below is taken
and the mean over u is x itself. lo and hi travel as fp32, and q in log2 k bits.

Error: ``|x - x'| <= step``, each level within fp32's rounding; a block of equal values is exact.
Unbiased does not mean small: with k = 4 the rms error on normal values is three quarters of their
rms, and only a mean over many sites makes it smaller (docs/explanation/algorithm.md). Ro et al. use
it for uploads of language models (arXiv:2204.09715).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.tensors.packing import BLOCK, count_blocks
from shared.tensors.tensor_file import TensorLayout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from shared.config import FederationConfig
    from shared.protocol.manifest import TensorSpec


@dataclass(frozen=True)
class Uniform:
    """``X``: whole numbers of ``bits`` bits, packed; ``X:range``: fp32 lo and hi of each block.

    ``bits``: 2, 4 or 8; k = 2**bits. The first value of a byte is in its lowest bits; what is left
    of the last byte is zero.
    """

    bits: int
    version: int = 1
    exact: bool = False

    @property
    def name(self) -> str:
        """``uniform4``, ``uniform16``, ``uniform256``."""
        return f"uniform{self.levels}"

    @property
    def levels(self) -> int:
        """Levels of a block, k."""
        return 1 << self.bits

    def misfits(self, _config: FederationConfig, /) -> Iterator[str]:
        """None."""
        yield from ()

    def layout(self, spec: TensorSpec, /) -> tuple[TensorLayout, ...]:
        """Bytes, then ranges of shape (blocks, 2)."""
        return (
            TensorLayout(spec.name, "U8", (-(-spec.elements * self.bits // 8),)),
            TensorLayout(f"{spec.name}:range", "F32", (count_blocks(spec.elements), 2)),
        )

    def encode(
        self, spec: TensorSpec, values: NDArray[np.float32], seed: int, /
    ) -> tuple[NDArray[Any], ...]:
        """Packed whole numbers, and ranges. In fp64, where no difference of two fp32 overflows.

        u is Philox's raw words under ``seed``, whose stream numpy promises to keep.
        """
        rows = _blocks(values.reshape(-1))
        ranges = np.stack([rows.min(axis=1), rows.max(axis=1)], axis=1)
        low, step = self._grid(ranges)
        words = np.random.Philox(key=seed).random_raw(spec.elements)
        uniform = _blocks((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)
        places = np.subtract(rows, low, dtype=np.float64)
        places /= np.where(step == 0, 1, step)
        places += uniform
        # hi with a u next to 1 may be rounded up to k.
        whole = np.minimum(places, self.levels - 1, out=places).astype(np.uint8)
        return self._pack(whole.reshape(-1)[: spec.elements]), ranges

    def decode(self, spec: TensorSpec, parts: Sequence[NDArray[Any]], /) -> NDArray[np.float32]:
        """Each lo + q x step; a range that is not finite gives a block of values that are not."""
        whole = _blocks(self._unpack(parts[0], spec.elements))
        with np.errstate(over="ignore", invalid="ignore"):
            low, step = self._grid(parts[1])
            values = (low + whole * step).astype(np.float32)
        return values.reshape(-1)[: spec.elements].reshape(spec.shape)

    def _grid(self, ranges: NDArray[np.float32]) -> tuple[NDArray[np.float64], ...]:
        """Lowest level and step of each block, as columns."""
        low, high = (ranges[:, side, np.newaxis].astype(np.float64) for side in (0, 1))
        return low, (high - low) / (self.levels - 1)

    def _pack(self, whole: NDArray[np.uint8]) -> NDArray[np.uint8]:
        each = 8 // self.bits
        rows = np.pad(whole, (0, -whole.size % each)).reshape(-1, each)
        packed = np.zeros(len(rows), np.uint8)
        for place in range(each):
            packed |= rows[:, place] << np.uint8(self.bits * place)
        return packed

    def _unpack(self, packed: NDArray[np.uint8], elements: int) -> NDArray[np.uint8]:
        each = 8 // self.bits
        whole = np.empty((packed.size, each), np.uint8)
        for place in range(each):
            shifted = packed >> np.uint8(self.bits * place)
            np.bitwise_and(shifted, np.uint8(self.levels - 1), out=whole[:, place])
        return whole.reshape(-1)[:elements]


def _blocks(flat: NDArray[Any]) -> NDArray[Any]:
    """Rows of BLOCK; the last is filled up with its own last value, which widens no range."""
    if flat.size % BLOCK:
        flat = np.pad(flat, (0, -flat.size % BLOCK), mode="edge")
    return flat.reshape(-1, BLOCK)
