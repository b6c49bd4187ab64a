"""``fp32``: the values as they are. Exact; 4 bytes a value (the paper's likely format)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shared.tensors.tensor_file import TensorLayout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from shared.config import FederationConfig
    from shared.protocol.manifest import TensorSpec
    from shared.tensors.codecs import Codec


@dataclass(frozen=True)
class Fp32:
    """``X``: fp32 in the tensor's own shape."""

    name: str = "fp32"
    version: int = 1
    exact: bool = True

    def misfits(self, _config: FederationConfig, /) -> Iterator[str]:
        """None."""
        yield from ()

    def layout(self, spec: TensorSpec, /) -> tuple[TensorLayout, ...]:
        """One part."""
        return (TensorLayout(spec.name, "F32", spec.shape),)

    def encode(
        self, _spec: TensorSpec, values: NDArray[np.float32], _seed: int, /
    ) -> tuple[NDArray[Any], ...]:
        """The values themselves, not copied."""
        return (values,)

    def decode(self, _spec: TensorSpec, parts: Sequence[NDArray[Any]], /) -> NDArray[np.float32]:
        """The part itself, not copied."""
        return parts[0].astype(np.float32, copy=False)


MODE: Final[Codec] = Fp32()
