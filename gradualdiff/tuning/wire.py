"""One direction in which an adapter's changes go: what a codec makes of them, and their bytes.

Up, from a site: u = delta + e, z = decode(encode(u)), e = u - z where there is feedback. Down, from
the coordinator (EF21-P, arXiv:2209.15218): c = decode(encode(x - w)), w += c, where x is the exact
adapter and w what every site holds; so x - w is what was left out, and needs no feedback. All is
fp32 in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shared.errors import DivergedError
from shared.seeds import derive_seed
from shared.tensors.arithmetic import is_finite
from shared.tensors.codecs import get_codec
from shared.tensors.delta_file import DeltaHeader
from shared.tensors.tensor_file import TensorLayout, header_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shared.protocol.manifest import Manifest

    Values = dict[str, NDArray[np.float32]]


class Channel:
    """What is put in at one end comes out at the other as the codec leaves it.

    ``sizes``: bytes of the file of everything that was sent, whose form is ``packed`` or not;
    ``header``: bytes in the last one that are no tensor's.
    """

    def __init__(
        self, manifest: Manifest, codec: str, *, feedback: bool = False, packed: bool = True
    ) -> None:
        self._codec = get_codec(codec)
        self._manifest = manifest
        self._feedback = feedback
        self._left: Values = {}
        self._packed = packed
        self._metadata = DeltaHeader.of(
            codec, run="tune", number=1, site="site", source_sha="0" * 64
        ).metadata
        self.header = 0
        self.sizes: list[int] = []

    def send(self, values: Values, seed: int) -> Values:
        """``values`` as they arrive. Raises DivergedError for values that are not finite."""
        layouts: list[TensorLayout] = []
        size, arrived = 0, {}
        for spec in self._manifest.tensors:
            wanted = values[spec.name]
            if spec.name in self._left:
                wanted = np.add(wanted, self._left[spec.name])
            if not is_finite(wanted):
                raise DivergedError(
                    f"tensor {spec.name!r}: expected finite values to send, got some that are not; "
                    "lower training.learning_rate"
                )
            parts = self._codec.encode(spec, wanted, derive_seed(seed, spec.name))
            size += sum(part.nbytes for part in parts)
            for layout, part in zip(self._codec.layout(spec), parts, strict=True):
                layouts.append(TensorLayout(layout.name, layout.dtype, part.shape))
            arrived[spec.name] = self._codec.decode(spec, parts)
            if self._feedback:
                self._left[spec.name] = np.subtract(wanted, arrived[spec.name])
        layouts.sort(key=lambda layout: layout.name)
        self.header = header_bytes(layouts, self._metadata, packed=self._packed)
        self.sizes.append(self.header + size)
        return arrived
