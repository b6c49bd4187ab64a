"""``bf16``: each value rounded to bfloat16, half to even. 2 bytes a value.

Error: ``|x - x'| <= 2**-8 * |x|`` for normal numbers (8 significant bits), and at most half of the
smallest bfloat16 subnormal, 2**-134, below 2**-126. It is relative to the *difference* that
travels; rounding the weights themselves instead would cost some 25 times more of the update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np

from shared.tensors.tensor_file import TensorLayout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from shared.config import FederationConfig
    from shared.protocol.manifest import TensorSpec
    from shared.tensors.codecs import Codec


@dataclass(frozen=True)
class Bf16:
    """``X``: bfloat16 in the tensor's own shape."""

    name: str = "bf16"
    version: int = 1
    exact: bool = False

    def misfits(self, _config: FederationConfig, /) -> Iterator[str]:
        """None."""
        yield from ()

    def layout(self, spec: TensorSpec, /) -> tuple[TensorLayout, ...]:
        """One part."""
        return (TensorLayout(spec.name, "BF16", spec.shape),)

    def encode(
        self, _spec: TensorSpec, values: NDArray[np.float32], _seed: int, /
    ) -> tuple[NDArray[Any], ...]:
        """Rounded half to even; a value within 2**-9 of fp32's largest becomes infinite."""
        return (values.astype(ml_dtypes.bfloat16),)

    def decode(self, _spec: TensorSpec, parts: Sequence[NDArray[Any]], /) -> NDArray[np.float32]:
        """Exact: every bfloat16 is an fp32."""
        return parts[0].astype(np.float32)


MODE: Final[Codec] = Bf16()
