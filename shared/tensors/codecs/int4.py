"""``int4``: blocks of 256 values, each -7 to 7 times its block's scale. About 0.42 bytes a value.

As ``int8`` with 7 for 127: the scale is s = m / 7, m the block's largest magnitude, rounded *up* to
bfloat16; x becomes q = round(x / s), half to even, and comes back as q * s.

Error: ``|x - x'| <= s / 2 <= m / 14 * (1 + 2**-7)`` for m / 7 >= 2**-126; on normal values 12 % of
their rms. With ``codec.feedback`` what is left out travels in a later round.

On normal values a q holds 3.29 bits of the 4 that it takes, so the entropy coder saves a sixth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shared.tensors.packing import (
    BFLOAT16,
    BLOCK,
    count_blocks,
    frame_bound,
    from_frame,
    quotients,
    split,
    times_scales,
    to_bfloat16,
    to_frame,
)
from shared.tensors.tensor_file import TensorLayout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from shared.config import FederationConfig
    from shared.protocol.manifest import TensorSpec
    from shared.tensors.codecs import Codec

_LEVELS: Final = 7
_ZERO: Final = 8  # q travels as q + 8, 1 to 15
# Added to a small number, it leaves the number rounded half to even in fp32's lowest bits.
_ROUND: Final = np.float32(1.5 * 2**23 + _ZERO)


def _pairs() -> NDArray[np.uint64]:
    """For every byte its two q as fp32, seen as one word. 0 is no q, and gives NaN."""
    codes = np.arange(256)[:, np.newaxis] >> np.array([0, 4]) & 15
    return np.where(codes == 0, np.nan, codes - _ZERO).astype("<f4").view("<u8").reshape(-1)


_PAIRS: Final = _pairs()


@dataclass(frozen=True)
class Int4:
    """``X``: a bfloat16 scale for each block, then a zstd frame of q + 8, two a byte.

    The first q of a byte is in its lower half; what is left of the last byte is a q of 0.
    """

    name: str = "int4"
    version: int = 1
    exact: bool = False
    levels: int = _LEVELS

    def misfits(self, _config: FederationConfig, /) -> Iterator[str]:
        """None."""
        yield from ()

    def layout(self, spec: TensorSpec, /) -> tuple[TensorLayout, ...]:
        """One part, as long as the frame comes out."""
        most = 2 * count_blocks(spec.elements) + frame_bound(-(-spec.elements // 2))
        return (TensorLayout(spec.name, "U8", (most,), varies=True),)

    def encode(
        self, spec: TensorSpec, values: NDArray[np.float32], _seed: int, /
    ) -> tuple[NDArray[Any], ...]:
        """Scales and frame."""
        scales = np.empty(count_blocks(spec.elements), BFLOAT16)
        packed = np.empty(BLOCK // 2 * scales.size, np.uint8)
        for place, work in quotients(values.reshape(-1), _LEVELS, scales):
            pairs = np.add(work, _ROUND, out=work).view("<u4").astype(np.uint8).view("<u2")
            begin = place.start // 2
            packed[begin : begin + pairs.size] = pairs | pairs >> 4
        packed = packed[: -(-spec.elements // 2)]
        return (np.concatenate([scales.view(np.uint8), to_frame(packed)]),)

    def decode(self, spec: TensorSpec, parts: Sequence[NDArray[Any]], /) -> NDArray[np.float32]:
        """Each q times its scale; a scale that is not finite gives values that are not."""
        scales, frame = split(parts[0], 2 * count_blocks(spec.elements))
        size = -(-spec.elements // 2)
        packed = from_frame(frame, size, size)
        words = np.empty(size, "<u8")
        np.take(_PAIRS, packed, out=words, mode="clip")
        values = words.view("<f4")[: spec.elements]
        return times_scales(values, to_bfloat16(scales)).reshape(spec.shape)


MODE: Final[Codec] = Int4()
