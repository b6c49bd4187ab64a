"""The ``Learner`` port over a quantised language model: data in, adapter in, delta out.

Composes what the neighbouring files do and decides nothing about training. Keeps nothing between
two calls but the run's announcement and the site's tokenised text; the base is the model pool's.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from participant.data import NOTHING_HELD_OUT, load_site_data
from participant.learner.auditor import Auditor, Sent
from participant.learner.evaluation import evaluate_held_out
from participant.learner.gradient import gradient_pass, sample_place
from participant.learner.memory import peak_bytes, reset_peak
from participant.learner.optimizer_state import save_optimizer
from participant.learner.port import (
    DELTA_FILE,
    STATE_FILE,
    Learned,
    Progress,
    Readiness,
    Rehearsal,
    steps_in_round,
)
from participant.learner.private_steps import begin_private, planned, rehearsed
from participant.learner.resuming import Resumable
from participant.learner.training import Beginning, RoundPlace, step_batches, train_round
from shared.adapters import kind_of
from shared.config import SitePrivacySection, canonical_json
from shared.errors import DecodeError, ModelError, NotAcceptedError, ProtocolError
from shared.log import get_logger
from shared.methods.averaging import get_averaging
from shared.protocol.manifest import LocalMetrics
from shared.seeds import derive_seed
from shared.tensors.arithmetic import difference
from shared.tensors.delta_file import DeltaHeader, write_delta
from shared.tensors.tensor_file import FileDigest, TensorFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from participant.checkpoints import Checkpoints
    from participant.data import SiteData
    from participant.learner.model_pool import ModelPool
    from participant.learner.training import TrainingResult
    from participant.model import LocalModel
    from participant.privacy import Budget
    from shared.config import DataSection, TrainingSection
    from shared.protocol.events import RoundStarted, RunAnnounced
    from shared.protocol.manifest import HeldOut, Manifest, TensorSpec
    from shared.tensors.residual import Feedback


REHEARSED_EXAMPLES = 16


class TorchLearner:
    """Trains and evaluates for ``site``. ``folder``: what the paths of its file are relative to."""

    def __init__(
        self,
        site: str,
        data: DataSection,
        folder: Path,
        models: ModelPool,
        privacy: SitePrivacySection | None = None,
    ) -> None:
        self._site = site
        self._config = data
        self._folder = folder
        self._models = models
        self._auditor = Auditor(site, privacy or SitePrivacySection(), folder)
        self._announced: dict[str, RunAnnounced] = {}
        self._bases: dict[str, Path] = {}
        self._budget: Budget | None = None
        self._tokenised: tuple[tuple[str, int, int], SiteData] | None = None

    def take_bases(self, run: str, path: Path) -> None:
        """See the port."""
        self._bases[run] = path

    def take_budget(self, budget: Budget) -> None:
        """See the port."""
        self._budget = budget

    def prepare(self, announced: RunAnnounced, report: Callable[[Progress], None]) -> Readiness:
        """Load base model and text. Raises NotAcceptedError for another base than the run's."""
        report(Progress("load", 0, 2))
        with self._borrowed(announced) as model:
            report(Progress("load", 1, 2))
            wanted = announced.base.fingerprint
            if wanted is not None and wanted != model.fingerprint:
                raise NotAcceptedError(
                    f"base.fingerprint: expected {wanted}, got {model.fingerprint} for "
                    f"{announced.base.model}; give this site the same model files and tokenizer"
                )
            mode = get_averaging(announced.averaging)
            if mode.merges:
                model.check_merges()
            self._auditor.check(makes_bases=mode.makes_bases)
            data = self._data(model, announced.training)
            if not data.held_out:
                get_logger().warning("data.not_held_out", site=self._site, hint=NOTHING_HELD_OUT)
            ready = Readiness(
                model.manifest(),
                model.fingerprint,
                model.numerics(),
                examples=len(data.train),
                distinct=len(set(data.train)),
                exposed=model.exposed,
                bases=model.bases.told() if model.bases else None,
                base_parameters=model.base_elements,
                records=data.records,
                privacy=planned(announced, data) if _by_record(announced) else None,
            )
        self._announced[announced.run] = announced
        report(Progress("load", 2, 2))
        return ready

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
        """See the port. Raises ProtocolError for a run that was not prepared in this process."""
        announced = self._prepared(task.run)
        clock = _Clock()
        place = RoundPlace(self._site, task.round, task.seed, task.progress_from, task.progress_to)
        sample = place
        kept = state if task.training.optimizer_state == "keep" else None
        mode, private = get_averaging(task.averaging), None
        with self._opened(announced, source) as (model, adapter):
            data = self._data(model, task.training)
            trained = mode.trained_in(model.manifest(), task.round)
            only = [spec.name for spec in trained.tensors]
            basis = _basis(announced, model, data)
            audited = self._auditor.is_on and not mode.makes_bases
            last = steps_in_round(len(data.train), task.training) if audited else None
            course = Resumable(model, only, checkpoints, basis, kept, last)
            read = _reader(adapter, announced)
            is_new = bool(data.held_out) and not (course.is_evaluated or mode.makes_bases)
            if is_new and task.round > 1:
                which, settings = (task.run, task.source_sha), task.training
                self._auditor.audit_global(which, model, data, read, settings, should_stop, report)
            model.load_adapter(read)
            clock.lap("load")
            if is_new:
                course.evaluated(evaluate_held_out(model, data.held_out, should_stop, report))
            clock.lap("evaluate")
            if mode.makes_bases:
                sample, read = sample_place(place, announced.config_digest), _zeros(model)
                result = gradient_pass(
                    model, data.train, task.training, place, sample, only, should_stop, report
                )
            else:
                if _by_record(task) or _by_record(announced):
                    ground = f"{basis} {course.state}"
                    private = begin_private(task, announced, self._site, data, ground, self._budget)
                result = train_round(
                    model,
                    data.train if private is None else private.examples,
                    task.training,
                    place,
                    begin=replace(course.begin(task, read), private=private),
                    should_stop=should_stop,
                    report=report,
                    keep=course.keep,
                )
            clock.lap("train")
            clock.seconds["train"] = round(course.seconds(), 3)
            delta = self._write_delta(task, trained, model, read, folder / DELTA_FILE, feedback)
            if result.optimizer is not None and task.training.optimizer_state == "keep":
                kinds = {name: model.parameters[name] for name in only}
                save_optimizer(result.optimizer, kinds, folder / STATE_FILE)
            clock.lap("encode")
            audit = None
            if audited:
                sent = Sent(folder / DELTA_FILE, trained, read)
                spent = private.spent if private is not None else None
                claim = spent.epsilon if spent is not None else None
                audit = self._auditor.audit(task, model, data, sent, should_stop, report, claim)
                clock.lap("audit")
        learned = Learned(
            delta=delta,
            examples=len(data.train),
            tokens=result.tokens,
            metrics=_metrics(result, data, course.held_out, clock.seconds),
            state=course.state,
            distinct=_distinct(data, task.training, sample),
            audit=audit,
        )
        return learned if private is None else private.veiled(learned)

    def evaluate(
        self, run: str, source: Path, report: Callable[[Progress], None]
    ) -> HeldOut | None:
        """See the port. Raises ProtocolError for a run that was not prepared."""
        announced = self._prepared(run)
        with self._opened(announced, source) as (model, adapter):
            data = self._data(model, announced.training)
            if not data.held_out:
                return None
            read, settings = _reader(adapter, announced), announced.training
            model.load_adapter(read)
            found = evaluate_held_out(model, data.held_out, lambda: False, report)
            which = (run, "result")
            self._auditor.audit_global(which, model, data, read, settings, lambda: False, report)
            return found

    def rehearse(self, announced: RunAnnounced, report: Callable[[Progress], None]) -> Rehearsal:
        """Prepare, train two steps and measure a little held-out text, and keep nothing of it."""
        reset_peak()
        self.prepare(announced, report)
        at: list[float] = []
        with self._borrowed(announced) as model:
            data = self._data(model, announced.training)
            private = rehearsed(announced, data) if _by_record(announced) else None
            train_round(
                model,
                data.train if private is None else private.examples,
                announced.training.model_copy(update={"local_steps": 2, "local_epochs": None}),
                RoundPlace(self._site, 1, 0, 0.0, 1.0),
                begin=Beginning(private=private),
                should_stop=lambda: False,
                report=lambda _: at.append(time.monotonic()),
            )
            seconds = 0.0
            if data.held_out:
                sample = data.held_out[:REHEARSED_EXAMPLES]
                began = time.monotonic()
                evaluate_held_out(model, sample, lambda: False, report)
                seconds = (time.monotonic() - began) * len(data.held_out) / len(sample)
        steps = steps_in_round(len(data.train), announced.training)
        return Rehearsal(
            examples=len(data.train),
            held_out=len(data.held_out),
            tokens=sum(len(example.input_ids) for example in data.train),
            steps=steps,
            step_seconds=at[1] - at[0],
            round_seconds=steps * (at[1] - at[0]) + seconds,
            memory=peak_bytes(),
        )

    def _prepared(self, run: str) -> RunAnnounced:
        if run not in self._announced:
            raise ProtocolError(
                f"run {run}: expected RunAnnounced first, got none; "
                "the coordinator announces the run again when this site comes online"
            )
        return self._announced[run]

    def _borrowed(self, run: RunAnnounced) -> contextlib.AbstractContextManager[LocalModel]:
        # What a run under this name had before is of no use to one that finds its own.
        bases = self._bases.get(run.run) if run.lora.bases_sha else None
        return self._models.borrow(run.base, run.lora, run.training.cpu_threads, bases)

    @contextlib.contextmanager
    def _opened(self, run: RunAnnounced, source: Path) -> Iterator[tuple[LocalModel, TensorFile]]:
        """The base with past rounds merged, if the mode does that, and the adapter's file."""
        with self._borrowed(run) as model, _adapter(source) as adapter:
            past: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if get_averaging(run.averaging).merges:
                kind, rank = kind_of(run.lora), kind_of(run.lora).rank(run.lora)
                past = model.merged(lambda name: kind.beyond(name, adapter.read(name), rank))
            with past:
                yield model, adapter

    def _data(self, model: LocalModel, settings: TrainingSection) -> SiteData:
        """The site's text as tokens, made again only for another tokenizer or other limits."""
        key = (model.fingerprint, settings.max_prompt_tokens, settings.max_answer_tokens)
        if self._tokenised is None or self._tokenised[0] != key:
            data = load_site_data(self._config, self._folder, model.tokenizer, key[1], key[2])
            data = self._auditor.with_canaries(data, model, settings)
            self._tokenised = (key, data)
        return self._tokenised[1]

    def _write_delta(
        self,
        task: RoundStarted,
        trained: Manifest,
        model: LocalModel,
        source: Callable[[str], NDArray[Any]],
        path: Path,
        feedback: Feedback | None,
    ) -> FileDigest:
        """D_i(t) = theta_i(t) - A(t) (Algorithm 2), one tensor in memory at a time.

        ``source``: A(t); zeros where ``model`` holds a gradient.
        """

        def values(spec: TensorSpec) -> NDArray[np.float32]:
            return difference(model.read(spec.name), source(spec.name))

        header = DeltaHeader.of(
            task.codec,
            run=task.run,
            number=task.round,
            site=self._site,
            source_sha=task.source_sha,
        )
        seed = derive_seed(task.seed, self._site, task.round, "codec")
        return write_delta(
            path, trained, task.codec, header, values, seed, feedback, packed=task.packed
        )


def _by_record(asked: RunAnnounced | RoundStarted) -> bool:
    """Whether its steps have noise; a site that is protected as a whole gets it afterwards."""
    return asked.privacy is not None and not asked.privacy.of_sites


class _Clock:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now


@contextlib.contextmanager
def _adapter(path: Path) -> Iterator[TensorFile]:
    """An adapter file, open. Raises ModelError if it is not one that can be read."""
    try:
        file = TensorFile(path)
    except (OSError, DecodeError) as error:
        raise ModelError(f"adapter {path.name}: cannot be read: {error}; fetch it again") from error
    with file:
        yield file


def _reader(adapter: TensorFile, announced: RunAnnounced) -> Callable[[str], NDArray[Any]]:
    """The run's adapter, tensor by tensor, of this site's rank."""
    kind, rank = kind_of(announced.lora), kind_of(announced.lora).rank(announced.lora)
    return lambda name: kind.leading(name, adapter.read(name), rank)


def _zeros(model: LocalModel) -> Callable[[str], NDArray[Any]]:
    return lambda name: np.zeros(tuple(model.parameters[name].shape), np.float32)


def _basis(announced: RunAnnounced, model: LocalModel, data: SiteData) -> str:
    """Digest of what a training's bytes depend on beside its task: base, adapter, machine, text."""
    parts = {
        "fingerprint": model.fingerprint,
        "lora": announced.lora.model_dump(mode="json"),
        "numerics": model.numerics().model_dump(mode="json"),
        "data": data.digest,
    }
    return hashlib.sha256(canonical_json(parts)).hexdigest()


def _distinct(data: SiteData, settings: TrainingSection, place: RoundPlace) -> int:
    """How many different examples a round's steps see; copies of one are one."""
    batches = step_batches(len(data.train), settings, place)
    return len({data.train[index] for batch in batches for index in batch})


def _metrics(
    result: TrainingResult, data: SiteData, held_out: HeldOut | None, seconds: dict[str, float]
) -> LocalMetrics:
    return LocalMetrics(
        steps=result.steps,
        train_nll=result.train_nll,
        first_step_nll=result.first_step_nll,
        last_step_nll=result.last_step_nll,
        mean_grad_norm=result.mean_grad_norm,
        truncated_examples=data.truncated,
        dropped_examples=data.dropped,
        held_out=held_out,
        seconds=seconds,
    )
