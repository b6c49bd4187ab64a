"""A round's step of the server's optimiser (``shared/methods/server_optimizers``) and its state.

One thing is added to all of them: a tensor whose mean delta is zero throughout was not trained in
this round. It does not move, and its state stays as it is: nothing was learnt that a momentum could
be carried on with.

State is fp64, like every sum of a round, so a file holds exactly what the next round goes on with,
and the square of any delta that is taken fits. A tensor of the state has the name of the adapter's
tensor and one row for each moment.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from shared import modes
from shared.errors import LedgerError
from shared.methods.server_optimizers import get_server_optimizer
from shared.tensors.arithmetic import BLOCK, blocks, significant, squared_norm
from shared.tensors.tensor_file import FileDigest, TensorFile, TensorLayout, TensorWriter

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.config import FederationConfig, ServerSection
    from shared.protocol.manifest import Manifest, TensorSpec
    from shared.protocol.records import OpenedRecord
    from shared.tensors.stopwatch import Stopwatch

    Values = NDArray[np.float64]

METADATA_KEY: Final = "gradualdiff_server_state"


@dataclass(frozen=True)
class StateFiles:
    """Where the state comes from and goes to. ``before`` None: there was no round yet."""

    before: Path | None
    after: Path


@dataclass(frozen=True)
class Stepped:
    """What came of it. ``norm``: L2 of the step over all tensors, 9 significant digits."""

    state: FileDigest
    norm: float


class ServerStep:
    """One round's step, tensor by tensor. As a context: left without ``finish``, no file stays.

    ``step`` may run in several threads at once, one tensor each; ``keep`` in one, for every tensor
    in the manifest's order. The states under way are all there is in memory. Raises LedgerError
    for a state that is not one of this optimiser and these tensors.
    """

    def __init__(
        self, section: ServerSection, manifest: Manifest, files: StateFiles, watch: Stopwatch
    ) -> None:
        self._section = section
        self._optimizer = get_server_optimizer(section.optimizer)
        self._rows = self._optimizer.rows
        self._watch = watch
        layouts = [
            TensorLayout(spec.name, "F64", (self._rows, *spec.shape)) for spec in manifest.tensors
        ]
        metadata: dict[str, str] = {METADATA_KEY: section.optimizer}
        self._largest = self._rows * max(spec.elements for spec in manifest.tensors)
        self._lock = threading.Lock()
        self._free: deque[Values] = deque()
        self._done: dict[str, tuple[Values, Values]] = {}
        self._squares: list[float] = []
        with contextlib.ExitStack() as stack:
            self._before: TensorFile | None = None
            if files.before is not None:
                self._before = stack.enter_context(TensorFile(files.before))
                _check_state(self._before, layouts, metadata)
            self._after = TensorWriter(files.after, layouts, metadata, watch)
            stack.callback(self._after.close)
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def step(self, spec: TensorSpec, delta: Values) -> None:
        """Turn a tensor's mean delta, flat, into what the adapter takes, in place."""
        buffer = self._buffer()
        state = buffer[: self._rows * spec.elements].reshape(self._rows, spec.elements)
        with (
            self._watch.phase("state"),
            modes.at_work("server_optimizers", self._section.optimizer),
        ):
            self._load(spec, state)
            if delta.any():
                scratch = np.empty((2, min(BLOCK, delta.size)), np.float64)
                for at in blocks(delta.size):
                    room = scratch[:, : at.stop - at.start]
                    self._optimizer.step(self._section, delta[at], state[:, at], room)
            square = squared_norm(delta)
        with self._lock:
            self._squares.append(square)
            self._done[spec.name] = (buffer, state)

    def keep(self, spec: TensorSpec) -> None:
        """Write the state of a tensor that was stepped."""
        with self._lock:
            buffer, state = self._done.pop(spec.name)
        self._after.add(state.reshape(self._rows, *spec.shape))
        with self._lock:
            self._free.append(buffer)

    def finish(self) -> Stepped:
        """The state's file is whole, once every tensor was kept."""
        return Stepped(self._after.finish(), significant(math.sqrt(math.fsum(self._squares))))

    def _buffer(self) -> Values:
        """Used again and again: fresh memory for every tensor costs more than the arithmetic."""
        with self._lock:
            if self._free:
                return self._free.pop()
        return np.empty(self._largest, np.float64)

    def _load(self, spec: TensorSpec, state: Values) -> None:
        if self._before is None:
            self._optimizer.begin(self._section, state)
            return
        np.copyto(state, self._before.read(spec.name).reshape(state.shape))
        self._before.release(spec.name)


def open_step(
    section: ServerSection, manifest: Manifest, files: StateFiles | None, watch: Stopwatch
) -> ServerStep | None:
    """The step of a round; None where the mean delta is added as it is.

    Raises ValueError if one that has a state is given no place for it.
    """
    if not get_server_optimizer(section.optimizer).rows:
        return None
    if files is None:
        raise ValueError(f"state: expected a place for the state of {section.optimizer}, got none")
    return ServerStep(section, manifest, files, watch)


def wants_more_than_zeros(config: FederationConfig, opened: OpenedRecord) -> str | None:
    """The setting by which a delta of zeros is refused in this round; None if it is taken.

    A site whose delta is zero throughout did not train. Added as it is, that is a vote for no
    change; an optimiser that scales each value by its past would take it for one about every
    value, and shrink its estimates. Only at the very end of a schedule that falls to 0 may a
    training of one step honestly come to nothing.
    """
    falls_to_zero = config.training.schedule != "constant" and opened.progress_to >= 1.0
    if not get_server_optimizer(config.server.optimizer).rows or falls_to_zero:
        return None
    return f'server.optimizer = "{config.server.optimizer}"'


def _check_state(file: TensorFile, layouts: list[TensorLayout], metadata: dict[str, str]) -> None:
    wanted = {layout.name: layout for layout in layouts}
    if file.metadata != metadata or file.layouts != wanted:
        raise LedgerError(
            f"server state: expected {metadata[METADATA_KEY]} over {len(wanted)} tensors of the "
            f"run, got {file.metadata} over {len(file.layouts)}; it is of other settings"
        )
