"""How a run begins: the first adapter, drawn from the run's seed.

Without base model and torch the manifest says what PEFT would have drawn, so that the first adapter
changes nothing. The coordinator draws it, and so does each site, instead of fetching it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from shared.errors import ConfigError
from shared.seeds import derive_seed
from shared.tensors.tensor_file import ADAPTER_METADATA, FileDigest, TensorLayout, write_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.protocol.manifest import Manifest, TensorSpec


def draw_adapter(manifest: Manifest, seed: int, target: Path) -> FileDigest:
    """Write A(1) to ``target``: every tensor fp32, a function of ``seed`` and its own name.

    Raises ConfigError for a Kaiming-uniform tensor with fewer than two dimensions.
    """
    layouts = [TensorLayout(spec.name, "F32", spec.shape) for spec in manifest.tensors]
    values = (_draw(spec, seed) for spec in manifest.tensors)
    return write_tensors(target, layouts, values, ADAPTER_METADATA)


def _draw(spec: TensorSpec, seed: int) -> NDArray[np.float32]:
    """One tensor of ``spec.shape``. ``kaiming_uniform``: U(-b, b), b = 1 / sqrt(fan_in).

    That is ``kaiming_uniform_(a=sqrt(5))`` of a weight (out, in, ...), as PEFT draws it: the gain
    sqrt(2 / (1 + a^2)) times sqrt(3 / fan_in) (He et al., arXiv:1502.01852). Made from Philox's raw
    words, whose stream numpy promises to keep, unlike ``Generator.uniform``'s.
    """
    if spec.init == "zeros":
        return np.zeros(spec.shape, np.float32)
    if spec.init == "ones":
        return np.ones(spec.shape, np.float32)
    if len(spec.shape) < 2:
        raise ConfigError(
            f"tensor {spec.name!r}: expected at least two dimensions for kaiming_uniform, "
            f"got shape {spec.shape}"
        )
    bound = 1 / math.sqrt(math.prod(spec.shape[1:]))
    words = np.random.Philox(key=derive_seed(seed, spec.name)).random_raw(spec.elements)
    uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return ((2 * uniform - 1) * bound).astype(np.float32).reshape(spec.shape)
