"""What a site keeps of a run's history: the newest link of each round, signed by the coordinator.

The coordinator tells with each signed message which link is its newest. Whoever holds that can ask
later of any copy of the records whether they are the ones that were confirmed to this site.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from pydantic import ValidationError

from participant.workspace import HEADS_FILE
from shared.config import Name, canonical_json
from shared.disk.lines import append_line, whole_lines
from shared.log import get_logger
from shared.protocol.chain import Head
from shared.protocol.manifest import Schema
from shared.protocol.said import Said

if TYPE_CHECKING:
    from pathlib import Path

    from participant.workspace import Workspace
    from shared.protocol.events import DeltaAnswered, RoundClosed, RunFinished


class KeptHead(Schema):
    """One line. ``said``: the whole message, which proves who named this head, and when.

    ``at``: seconds since the epoch by this site's clock. ``event``: what the message was.
    """

    run: Name
    round: int
    event: str
    at: float
    said: Said

    @property
    def head(self) -> Head:
        """The link that it names. Raises ConfigError for what is none."""
        return Head.parse(self.said.head or "", "head")


class Heads:
    """One site's. Lines are only added: of each round its answer and its end, and the run's."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._newest: dict[tuple[str, str], Head | None] = {}  # by run and to whom it was said

    def keep(self, event: DeltaAnswered | RoundClosed | RunFinished, now: float) -> None:
        """Add the head that came with an event, if it is newer than the one before.

        Where nobody signs there is none. Raises StoreUnavailableError where the disk is full.
        """
        said = event.said
        if said is None or said.head is None:
            return
        kept = KeptHead(
            run=event.run, round=event.round, event=type(event).__name__, at=now, said=said
        )
        path = self._workspace.heads_path(event.run)
        this = (event.run, said.to)  # of a deleted run of this name the heads say nothing here
        if this not in self._newest:
            heads = (line.head for line in read_heads(path) if line.said.to == said.to)
            self._newest[this] = max(heads, key=lambda head: head.number, default=None)
        newest = self._newest[this]
        if newest is not None and kept.head.number <= newest.number:
            if kept.head.number == newest.number and kept.head != newest:
                get_logger().error(
                    "history.forked", run=event.run, number=newest.number, kept=newest.sha,
                    told=kept.head.sha,
                )  # fmt: skip
            return  # told again
        append_line(path, canonical_json(kept.model_dump(mode="json")))
        self._newest[this] = kept.head


def read_heads(path: Path) -> list[KeptHead]:
    """Every line, in order; none without the file. One that is damaged hides no other."""
    found: list[KeptHead] = []
    for line in whole_lines(path):
        with contextlib.suppress(ValidationError):
            found.append(KeptHead.model_validate_json(line))
    return found


def newest_heads(root: Path) -> list[KeptHead]:
    """Of each run in a workspace its newest one, in name order."""
    lines = (read_heads(path) for path in sorted(root.glob(f"*/{HEADS_FILE}")))
    return [kept[-1] for kept in lines if kept]
