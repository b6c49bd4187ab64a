"""What a site fetches: global adapters, whole or by the updates that lead to them, and bases."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from shared.disk.durable_files import file_errors
from shared.disk.files import digest_file
from shared.errors import DecodeError, GradualDiffError, InterruptedRunError, ProtocolError
from shared.failpoints import failpoint
from shared.log import get_logger
from shared.tensors.updates import apply_update, update_header

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from participant.guard import Guard
    from participant.site import Site
    from shared.protocol.events import RoundStarted, RunAnnounced, RunFinished, UpdateOffered


def fetch_adapter(site: Site, guard: Guard, task: RoundStarted | RunFinished) -> Path:
    """Where the adapter that a task names lies in the workspace, brought there unless it is.

    By updates where they lead to it from one that is there, else whole. Raises ProtocolError for a
    task that names none, and what a download raises.
    """
    sha, whole = task.adapter_sha, task.fetched_sha
    if sha is None or whole is None or task.get_url is None:
        raise ProtocolError("get_url: expected an adapter and its URL, got none")
    path = site.workspace.adapter_path(task.run, sha)
    # What lies there from before is trusted no more than what comes over the wire.
    if _is_there(path, sha) or _bring_by_updates(site, guard, task, sha):
        return path
    failpoint("download.before")
    site.transfer.download(task.get_url, path, whole)
    failpoint("download.after")
    return path


def fetch_bases(site: Site, announced: RunAnnounced) -> None:
    """Give the learner the bases that a run names, fetched once; nothing where it names none.

    Raises ProtocolError for an announcement that contradicts itself, and what a download raises.
    """
    wanted, offered = announced.lora.bases_sha, announced.bases
    if wanted is None:
        return
    if offered is None or offered.sha != wanted:
        raise ProtocolError(
            f"bases.sha: expected {wanted[:12]}, which lora.bases names, got "
            f"{offered.sha[:12] if offered else 'none'}; announce the run with its bases"
        )
    path = site.workspace.bases_path(announced.run, wanted)
    if not _is_there(path, wanted):
        failpoint("download.before")
        size = site.transfer.download(offered.get_url, path, wanted)
        failpoint("download.after")
        get_logger().info("bases.fetched", site=site.name, run=announced.run, size=size)
    site.learner.take_bases(announced.run, path)


def _is_there(path: Path, sha: str) -> bool:
    return path.is_file() and digest_file(path)[0] == sha


def _bring_by_updates(
    site: Site, guard: Guard, task: RoundStarted | RunFinished, wanted: str
) -> bool:
    """Whether the updates led to the adapter. Nothing is lost where they do not: it comes whole."""
    run = task.run
    steps = _from_newest_held(site, run, task.updates)
    if not steps:
        return False
    try:
        for at, step in enumerate(steps):
            following = steps[at + 1].source_sha if at + 1 < len(steps) else wanted
            guard.check_codec(run, step.codec)
            _take_update(site, run, step, following)
    except GradualDiffError as error:
        if error.retryable or isinstance(error, InterruptedRunError):
            raise
        site.refused(run)
        get_logger().warning("update.refused", site=site.name, run=run, reason=str(error))
        return False
    size = sum(step.size for step in steps)
    get_logger().info("adapter.updated", site=site.name, run=run, updates=len(steps), size=size)
    return True


def _from_newest_held(
    site: Site, run: str, offered: Sequence[UpdateOffered]
) -> Sequence[UpdateOffered]:
    """The updates that lead on from the newest adapter in the workspace; none if none does."""
    for at in reversed(range(len(offered))):
        sha = offered[at].source_sha
        if _is_there(site.workspace.adapter_path(run, sha), sha):
            return offered[at:]
    return ()


def _take_update(site: Site, run: str, step: UpdateOffered, wanted: str) -> None:
    """Fetch one, and add it to the adapter that it starts from. Raises DecodeError."""
    workspace = site.workspace
    update, target = workspace.update_path(run, step.sha), workspace.adapter_path(run, wanted)
    with contextlib.ExitStack() as stack:
        stack.callback(update.unlink, missing_ok=True)
        failpoint("update.before")
        site.transfer.download(step.get_url, update, step.sha)
        failpoint("update.fetched")
        header = update_header(run, step.round, step.source_sha, step.codec)
        with file_errors(target):
            made = apply_update(
                workspace.adapter_path(run, step.source_sha), update, target, header
            )
        if made.sha256 != wanted:
            target.unlink()
            raise DecodeError(
                f"update of round {step.round}: expected it to lead to the announced adapter "
                f"{wanted[:12]}, got {made.sha256[:12]}; the adapter is fetched whole"
            )
        failpoint("update.applied")
