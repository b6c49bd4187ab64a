"""FedAvg on the adapter's weights, from the very trainings of a GradualDiff-Fed run.

The paper's rule adds the mean difference to the global adapter; FedAvg (arXiv:1602.05629) takes
the mean of the participants' weights. Both are the same up to rounding:
A + mean(theta_i - A) = mean(theta_i). This computes the second from the first one's deltas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shared import topology
from shared.tensors.delta_file import DeltaFile
from shared.tensors.tensor_file import ADAPTER_METADATA, TensorFile, TensorLayout, write_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from coordinator.history import History
    from shared.stores.port import ObjectStore


def average_weights(history: History, store: ObjectStore, target: Path, scratch: Path) -> float:
    """Write FedAvg's last adapter to ``target``; the largest difference from the run's elements.

    Round by round: theta_i = fp32(A + D_i), then fp32 of the fp64 mean of the theta_i, each round
    from the adapter that its participants were given. The difference is over all rounds.
    """
    genesis = history.genesis
    assert genesis is not None
    manifest = genesis.manifest
    layouts = [TensorLayout(spec.name, "F32", spec.shape) for spec in manifest.tensors]
    largest = 0.0
    source = _adapter(history.run, genesis.adapter_sha, store, scratch / "source")
    for number in range(1, history.last_closed + 1):
        closing, closed = history.round(number).closing, history.round(number).closed
        assert closing is not None
        assert closed is not None
        files = []
        for item in closing.inputs:
            path = scratch / f"delta-{item.site}"
            path.unlink(missing_ok=True)
            key = topology.delta_key(history.run, item.from_round, item.site, item.sha)
            store.fetch_file(key, path)
            files.append(DeltaFile(path, manifest))
        result = _adapter(history.run, closed.adapter_sha, store, scratch / "result")
        with TensorFile(source) as before, TensorFile(result) as after:

            def means(
                before: TensorFile = before, files: list[DeltaFile] = files
            ) -> Iterator[NDArray[np.float32]]:
                for spec in manifest.tensors:
                    start = before.read(spec.name)
                    local = [np.add(start, file.read(spec)) for file in files]
                    yield np.asarray(np.mean(local, axis=0, dtype=np.float64), np.float32)

            write_tensors(target, layouts, means(), ADAPTER_METADATA)
            with TensorFile(target) as mine:
                for spec in manifest.tensors:
                    gap = np.abs(mine.read(spec.name) - after.read(spec.name))
                    largest = max(largest, float(gap.max()))
        for file in files:
            file.close()
        result.replace(source)
    for path in scratch.glob("delta-*"):
        path.unlink()
    source.unlink()
    return largest


def _adapter(run: str, sha: str, store: ObjectStore, path: Path) -> Path:
    path.unlink(missing_ok=True)
    store.fetch_file(topology.adapter_key(run, sha), path)
    return path
