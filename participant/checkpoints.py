"""Where the training of one round stands, on the site's own disk, so that a kill loses little.

A checkpoint is a folder made under another name, synced and renamed: it is whole or not there. What
is found at a start is trusted only if it belongs to exactly this round on exactly this ground and
every byte of it is as it was written; otherwise the one before is taken, or none, and the round is
trained from its beginning, to the same bytes. No file here can run code: JSON and safetensors.

    <workspace>/<run>/checkpoints/<round>-<source sha, 12 digits>/step-<n>/
        progress.json, adapter.safetensors, optimizer.safetensors (no tensors at step 0)
"""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from shared.config import Name, Sha256, canonical_json
from shared.disk.durable_files import make_directories
from shared.disk.files import digest_file, sync_path
from shared.failpoints import failpoint
from shared.log import get_logger
from shared.protocol.manifest import HeldOut, Schema

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shared.protocol.events import RoundStarted
    from shared.tensors.tensor_file import FileDigest

ADAPTER_FILE = "adapter.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
PROGRESS_FILE = "progress.json"
MAKING = ".making"
DEFAULT_SECONDS = 60.0

Count = Annotated[int, Field(ge=0)]


class CheckpointKey(Schema):
    """What a checkpoint is of. ``settings``: digest of all in the task that training reads.

    ``basis``: the learner's digest of everything else that its bytes depend on.
    """

    run: Name
    round: Annotated[int, Field(ge=1)]
    source_sha: Sha256
    site: Name
    seed: int
    settings: Sha256
    basis: Sha256


class TrainingProgress(Schema):
    """How far a round is after ``step`` optimiser steps, tensors apart.

    ``nll``: summed nats of each step's batch before its update, ``tokens``: its answer tokens,
    ``norms``: its gradient norm. ``seconds``: spent in these steps. ``held_out``: of the round's
    source; None where the site holds no text out.
    """

    step: Count = 0
    state: Literal["fresh", "kept"] = "fresh"
    held_out: HeldOut | None = None
    nll: tuple[float, ...] = ()
    tokens: tuple[Count, ...] = ()
    norms: tuple[float, ...] = ()
    seconds: float = 0.0

    @model_validator(mode="after")
    def _one_entry_a_step(self) -> Self:
        if {len(self.nll), len(self.tokens), len(self.norms)} != {self.step}:
            raise ValueError(f"expected {self.step} entries each in nll, tokens and norms")
        return self


class WrittenFile(Schema):
    """A file of a checkpoint; ``size`` in bytes."""

    sha256: Sha256
    size: Count


class Record(Schema):
    """``progress.json``. Without files: nothing but the evaluation is done.

    ``digest``: sha256 of the canonical JSON of all the rest.
    """

    key: CheckpointKey
    progress: TrainingProgress
    files: dict[str, WrittenFile]
    digest: str = ""

    @property
    def true_digest(self) -> str:
        """What ``digest`` must be."""
        return _digest(self.model_dump(mode="json", exclude={"digest"}))

    @model_validator(mode="after")
    def _tensors_after_the_first_step(self) -> Self:
        wanted = {ADAPTER_FILE, OPTIMIZER_FILE} if self.progress.step else set()
        if set(self.files) != wanted:
            raise ValueError(f"expected the files {sorted(wanted)}, got {sorted(self.files)}")
        return self


@dataclass(frozen=True)
class Tensors:
    """Writes what a checkpoint holds beside its record: each makes the file it is given."""

    adapter: Callable[[Path], FileDigest]
    optimizer: Callable[[Path], FileDigest]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole and of this round. The files are there if ``progress.step``."""

    folder: Path
    progress: TrainingProgress

    @property
    def adapter(self) -> Path:
        """The adapter as trained so far, float32."""
        return self.folder / ADAPTER_FILE

    @property
    def optimizer(self) -> Path:
        """AdamW's state, see ``participant/learner/optimizer_state.py``."""
        return self.folder / OPTIMIZER_FILE


class Checkpoints:
    """The checkpoints of one site's training in one round.

    ``newest`` comes first: it says on what ground the training stands. ``every_seconds``: how often
    one is due, counted from the end of the last. Two are kept: one may turn out damaged.
    """

    def __init__(self, folder: Path, task: RoundStarted, site: str, every_seconds: float) -> None:
        self._folder = folder
        self._task = task
        self._site = site
        self._every_seconds = every_seconds
        self._saved_at = time.monotonic()
        self._key: CheckpointKey | None = None
        self._good: Path | None = None  # the newest that is known to be whole

    def due(self) -> bool:
        """Whether it is time for the next one."""
        return time.monotonic() - self._saved_at >= self._every_seconds

    def newest(self, basis: str) -> Checkpoint | None:
        """The newest that is whole and of this round on this ground (a sha256)."""
        self._key = _key(self._task, self._site, basis)
        self._saved_at = time.monotonic()
        for step, folder in sorted(self._steps().items(), reverse=True):
            try:
                progress = _read(folder, self._key, step)
            except (OSError, ValueError) as error:  # pydantic's is a ValueError
                reason = _first_line(error)
                get_logger().warning("checkpoint.ignored", path=str(folder), reason=reason)
                continue
            self._good = folder
            return Checkpoint(folder, progress)
        return None

    def save(self, progress: TrainingProgress, tensors: Tensors | None = None) -> bool:
        """Write one durably and drop what is older than the one before it; whether that worked.

        A disk that is full or fails ends no training: it is said in a log line.
        """
        started = time.monotonic()
        where = {"run": self._task.run, "round": self._task.round, "step": progress.step}
        try:
            self._write(progress, tensors)
        except OSError as error:
            shutil.rmtree(self._folder / MAKING, ignore_errors=True)
            get_logger().warning("checkpoint.failed", **where, reason=str(error))
            return False
        finally:
            self._saved_at = time.monotonic()
        seconds = round(self._saved_at - started, 3)
        get_logger().debug("checkpoint.saved", **where, seconds=seconds)
        return True

    def _write(self, progress: TrainingProgress, tensors: Tensors | None) -> None:
        assert self._key is not None  # newest() came first
        make_directories(self._folder)
        making = self._folder / MAKING
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        files = {}
        if tensors is not None:
            failpoint("checkpoint.begun")
            files[ADAPTER_FILE] = _written(tensors.adapter(making / ADAPTER_FILE))
            failpoint("checkpoint.adapter_written")
            files[OPTIMIZER_FILE] = _written(tensors.optimizer(making / OPTIMIZER_FILE))
            failpoint("checkpoint.optimizer_written")
        record = Record(key=self._key, progress=progress, files=files)
        record = record.model_copy(update={"digest": record.true_digest})
        (making / PROGRESS_FILE).write_bytes(canonical_json(record.model_dump(mode="json")))
        sync_path(making / PROGRESS_FILE)
        sync_path(making)
        failpoint("checkpoint.progress_written")
        target = self._folder / f"step-{progress.step:08d}"
        shutil.rmtree(target, ignore_errors=True)  # there only if it could not be used
        making.rename(target)
        failpoint("checkpoint.renamed")
        sync_path(self._folder)
        failpoint("checkpoint.synced")
        for folder in self._steps().values():
            if folder not in (target, self._good):
                shutil.rmtree(folder, ignore_errors=True)
        failpoint("checkpoint.old_removed")
        self._good = target

    def _steps(self) -> dict[int, Path]:
        """The folders by step; names that are not ours are left alone."""
        if not self._folder.is_dir():
            return {}
        named = ((path.name.removeprefix("step-"), path) for path in self._folder.glob("step-*"))
        return {int(digits): path for digits, path in named if digits.isdigit()}


def checkpoint_folder_name(round_number: int, source_sha: str) -> str:
    """One folder for each round and adapter it starts from; begins with the round's number."""
    return f"{round_number:05d}-{source_sha[:12]}"


def settings_digest(task: RoundStarted) -> str:
    """sha256 of all in a task that its training reads, beside round, source and seed."""
    settings = {
        "training": task.training.model_dump(mode="json"),
        "progress": [task.progress_from, task.progress_to],
        "averaging": task.averaging,
        # Which state the round began from, where it began from any.
        "state": task.last_counted if task.training.optimizer_state == "keep" else None,
    }
    if task.privacy is not None:
        settings["privacy"] = task.privacy.model_dump(mode="json")
    return _digest(settings)


def _key(task: RoundStarted, site: str, basis: str) -> CheckpointKey:
    return CheckpointKey(
        run=task.run,
        round=task.round,
        source_sha=task.source_sha,
        site=site,
        seed=task.seed,
        settings=settings_digest(task),
        basis=basis,
    )


def _read(folder: Path, wanted: CheckpointKey, step: int) -> TrainingProgress:
    """Raises OSError, ValidationError or ValueError for whatever cannot be resumed from."""
    record = Record.model_validate_json((folder / PROGRESS_FILE).read_bytes())
    if record.digest != record.true_digest:
        raise ValueError(f"{PROGRESS_FILE} is not as it was written")
    if record.key != wanted:
        given = record.key.model_dump()
        other = [key for key, value in wanted.model_dump().items() if given[key] != value]
        raise ValueError(f"it belongs to something else: {', '.join(other)} differ")
    if record.progress.step != step:
        raise ValueError(f"it holds step {record.progress.step}")
    for name, file in record.files.items():
        if digest_file(folder / name) != (file.sha256, file.size):
            raise ValueError(f"{name} is not as it was written")
    return record.progress


def _digest(values: object) -> str:
    return hashlib.sha256(canonical_json(values)).hexdigest()


def _written(digest: FileDigest) -> WrittenFile:
    return WrittenFile(sha256=digest.sha256, size=digest.size)


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return f"{PROGRESS_FILE} is torn or altered: {error.errors()[0]['msg']}"
    return str(error)
