"""Deltas that a site's gate keeps, and what its operator decides: release or drop, on record.

For the command line beside a running participant: each decision is a line in a log that is only
added to, then one rename. What is released lies where the participant sends from; it finds it
there.

    <root>/decisions.jsonl     one JSON object a line: who, when, what, which delta, why
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import ValidationError

from participant.audit.report import AUDIT_FILE, AuditReport, read_report
from participant.workspace import (
    ACCEPTED_FILE,
    OVER_FILE,
    RELEASED_FILE,
    SUBMISSION_FILE,
    Submission,
)
from shared.config import canonical_json
from shared.disk.durable_files import file_errors, make_directories, temporary, write_new
from shared.disk.files import sync_path
from shared.disk.lines import append_line, whole_lines
from shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LOG_FILE = "decisions.jsonl"
State: TypeAlias = Literal["held", "over", "ready", "sent"]


@dataclass(frozen=True)
class AuditedDelta:
    """A committed delta that was audited.

    ``state``: ``held``; ``over``, held of a round that nobody would count it in any more; ``ready``
    to be sent; or ``sent``, the coordinator has taken it.
    """

    folder: Path
    state: State
    submission: Submission
    report: AuditReport


class AuditedDeltas:
    """Those of one workspace, under ``root``. ``clock``: seconds since the epoch."""

    def __init__(self, root: Path, clock: Callable[[], float]) -> None:
        self._root = root
        self._clock = clock

    def all(self) -> list[AuditedDelta]:
        """Every one, by run and round."""
        return sorted(self._read(), key=lambda one: (one.submission.run, one.submission.round))

    def find(self, sha: str) -> AuditedDelta:
        """The one whose sha256 begins so. Raises ConfigError where that is none, or not one."""
        found = [one for one in self.all() if sha and one.submission.sha.startswith(sha)]
        if len(found) == 1:
            return found[0]
        raise ConfigError(
            f"delta: expected the beginning of one audited delta's sha256, got {sha!r}, which "
            f"fits {len(found)}; see: gradualdiff site audit list"
        )

    def release(self, sha: str, by: str, reason: str) -> AuditedDelta:
        """Let it go to where it is sent from. Raises ConfigError for one that is not held.

        Nor is one whose round is over: nobody would count it, and its masks, if it has any, fit no
        other round.
        """
        held = self._found(sha, "held")
        self._log("release", held, by, reason)
        submission = held.submission
        if submission.audit is not None:
            audit = submission.audit.model_copy(update={"released": True})
            submission = submission.model_copy(update={"audit": audit})
        with file_errors(held.folder):
            (held.folder / RELEASED_FILE).touch()
            _replace(held.folder / SUBMISSION_FILE, submission)
            target = held.folder.parent.parent / "trained" / held.folder.name
            make_directories(target.parent)
            held.folder.rename(target)
            sync_path(target.parent)
        return held

    def drop(self, sha: str, by: str, reason: str) -> AuditedDelta:
        """Remove it for good. Raises ConfigError for one that is not held."""
        held = self._found(sha, "held", "over")
        self._log("drop", held, by, reason)
        last = {AUDIT_FILE, SUBMISSION_FILE}  # what a kill leaves is found again by these
        with file_errors(held.folder):
            for path in sorted(held.folder.iterdir(), key=lambda path: path.name in last):
                path.unlink()
            held.folder.rmdir()
        return held

    def decisions(self) -> list[dict[str, object]]:
        """What was decided, oldest first."""
        lines = map(_object, whole_lines(self._root / LOG_FILE))
        return [line for line in lines if line is not None]

    def _found(self, sha: str, *states: State) -> AuditedDelta:
        found = self.find(sha)
        if found.state not in states:
            got = f"that is {found.state}; see: gradualdiff site audit list"
            if found.state == "over":
                got = f"of round {found.submission.round}, which is over; drop it"
            raise ConfigError(
                f"delta {found.submission.sha[:12]}: expected one that the gate keeps, got one "
                f"{got}"
            )
        return found

    def _log(self, action: str, delta: AuditedDelta, by: str, reason: str) -> None:
        """Add a line, durably: before the deed, so that none is without one."""
        submission = delta.submission
        line = {
            "action": action,
            "by": by,
            "reason": reason,
            "time": round(self._clock(), 3),
            "run": submission.run,
            "round": submission.round,
            "sha": submission.sha,
            "crossed": list(delta.report.figures.crossed),
        }
        append_line(self._root / LOG_FILE, canonical_json(line))

    def _read(self) -> Iterator[AuditedDelta]:
        # Nothing below these is looked for by a pattern: the participant may move it meanwhile.
        for folder in (*self._root.glob("*/held/*"), *self._root.glob("*/trained/*")):
            report, state = read_report(folder), _state_of(folder)
            try:
                text = (folder / SUBMISSION_FILE).read_bytes()
                submission = Submission.model_validate_json(text)
            except (OSError, ValidationError):  # torn: it is trained anew
                continue
            if report is not None:
                yield AuditedDelta(folder, state, submission, report)


def _state_of(folder: Path) -> State:
    if folder.parent.name == "held":
        return "over" if (folder / OVER_FILE).exists() else "held"
    return "sent" if (folder / ACCEPTED_FILE).exists() else "ready"


def _replace(path: Path, submission: Submission) -> None:
    with temporary(path.parent, f".{path.name}-") as new:
        write_new(new, [canonical_json(submission.model_dump(mode="json"))])
        new.replace(path)
    sync_path(path.parent)


def _object(text: bytes) -> dict[str, object] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
