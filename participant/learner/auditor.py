"""A site's ``[privacy]`` at work beside its training: which text, which model, which delta.

The tests are in ``participant/audit``; here is what they are made on: the adapter with the delta as
it was written, so that what is measured is what leaves, codec and feedback included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from participant.audit.auditing import Audit
from participant.audit.canaries import Canaries, make_canaries
from participant.audit.patterns import Patterns, read_names
from participant.learner.port import Progress
from shared.errors import NotAcceptedError
from shared.log import get_logger
from shared.tensors.delta_file import DeltaFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from participant.audit.report import AuditReport
    from participant.data import SiteData
    from participant.model import LocalModel
    from shared.config import SitePrivacySection, TrainingSection
    from shared.protocol.events import RoundStarted
    from shared.protocol.manifest import Manifest, TensorSpec

    _Read = Callable[[str], NDArray[Any]]  # an adapter's tensor by its name, float32


@dataclass(frozen=True)
class Sent:
    """A delta on disk: its file, the tensors in it, and the adapter that it is added to.

    ``source(name)``: float32, of any of the adapter's tensors.
    """

    path: Path
    trained: Manifest
    source: _Read


class Auditor:
    """One site's. ``folder``: what ``names_file`` is relative to."""

    def __init__(self, site: str, settings: SitePrivacySection, folder: Path) -> None:
        self._site = site
        self._settings = settings
        self._folder = folder

    @property
    def is_on(self) -> bool:
        """Whether deltas are audited."""
        return self._settings.audit != "off"

    @cached_property
    def patterns(self) -> Patterns:
        """Personal data that is looked for. Raises ConfigError for a list that cannot be read."""
        file = self._settings.names_file
        names = [] if file is None else read_names(self._folder / file)
        return Patterns(self._settings.patterns, names)

    def canaries(self, model: LocalModel, limits: TrainingSection) -> Canaries:
        """The same ones each time, over the tokenizer's ordinary tokens."""
        if not (self.is_on and self._settings.canaries):
            return Canaries()
        special = set(model.tokenizer.all_special_ids)
        tokens = [token for token in range(len(model.tokenizer)) if token not in special]
        return make_canaries(
            self._settings.canaries,
            tokens,
            self._settings.seed,
            limits.max_prompt_tokens,
            limits.max_answer_tokens,
        )

    def with_canaries(self, data: SiteData, model: LocalModel, limits: TrainingSection) -> SiteData:
        """The site's text, and those that the coin puts into it."""
        inside = self.canaries(model, limits).inside
        return replace(data, train=(*data.train, *inside)) if inside else data

    def check(self, *, makes_bases: bool) -> None:
        """Whether a run's deltas can be audited as this site's file says.

        Raises NotAcceptedError where they cannot and must be, ConfigError for a list of names that
        cannot be read.
        """
        if not self.is_on:
            return
        _ = self.patterns
        if makes_bases and self._settings.audit == "gate":
            raise NotAcceptedError(
                'privacy.audit: this site sends nothing unaudited ("gate"), and a gradient cannot '
                "be audited; it takes part in no run that sends gradients"
            )
        if makes_bases:
            get_logger().warning("audit.not_made", site=self._site, reason="a gradient is no model")

    def _limits(self, declared: float | None) -> SitePrivacySection:
        """The settings; of the epsilon in them and the one that a delta claims, the smaller."""
        known = [one for one in (declared, self._settings.epsilon_block) if one is not None]
        if not (known and self._settings.canaries):
            return self._settings
        return self._settings.model_copy(update={"epsilon_block": min(known)})

    def audit(
        self,
        task: RoundStarted,
        model: LocalModel,
        data: SiteData,
        sent: Sent,
        should_stop: Callable[[], bool],
        report: Callable[[Progress], None],
        declared: float | None = None,
    ) -> AuditReport:
        """What the delta in ``sent`` gives away of ``data``; leaves another adapter in ``model``.

        ``declared``: epsilon that the delta claims, which canaries may disprove. Raises
        InterruptedRunError when ``should_stop()`` turns true.
        """
        specs = {spec.name: spec for spec in sent.trained.tensors}
        with DeltaFile(sent.path, sent.trained) as delta:

            def tuned(name: str) -> NDArray[Any]:
                before = sent.source(name)
                return before + delta.read(specs[name]) if name in specs else before

            found = self._audit(
                model,
                (tuned, sent.source),
                data,
                task.training,
                (task.run, task.round),
                should_stop,
                report,
                self._limits(declared),
            )
        self._tell("delta.audited", found, run=task.run, round=task.round)
        return found

    def audit_global(
        self,
        place: tuple[str, str],
        model: LocalModel,
        data: SiteData,
        source: _Read,
        training: TrainingSection,
        should_stop: Callable[[], bool],
        report: Callable[[Progress], None],
    ) -> None:
        """Log what a global adapter gives away of ``data``, where the site asks for it.

        ``place``: the run, and which of its adapters. It is what all sites' deltas came to, and
        nobody else can test it on this text. Leaves another adapter in ``model``. Raises as
        ``audit`` does.
        """
        if not (self.is_on and self._settings.global_adapter):
            return
        found = self._audit(
            model, (source, source), data, training, place, should_stop, report, self._settings
        )
        self._tell("adapter.audited", found, run=place[0], adapter=place[1])

    def _audit(
        self,
        model: LocalModel,
        adapters: tuple[_Read, _Read],
        data: SiteData,
        training: TrainingSection,
        place: tuple[str | int, ...],
        should_stop: Callable[[], bool],
        report: Callable[[Progress], None],
        limits: SitePrivacySection,
    ) -> AuditReport:
        """``adapters``: what is tested, and what it began from."""
        begins = {spec.name: spec for spec in model.manifest().tensors}
        tuned, source = adapters
        return Audit(
            model,
            lambda: model.load_adapter(tuned),
            lambda: model.load_adapter(lambda name: _none(begins[name], source)),
            data,
            limits,
            self.patterns,
            place,
            should_stop,
            lambda done, of: report(Progress("evaluate", done, of)),
            self.canaries(model, training),
        ).run()

    def _tell(self, event: str, found: AuditReport, **what: str | int) -> None:
        told = found.figures.model_dump(exclude_none=True, exclude={"limits", "seed"})
        level = "info" if found.figures.verdict == "passed" else "warning"
        getattr(get_logger(), level)(event, site=self._site, **what, **told)


def _none(spec: TensorSpec, source: _Read) -> NDArray[Any]:
    """A tensor of an adapter that does nothing: each kind has tensors that begin so."""
    match spec.init:
        case "zeros":
            return np.zeros(spec.shape, np.float32)
        case "ones":
            return np.ones(spec.shape, np.float32)
        case _:
            return source(spec.name)
