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

import numpy as np

from shared.tensors.packing import BFLOAT16, count_blocks, quotients, times_scales
from shared.tensors.tensor_file import TensorLayout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from shared.config import FederationConfig
    from shared.protocol.manifest import TensorSpec
    from shared.tensors.codecs import Codec

_LEVELS: Final = 127


@dataclass(frozen=True)
class Int8:
    """``X``: int8 in the tensor's own shape; ``X:scale``: bfloat16, one for each block."""

    name: str = "int8"
    version: int = 1
    exact: bool = False
    levels: int = _LEVELS

    def misfits(self, _config: FederationConfig, /) -> Iterator[str]:
        """None."""
        yield from ()

    def layout(self, spec: TensorSpec, /) -> tuple[TensorLayout, ...]:
        """Whole numbers, then scales of shape (blocks,)."""
        return (
            TensorLayout(spec.name, "I8", spec.shape),
            TensorLayout(f"{spec.name}:scale", "BF16", (count_blocks(spec.elements),)),
        )

    def encode(
        self, spec: TensorSpec, values: NDArray[np.float32], _seed: int, /
    ) -> tuple[NDArray[Any], ...]:
        """Whole numbers from -127 to 127 and scales."""
        scales = np.empty(count_blocks(spec.elements), BFLOAT16)
        whole = np.empty(spec.elements, np.int8)
        for place, work in quotients(values.reshape(-1), _LEVELS, scales):
            here = work[: place.stop - place.start]
            whole[place] = np.rint(here, out=here)
        return whole.reshape(spec.shape), scales

    def decode(self, spec: TensorSpec, parts: Sequence[NDArray[Any]], /) -> NDArray[np.float32]:
        """Whole numbers times scales; a scale that is not finite gives values that are not."""
        values = parts[0].reshape(-1).astype(np.float32)
        return times_scales(values, parts[1]).reshape(spec.shape)


MODE: Final[Codec] = Int8()
