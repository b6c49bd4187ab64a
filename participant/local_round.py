"""One round at a site: the adapter fetched, trained on the site's text, the delta committed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from participant.checkpoints import settings_digest
from participant.workspace import Submission
from shared.disk.durable_files import file_errors
from shared.disk.files import digest_file
from shared.failpoints import failpoint
from shared.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from participant.guard import Guard
    from participant.learner.port import Learned, Progress
    from participant.site import Site
    from shared.protocol.events import RoundStarted


def train_and_commit(
    site: Site,
    guard: Guard,
    task: RoundStarted,
    should_stop: Callable[[], bool],
    report: Callable[[Progress], None],
) -> Submission:
    """Train it, whatever was trained before; what is committed.

    Raises NotAcceptedError, GrantError, InterruptedRunError, and what the learner raises.
    """
    workspace = site.workspace
    guard.check_round(task)
    started = time.monotonic()
    source = fetch_adapter(site, task.run, task.source_sha, task.get_url, task.fetched_sha)
    fetched = time.monotonic()
    making = workspace.new_round(task.run)
    state = workspace.state_path(task.run, task.last_counted)
    failpoint("learn.before")
    with file_errors(making):
        learned = site.learner.learn(
            task,
            source,
            state,
            making,
            should_stop,
            report,
            workspace.checkpoints(task, site.name),
        )
        failpoint("learn.after")
        guard.check_delta(learned)
        submission = _submission(task, learned)
        submission.metrics.seconds["fetch"] = round(fetched - started, 3)
        told = guard.told(submission.metrics)
        submission = submission.model_copy(update={"metrics": told})
        workspace.commit(making, submission)
    get_logger().info("round.trained", site=site.name, run=task.run, round=task.round)
    return submission


def fetch_adapter(site: Site, run: str, adapter_sha: str, url: str, fetched_sha: str) -> Path:
    """Where it lies in the workspace, fetched unless it is there already."""
    path = site.workspace.adapter_path(run, adapter_sha)
    # What lies there from before is trusted no more than what comes over the wire.
    if not path.is_file() or digest_file(path)[0] != adapter_sha:
        failpoint("download.before")
        site.transfer.download(url, path, fetched_sha)
        failpoint("download.after")
    return path


def _submission(task: RoundStarted, learned: Learned) -> Submission:
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
    )
