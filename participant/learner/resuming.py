"""A round's training as its checkpoints see it: what to begin with, and what to keep of it.

The torch side of ``participant/checkpoints.py``: adapter and optimiser go out to files and come
back in. Data order, dropout and learning rate are functions of the step, so there is no more to it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from participant.checkpoints import Tensors, TrainingProgress
from participant.learner.optimizer_state import save_optimizer
from participant.learner.training import Beginning, StepsDone
from shared.log import get_logger
from shared.tensors.tensor_file import (
    ADAPTER_METADATA,
    FileDigest,
    TensorFile,
    TensorLayout,
    write_tensors,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from participant.checkpoints import Checkpoints
    from participant.model import LocalModel
    from shared.protocol.events import RoundStarted
    from shared.protocol.manifest import HeldOut


class Resumable:
    """One round in ``model``, resumed from its newest checkpoint or begun.

    ``only``: the tensors that are trained. ``basis``: digest of what the bytes depend on beside the
    task. ``kept``: the optimiser state to begin with, if any. ``last``: a step after which one is
    kept in any case, since long work follows it. ``is_evaluated``: ``held_out`` is
    known from before (None: no such text).
    """

    def __init__(
        self,
        model: LocalModel,
        only: Collection[str],
        checkpoints: Checkpoints,
        basis: str,
        kept: Path | None,
        last: int | None = None,
    ) -> None:
        self._model = model
        self._last = last
        self._trained = {name: p for name, p in model.parameters.items() if name in only}
        self._checkpoints = checkpoints
        self._found = found = checkpoints.newest(basis)
        self._began = time.monotonic()
        self._saved = found.progress.step if found else 0
        self.is_evaluated = found is not None
        self.held_out: HeldOut | None = found.progress.held_out if found else None
        self.state: Literal["fresh", "kept"] = "fresh" if kept is None else "kept"
        self._begin = Beginning(kept, only=only)
        if found is not None and found.progress.step:
            was = found.progress
            losses = list(zip(was.nll, was.tokens, strict=True))
            self.state = was.state
            self._begin = Beginning(
                found.optimizer, StepsDone(losses, list(was.norms), was.seconds), only
            )

    def evaluated(self, held_out: HeldOut) -> None:
        """Note the held-out loss, and that it need not be measured again."""
        self.held_out = held_out
        self._checkpoints.save(self._progress(StepsDone()))

    def begin(self, task: RoundStarted, source: Callable[[str], NDArray[Any]]) -> Beginning:
        """Put the adapter to resume from into the model; where training begins."""
        if self._begin.done.count and self._found is not None:
            with TensorFile(self._found.adapter) as adapter:
                self._model.load_adapter(adapter.read)
            step = self._begin.done.count
            get_logger().info("training.resumed", run=task.run, round=task.round, step=step)
        else:
            self._model.load_adapter(source)
        self._began = time.monotonic()
        return replace(self._begin, source=source)

    def keep(self, done: StepsDone, optimizer: torch.optim.AdamW, stopped: bool) -> None:
        """After a step: write a checkpoint if one is due, or if there will be no other chance."""
        model = self._model
        is_wanted = stopped or done.count == self._last or self._checkpoints.due()
        if done.count == self._saved or not is_wanted:
            return
        specs = model.manifest().tensors
        layouts = [TensorLayout(spec.name, "F32", spec.shape) for spec in specs]

        def write_adapter(path: Path) -> FileDigest:
            return write_tensors(
                path, layouts, (model.read(spec.name) for spec in specs), ADAPTER_METADATA
            )

        def write_optimizer(path: Path) -> FileDigest:
            return save_optimizer(optimizer, self._trained, path)

        if self._checkpoints.save(self._progress(done), Tensors(write_adapter, write_optimizer)):
            self._saved = done.count

    def seconds(self) -> float:
        """Spent on this round's steps, in earlier processes too."""
        return self._begin.done.seconds + time.monotonic() - self._began

    def _progress(self, done: StepsDone) -> TrainingProgress:
        return TrainingProgress(
            step=done.count,
            state=self.state,
            held_out=self.held_out,
            nll=tuple(nll for nll, _ in done.losses),
            tokens=tuple(tokens for _, tokens in done.losses),
            norms=tuple(done.norms),
            seconds=round(self.seconds(), 3) if done.count else 0.0,
        )
