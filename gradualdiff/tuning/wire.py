"""Both ways that an adapter goes in a round, as they change its values, and what they cost.

Up, a site: u = delta + e, z = decode(encode(u)), e = u - z where the codec has feedback. Down, the
coordinator (EF21-P, arXiv:2209.15218): c = decode(encode(x - w)), w += c, where x is the exact
adapter and w what every site holds. All is fp32 in memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared.protocol.manifest import Manifest
from shared.seeds import derive_seed
from shared.tensors.codecs import get_codec
from shared.tensors.delta_file import DeltaHeader, write_delta

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shared.protocol.manifest import TensorSpec

Values = dict[str, "NDArray[np.float32]"]


class Channel:
    """One direction between two ends: what is put in comes out as the codec leaves it.

    ``bytes``: of the parts of all tensors that went through since the last ``take_bytes``.
    """

    def __init__(self, manifest: Manifest, codec: str, *, feedback: bool) -> None:
        self._codec = get_codec(codec)
        self._manifest = manifest
        self._left: Values | None = {} if feedback else None
        self._envelope = _envelope(manifest, codec)
        self.sizes: list[int] = []

    def send(self, values: Values, seed: int) -> Values:
        """``values`` as they arrive; ``sizes`` gets the bytes of the file that carried them."""
        size, arrived = self._envelope, {}
        for spec in self._manifest.tensors:
            wanted = values[spec.name]
            if self._left is not None and spec.name in self._left:
                wanted = np.add(wanted, self._left[spec.name])
            parts = self._codec.encode(spec, wanted, derive_seed(seed, spec.name))
            size += sum(part.nbytes for part in parts)
            arrived[spec.name] = self._codec.decode(spec, parts)
            if self._left is not None:
                self._left[spec.name] = np.subtract(wanted, arrived[spec.name])
        self.sizes.append(size)
        return arrived


def _envelope(manifest: Manifest, codec: str) -> int:
    """Bytes of a delta file beside its tensors: names, shapes, places, whose it is."""
    header = DeltaHeader(
        run="tune",
        round=1,
        site="site",
        source_sha="0" * 64,
        codec=codec,
        codec_version=get_codec(codec).version,
    )
    sizes = []

    def zeros(spec: TensorSpec) -> NDArray[np.float32]:
        values = np.zeros(spec.shape, np.float32)
        sizes.extend(part.nbytes for part in get_codec(codec).encode(spec, values, 0))
        return values

    with tempfile.TemporaryDirectory(prefix="gradualdiff-tune-") as scratch:
        written = write_delta(Path(scratch) / "delta", manifest, codec, header, zeros, 0)
    return written.size - sum(sizes)
