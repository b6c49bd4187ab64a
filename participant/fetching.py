"""What a site fetches: bases, and global adapters, whole or as updates to what it has or draws."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from shared.disk.durable_files import file_errors
from shared.disk.files import digest_file
from shared.errors import DecodeError, GradualDiffError, InterruptedRunError, ProtocolError
from shared.failpoints import failpoint
from shared.log import get_logger
from shared.tensors.genesis import draw_adapter
from shared.tensors.updates import apply_update, update_header

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from participant.guard import Guard
    from participant.site import Site
    from shared.protocol.events import RoundStarted, RunAnnounced, RunFinished, UpdateOffered
    from shared.protocol.manifest import Manifest


def fetch_adapter(
    site: Site, guard: Guard, task: RoundStarted | RunFinished, manifest: Manifest
) -> Path:
    """Where the adapter that a task names lies in the workspace, brought there unless it is.

    By updates where they lead to it from one that is there, or from the run's first one, which is
    drawn (``manifest``: its tensors); else whole. Raises ProtocolError for a task that names none,
    and what a download raises.
    """
    sha, whole = task.adapter_sha, task.fetched_sha
    if sha is None or whole is None or task.get_url is None:
        raise ProtocolError("get_url: expected an adapter and its URL, got none")
    path = site.workspace.adapter_path(task.run, sha)
    steps = _from_what_is_there(site, task, sha)
    if steps is None and _draw(site, task, sha, manifest):
        steps = task.updates
    if steps is not None and _bring_by_updates(site, guard, task.run, steps, sha):
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
    """What lies there from before is trusted no more than what comes over the wire."""
    return path.is_file() and digest_file(path)[0] == sha


def _from_what_is_there(
    site: Site, task: RoundStarted | RunFinished, wanted: str
) -> Sequence[UpdateOffered] | None:
    """The updates that lead on from the newest adapter in the workspace; None if none is of use.

    No updates: it is the one that is wanted.
    """
    shas = [*(update.source_sha for update in task.updates), wanted]
    for at, sha in reversed(list(enumerate(shas))):
        if _is_there(site.workspace.adapter_path(task.run, sha), sha):
            return task.updates[at:]
    return None


def _draw(site: Site, task: RoundStarted | RunFinished, wanted: str, manifest: Manifest) -> bool:
    """Draw the run's first adapter, if its seed was told; whether it is the announced one.

    Raises what a download raises for a URL that this site would never ask.
    """
    if task.genesis_seed is None or task.get_url is None:
        return False
    # Whoever could not have fetched it could not upload either: better said before the training.
    site.transfer.check(task.get_url)
    sha = task.updates[0].source_sha if task.updates else wanted
    path = site.workspace.adapter_path(task.run, sha)
    with file_errors(path):
        drawn = draw_adapter(manifest, task.genesis_seed, path)
        failpoint("genesis.drawn")
        if drawn.sha256 == sha:
            get_logger().info("genesis.drawn", site=site.name, run=task.run, size=drawn.size)
            return True
        path.unlink()
    get_logger().warning(
        "genesis.differs", site=site.name, run=task.run, expected=sha, got=drawn.sha256
    )
    return False


def _bring_by_updates(
    site: Site, guard: Guard, run: str, steps: Sequence[UpdateOffered], wanted: str
) -> bool:
    """Whether the updates led to the adapter. Nothing is lost where they do not: it comes whole."""
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
    if steps:
        size = sum(step.size for step in steps)
        get_logger().info("adapter.updated", site=site.name, run=run, updates=len(steps), size=size)
    return True


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
