"""What a site does not leave to its coordinator: [accept], held against every word that it says.

A run is accepted by its announcement; its rounds must ask for just that. Trainings and evaluations
are counted in the workspace, so that a restart forgets none. What went wrong leaves as the name of
an error: its text, which may name paths, columns or servers, stays in the site's log.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from participant.acceptance import (
    FAILURES_PER_ROUND,
    TRAININGS_PER_ROUND,
    objection_to_codec,
    objection_to_delta,
    objection_to_epsilon,
    objection_to_round,
    objections,
)
from participant.approvals import FILE, Approvals, terms_digest
from participant.checkpoints import settings_digest
from participant.workspace import Training
from shared.config import canonical_json
from shared.errors import GradualDiffError, NotAcceptedError
from shared.protocol.manifest import AuditFigures, LocalMetrics

if TYPE_CHECKING:
    from participant.learner.port import Learned, Readiness
    from participant.workspace import Workspace
    from shared.config import AcceptSection
    from shared.protocol.events import (
        AdapterEvaluated,
        RoundClosed,
        RoundStarted,
        RunAnnounced,
        RunFinished,
    )


class Guard:
    """One site's. ``accept`` None: coordinator and site are one owner's, and all is allowed."""

    def __init__(self, accept: AcceptSection | None, workspace: Workspace) -> None:
        self._accept = accept
        self._workspace = workspace
        self._approvals = Approvals(workspace.root / FILE)
        self._announced: dict[str, RunAnnounced] = {}
        self._closed: dict[str, RoundClosed] = {}

    @property
    def max_epsilon(self) -> float | None:
        """What this site's privacy budget ends at; None: nowhere."""
        return None if self._accept is None else self._accept.max_epsilon

    def check_run(self, run: RunAnnounced, ready: Readiness | None = None) -> None:
        """Raises NotAcceptedError; with ``ready``, and no error, the run is accepted."""
        if self._accept is None:
            return
        _refuse(objections(run, self._accept, ready))
        if self._accept.max_epsilon is not None and ready is not None:
            self._check_epsilon(run, ready, self._accept.max_epsilon)
        taken = self._workspace.taken_part(run.run)
        announced = terms_digest(run)
        if taken.config_digest == run.config_digest and taken.announced != announced:
            raise NotAcceptedError(
                f"run {run.run}: expected the settings that were announced before under this "
                "config digest, got others; announce them under another run.name"
            )
        if ready is not None:
            self._announced[run.run] = run
            if taken.announced != announced:
                update = {"config_digest": run.config_digest, "announced": announced}
                self._workspace.keep_taken_part(run.run, taken.model_copy(update=update))

    def is_approved(self, run: RunAnnounced, now: float) -> bool:
        """Whether a person said yes to just these terms, where the site wants that; else asks.

        ``now``: seconds since the epoch. Raises NotAcceptedError where a person said no.
        """
        if self._accept is None or not self._accept.approval:
            return True
        answer = self._approvals.answer(run.run, terms_digest(run))
        if answer is None:
            self._approvals.ask(run, now)
            return False
        if answer.word == "declined":
            raise NotAcceptedError(
                f"this site does not take part: a person there declined run {run.run}: "
                f"{answer.reason}"
            )
        return True

    def is_answered(self, run: RunAnnounced) -> bool:
        """Whether there is something to do about a run that waited for a person's answer."""
        try:
            return self._approvals.answer(run.run, terms_digest(run)) is not None
        except GradualDiffError:
            return True  # whoever prepares the run meets the error, and says it

    def _check_approval(self, task: RoundStarted) -> None:
        """A person's yes holds until it is taken back, and for the rounds that were meant."""
        if self._accept is None or not self._accept.approval:
            return
        answer = self._approvals.answer(task.run, terms_digest(self._announced[task.run]))
        if answer is None or answer.word == "declined":
            reason = f": {answer.reason}" if answer else ""
            raise NotAcceptedError(
                f"this site no longer takes part: a person there declined run {task.run}{reason}"
            )
        if task.round > answer.rounds:
            raise NotAcceptedError(
                f"this site does not take part in round {task.round}: a person there approved "
                f"{answer.rounds} rounds, and the run was extended; ask them to approve more"
            )

    def _check_epsilon(self, run: RunAnnounced, ready: Readiness, most: float) -> None:
        if ready.privacy is None:
            raise NotAcceptedError("accept.max_epsilon: expected a run whose epsilon is known")
        budget = self._workspace.budget(most)
        total = budget.with_run(run.run, ready.privacy, ready.records)
        _refuse(objection_to_epsilon(total, ready.privacy, most))

    def check_round(self, task: RoundStarted) -> None:
        """Count this training before it begins. Raises NotAcceptedError.

        The same task again gives the same bytes and tells nothing new: it counts once.
        """
        if self._accept is None:
            return
        _refuse(objection_to_round(task, self._announced[task.run], self._accept))
        self._check_approval(task)
        taken = self._workspace.taken_part(task.run)
        this = Training(round=task.round, task=_task_digest(task))
        here = [one for one in taken.trainings if one.round == task.round]
        if taken.failures.get(task.round, 0) >= FAILURES_PER_ROUND:
            raise NotAcceptedError(
                f"this site no longer tries round {task.round}: it failed {FAILURES_PER_ROUND} "
                "times"
            )
        if this in here:
            return
        limit = self._accept.max_rounds
        if len(here) >= TRAININGS_PER_ROUND or (limit and len(taken.trainings) >= limit):
            raise NotAcceptedError(
                f"this site does not take part in round {task.round}: expected at most "
                f"{TRAININGS_PER_ROUND} trainings under one round number and accept.max_rounds = "
                f"{limit or 'any'} in all, had {len(here)} and {len(taken.trainings)}; a run that "
                "is begun anew under its name counts on: take another run.name, or have the site "
                "raise accept.max_rounds"
            )
        update = {"trainings": (*taken.trainings, this)}
        self._workspace.keep_taken_part(task.run, taken.model_copy(update=update))

    def check_codec(self, run: str, codec: str) -> None:
        """Raises NotAcceptedError for a codec that the run was not announced with."""
        if self._accept is not None:
            _refuse(objection_to_codec(codec, self._announced[run]))

    def check_delta(self, learned: Learned) -> None:
        """Raises NotAcceptedError where this training may not leave."""
        if self._accept is not None:
            _refuse(objection_to_delta(learned, self._accept))

    def failed(self, task: RoundStarted) -> None:
        """Count a training that ended without a delta."""
        if self._accept is None:
            return
        taken = self._workspace.taken_part(task.run)
        failures = {**taken.failures, task.round: taken.failures.get(task.round, 0) + 1}
        update = {"failures": failures}
        self._workspace.keep_taken_part(task.run, taken.model_copy(update=update))

    def closed(self, event: RoundClosed) -> None:
        """Remember what a round is said to have ended in."""
        self._closed[event.run] = event

    def evaluated(self, task: RunFinished) -> AdapterEvaluated | None:
        """What was told of this adapter before, None where nothing was. Raises NotAcceptedError.

        Held-out losses of adapters of somebody's choice would tell what the text is: one in a run,
        of the adapter that it ended in, and none where this site had no part in it.
        """
        if self._accept is None:
            return None
        taken, closed = self._workspace.taken_part(task.run), self._closed.get(task.run)
        if not self._accept.send_metrics or not taken.trainings:
            raise NotAcceptedError("expected a run that this site trained in and sends losses of")
        if closed and closed.round == task.round and closed.result_sha != task.sha:
            raise NotAcceptedError(f"expected the result of round {task.round}, got another one")
        told = taken.evaluated
        if told is not None and told.sha != task.sha:
            raise NotAcceptedError("expected the adapter evaluated before, got another one")
        return told

    def may_tell(self, event: AdapterEvaluated) -> bool:
        """Whether this loss leaves; if so it is the run's only one, also after a restart."""
        if self._accept is None:
            return True
        if event.held_out.examples < self._accept.min_held_out:
            return False
        taken = self._workspace.taken_part(event.run)
        self._workspace.keep_taken_part(event.run, taken.model_copy(update={"evaluated": event}))
        return True

    def told(self, metrics: LocalMetrics) -> LocalMetrics:
        """What leaves of a training's metrics."""
        accept, held_out = self._accept, metrics.held_out
        if accept is None:
            return metrics
        if not accept.send_metrics:
            return LocalMetrics(steps=metrics.steps, seconds=metrics.seconds)
        if held_out is not None and held_out.examples < accept.min_held_out:
            return metrics.model_copy(update={"held_out": None})
        return metrics

    def told_audit(self, figures: AuditFigures) -> AuditFigures:
        """What leaves of an audit's numbers."""
        if self._accept is None or self._accept.send_metrics:
            return figures
        return AuditFigures(verdict=figures.verdict, gate=figures.gate)

    def outward(self, error: GradualDiffError) -> str:
        """What leaves of an error: the site's own word about [accept], or the error's name."""
        if self._accept is None or isinstance(error, NotAcceptedError):
            return str(error)
        return f"{type(error).__name__} (code {error.exit_code}); the site's own log says more"


def _refuse(reason: str) -> None:
    if reason:
        raise NotAcceptedError(reason)


def _task_digest(task: RoundStarted) -> str:
    asked = [task.round, task.source_sha, task.seed, task.codec, settings_digest(task)]
    # One training with another residual added is another delta, and tells more of the same text.
    return _digest([*asked, *([task.last_accepted] if task.last_accepted else [])])


def _digest(value: object) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()
