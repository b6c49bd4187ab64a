"""The ``Learner`` port: what the participant's handlers need of whatever trains.

The real one (``torch_learner.py``) holds a quantised language model; tests use a numpy one. A
learner keeps nothing between two calls but the frozen base: the adapter comes in as a file and the
delta goes out as a file, so several sites may share one learner's base in one process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from participant.audit.report import AuditReport
    from participant.checkpoints import Checkpoints
    from participant.privacy import Budget, Mechanism
    from shared.config import TrainingSection
    from shared.protocol.events import RoundStarted, RunAnnounced
    from shared.protocol.manifest import BasesFound, HeldOut, LocalMetrics, Manifest, Numerics
    from shared.protocol.privacy import PrivacySpent
    from shared.tensors.residual import Feedback
    from shared.tensors.tensor_file import FileDigest

DELTA_FILE = "delta.safetensors"
STATE_FILE = "optimizer.safetensors"
RESIDUAL_FILE = "residual.safetensors"


@dataclass(frozen=True)
class Readiness:
    """What a site finds when it is ready for a run; it tells all but ``distinct`` and ``exposed``.

    ``distinct``: different examples among them, None for all. ``exposed``: layers with an adapter
    that are no layers of the model's blocks, or share a weight with embeddings or head.
    ``records``: sha256 of each different example, as text. ``privacy``: the noisy steps of a run
    that has any.
    ``base_parameters``: numbers in the base model, packed ones as what they stand for.
    """

    manifest: Manifest
    fingerprint: str
    numerics: Numerics
    examples: int
    distinct: int | None = None
    exposed: tuple[str, ...] = ()
    bases: BasesFound | None = None
    base_parameters: int | None = None
    records: frozenset[str] = frozenset()
    privacy: Mechanism | None = None


@dataclass(frozen=True)
class Learned:
    """One local training. The files lie in the folder that was given to ``learn``.

    ``delta``: what ``write_delta`` said of its file. ``distinct``: different examples that the
    steps saw, None for as many as there are, or where nobody may know. ``audit``: None where the
    site makes none. ``privacy``: of a run that has any: what it cost.
    """

    delta: FileDigest
    examples: int
    tokens: int
    metrics: LocalMetrics
    state: Literal["fresh", "kept"]
    distinct: int | None = None
    privacy: PrivacySpent | None = None
    audit: AuditReport | None = None


@dataclass(frozen=True)
class Rehearsal:
    """What a round will take at a site. ``tokens``: of all its training examples, each once.

    ``steps``: in a round; ``step_seconds``: of the second of two, since the first one warms up.
    ``round_seconds``: all steps, and held-out loss as far as it was measured. ``memory``: the most
    bytes that the process needed, by kind.
    """

    examples: int
    held_out: int
    tokens: int
    steps: int
    step_seconds: float
    round_seconds: float
    memory: dict[str, int]


@dataclass(frozen=True)
class Progress:
    """Where a piece of work stands. ``tokens``: answer tokens trained on in this round so far.

    ``seconds_before``: what earlier processes spent on the part that is done.
    """

    activity: Literal["load", "evaluate", "train", "upload"]
    done: int
    total: int
    loss: float | None = None
    tokens: int = 0
    seconds_before: float = 0.0


def steps_in_round(count: int, settings: TrainingSection) -> int:
    """Optimiser steps for ``count`` examples: as set, or enough to see each once per epoch."""
    if settings.local_steps is not None:
        return settings.local_steps
    per_step = settings.batch_size * settings.gradient_accumulation
    return (settings.local_epochs or 1) * math.ceil(count / per_step)


class Learner(Protocol):
    """Trains and evaluates for one site. Raises DataError, ModelError, ConfigError."""

    def take_bases(self, run: str, path: Path) -> None:
        """The file of bases that a run's core adapter has; told before the run is prepared."""

    def take_budget(self, budget: Budget) -> None:
        """What a run with ``[privacy]`` spends of; told before a round of it is trained."""

    def prepare(self, announced: RunAnnounced, report: Callable[[Progress], None]) -> Readiness:
        """Load data and base model for this run; repeatable and cheap the second time."""

    def learn(
        self,
        task: RoundStarted,
        source: Path,
        state: Path | None,
        folder: Path,
        should_stop: Callable[[], bool],
        report: Callable[[Progress], None],
        checkpoints: Checkpoints,
        feedback: Feedback | None = None,
    ) -> Learned:
        """Evaluate ``source`` on held-out text, train from it, write the encoded delta.

        Writes ``DELTA_FILE`` into ``folder``, and ``STATE_FILE`` too where the run keeps optimiser
        state (``state`` is last counted round's file, None to start fresh). ``feedback`` is for
        ``write_delta``, which adds what earlier deltas left out. The bytes are a function of task,
        site name, data, base, numerics, state and residual alone, whether the training ran through
        or went on from ``checkpoints``. Raises InterruptedRunError when
        ``should_stop()`` turns true, checked between micro-batches.
        """

    def evaluate(
        self, run: str, source: Path, report: Callable[[Progress], None]
    ) -> HeldOut | None:
        """Held-out loss of an adapter file of ``run``; None where there is no held-out text."""
