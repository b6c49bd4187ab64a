"""Makes a next adapter layer by layer in threads, for modes that join both factors at once."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

from shared.adapters import kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from shared.adapters import Layer
    from shared.protocol.manifest import Manifest

    Tensors = Mapping[str, NDArray[np.float32]]


def by_layer(
    manifest: Manifest, threads: int, make: Callable[[Layer], Tensors]
) -> Generator[NDArray[np.float32]]:
    """The tensors of ``manifest``, made of factors only, in its order.

    ``make``: both factors of one layer by name; ``threads`` of them are under way meanwhile.
    """
    waiting = iter(kind_of(manifest).layers(manifest))
    coming: deque[Future[Tensors]] = deque()
    ready: dict[str, NDArray[np.float32]] = {}
    with ThreadPoolExecutor(threads, "layers") as pool:
        for spec in manifest.tensors:
            while spec.name not in ready:
                for layer in islice(waiting, threads + 1 - len(coming)):
                    coming.append(pool.submit(make, layer))
                ready |= coming.popleft().result()
            yield ready.pop(spec.name)
