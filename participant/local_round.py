"""One round at a site: the adapter fetched, trained on the site's text, the delta committed."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from participant.audit.report import is_held, write_report
from participant.checkpoints import settings_digest
from participant.fetching import fetch_adapter
from participant.learner.port import RESIDUAL_FILE
from participant.secure_round import check_terms, mask_delta
from participant.site_noise import EXACT, begin_noise, steps_of, write_noisy
from participant.workspace import Submission
from shared.disk.durable_files import file_errors
from shared.errors import NotAcceptedError
from shared.failpoints import failpoint
from shared.log import get_logger
from shared.tensors.masked_file import MASKED
from shared.tensors.residual import Feedback

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from participant.guard import Guard
    from participant.learner.port import Learned, Progress, Readiness
    from participant.privacy import SiteNoise
    from participant.site import Site
    from participant.workspace import Workspace
    from shared.protocol.events import RoundStarted
    from shared.protocol.secure import MaskedWith

# All that the coordinator is told of it.
HELD = (
    'privacy.audit: this site\'s gate keeps the delta of this round ("gate"); an operator of the '
    "site may release it while the round is open"
)


def train_and_commit(
    site: Site,
    guard: Guard,
    task: RoundStarted,
    ready: Readiness,
    should_stop: Callable[[], bool],
    report: Callable[[Progress], None],
) -> Submission:
    """Train it, whatever was trained before; what is committed. ``ready``: as it was told.

    A delta that the site's gate keeps is committed where nothing is sent from; then, and when the
    round is asked for again, this is a NotAcceptedError. Raises also GrantError,
    InterruptedRunError, and what the learner raises.
    """
    workspace = site.workspace
    if workspace.held(task) is not None:
        raise NotAcceptedError(HELD)
    guard.check_round(task)
    started = time.monotonic()
    if task.secure is not None:
        check_terms(site, task, task.secure, ready.manifest)  # before anything is trained for it
    noisy = steps_of(task, ready) is not None
    source = fetch_adapter(site, guard, task, ready.manifest)
    fetched = time.monotonic()
    making = workspace.new_round(task.run)
    state = workspace.state_path(task.run, task.last_counted)
    feedback = _feedback(workspace, task, making)
    masked: tuple[MaskedWith, bytes] | None = None
    if task.privacy is not None and not noisy:
        site.learner.take_budget(workspace.budget(guard.max_epsilon))
    failpoint("learn.before")
    with file_errors(making):
        learned = site.learner.learn(
            task.model_copy(update={"codec": EXACT}) if noisy else task,
            source,
            state,
            making,
            should_stop,
            report,
            workspace.checkpoints(task, site.name),
            feedback if task.secure is None else None,
        )
        failpoint("learn.after")
        guard.check_delta(learned)
        noise: SiteNoise | None = None
        if noisy:
            noise, learned = begin_noise(site, guard, task, ready, learned, making)
        elif task.secure is not None:
            feedback = feedback or Feedback(None, making / RESIDUAL_FILE, owed=False)
        if task.secure is not None:
            how = noise or feedback
            assert how is not None  # one of the two: see above
            digest, masked = mask_delta(site, task, task.secure, ready.manifest, making, how)
            learned = replace(learned, delta=digest)
        elif noise is not None:
            learned = replace(learned, delta=write_noisy(site, task, ready, making, noise))
        submission = _submission(task, learned, feedback, ready.fingerprint, masked)
        submission.metrics.seconds["fetch"] = round(fetched - started, 3)
        told = guard.told(submission.metrics)
        submission = submission.model_copy(update={"metrics": told})
        submission = _with_audit(submission, learned, guard, making)
        hold = is_held(learned.audit)
        workspace.commit(making, submission, hold=hold)
    if feedback is not None and feedback.state == "lost":
        get_logger().warning(
            "residual.lost", site=site.name, run=task.run, round=task.round, reason=feedback.problem
        )
    get_logger().info("round.trained", site=site.name, run=task.run, round=task.round)
    if hold:
        get_logger().warning(
            "delta.held",
            site=site.name,
            run=task.run,
            round=task.round,
            sha=submission.sha,
            hint=f"see: gradualdiff site audit show {submission.sha[:12]}",
        )
        raise NotAcceptedError(HELD)
    return submission


def _with_audit(submission: Submission, learned: Learned, guard: Guard, making: Path) -> Submission:
    """Leave what the audit found beside the delta; with what may leave of it."""
    if learned.audit is None:
        return submission
    write_report(making, learned.audit)
    if learned.privacy is not None:  # no number leaves that no noise was added to
        return submission
    return submission.model_copy(update={"audit": guard.told_audit(learned.audit.figures)})


def _feedback(workspace: Workspace, task: RoundStarted, making: Path) -> Feedback | None:
    """From the residual that the coordinator names; from zeros where there is none, or it is lost.

    It alone knows which delta was accepted: one that was refused or late changes nothing here.
    """
    if not task.feedback:
        return None
    last = task.last_accepted
    before = workspace.residual_path(task.run, last) if last is not None else None
    return Feedback(before, making / RESIDUAL_FILE, owed=last is not None)


def _submission(
    task: RoundStarted,
    learned: Learned,
    feedback: Feedback | None,
    fingerprint: str,
    masked: tuple[MaskedWith, bytes] | None,
) -> Submission:
    return Submission(
        run=task.run,
        round=task.round,
        source_sha=task.source_sha,
        sha=learned.delta.sha256,
        size=learned.delta.size,
        examples=learned.examples,
        tokens=learned.tokens,
        metrics=learned.metrics,
        state=learned.state,
        expires_at=task.expires_at,
        settings=settings_digest(task),
        residual=feedback.state if feedback else "none",
        left_out=feedback.written.sha256 if feedback and feedback.written else None,
        attempt=task.attempt,
        fingerprint=fingerprint,
        codec=task.codec if masked is None else MASKED,
        masked=masked[0] if masked else None,
        mask_seed=masked[1].hex() if masked else None,
        terms=task.secure,
        privacy=learned.privacy,
    )
