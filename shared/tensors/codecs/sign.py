"""``sign``: each value's sign, times its block's mean magnitude. 0.133 bytes a value.

Blocks of 256; the mean is that of the block's |x| in fp64, rounded to the nearest bfloat16. Zero
counts as plus.

Error: ``|x - x'| <= max(|x|, m + m * 2**-8)``, m the block's mean magnitude: on normal values 60 %
of their rms. It is of use only with ``codec.feedback``, which sends what is left out in a later
round (EF-signSGD, Karimireddy et al. 2019, arXiv:1901.09847): the settings are refused without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shared.tensors.codecs import feedback_is_missing
from shared.tensors.packing import (
    BFLOAT16,
    BLOCK,
    PIECE,
    blocks_of,
    count_blocks,
    pieces,
    rounded,
    sum_by_halves,
    times_scales,
)
from shared.tensors.tensor_file import TensorLayout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from shared.config import FederationConfig
    from shared.protocol.manifest import TensorSpec
    from shared.tensors.codecs import Codec

# The eight signs of every byte.
_SIGNS: Final = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, np.newaxis], axis=1, bitorder="little"), -1, 1
).astype(np.float32)


@dataclass(frozen=True)
class Sign:
    """``X``: a bit for each value, 1 where it is below zero; ``X:scale``: bfloat16 by block.

    The first value of a byte is in its lowest bit; what is left of the last byte is zero.
    """

    name: str = "sign"
    version: int = 1
    exact: bool = False

    def misfits(self, config: FederationConfig, /) -> Iterator[str]:
        """Settings without feedback."""
        yield from feedback_is_missing(self.name, config)

    def layout(self, spec: TensorSpec, /) -> tuple[TensorLayout, ...]:
        """Bytes, then scales of shape (blocks,)."""
        return (
            TensorLayout(spec.name, "U8", (-(-spec.elements // 8),)),
            TensorLayout(f"{spec.name}:scale", "BF16", (count_blocks(spec.elements),)),
        )

    def encode(
        self, spec: TensorSpec, values: NDArray[np.float32], _seed: int, /
    ) -> tuple[NDArray[Any], ...]:
        """Bits and scales."""
        flat = values.reshape(-1)
        bits = np.empty(-(-spec.elements // 8), np.uint8)
        scales = np.empty(count_blocks(spec.elements), BFLOAT16)
        counts = np.full((scales.size,), BLOCK)
        counts[-1:] = spec.elements - BLOCK * (scales.size - 1)
        buffer = np.empty(min(PIECE, BLOCK * scales.size), np.float32)
        for place, rows in pieces(flat):
            sizes = np.abs(rows, out=buffer[: rows.size].reshape(rows.shape))
            here = blocks_of(place)
            scales[here] = rounded(sum_by_halves(sizes) / counts[here])
            packed = np.packbits(flat[place] < 0, bitorder="little")
            bits[place.start // 8 : place.start // 8 + packed.size] = packed
        return bits, scales

    def decode(self, spec: TensorSpec, parts: Sequence[NDArray[Any]], /) -> NDArray[np.float32]:
        """Signs times scales; a scale that is not finite gives values that are not."""
        bits, scales = parts
        values = np.empty((bits.size, 8), np.float32)
        np.take(_SIGNS, bits, axis=0, out=values, mode="clip")
        return times_scales(values.reshape(-1)[: spec.elements], scales).reshape(spec.shape)


MODE: Final[Codec] = Sign()
