"""Which run a site means by a name: the one that was announced last, and none that it displaced.

A run may be deleted and its name used again. What was signed in the old one says nothing in the
new one, and what the old coordinator once announced does not bring it back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.disk.lines import append_line, whole_lines
from shared.errors import SignatureError
from shared.protocol.messages import Voice

if TYPE_CHECKING:
    from participant.workspace import Workspace
    from shared.trust.keys import SigningKey

FILE = "births"


class Births:
    """One site's. A line for each run of a name, oldest first; asked by several threads."""

    def __init__(self, workspace: Workspace) -> None:
        self._root = workspace.root

    def of(self, run: str | None) -> str:
        """The birth of the run that was announced last by this name; empty where none was."""
        known = self._known(run) if run else []
        return known[-1] if known else ""

    def announced(self, run: str, birth: str) -> None:
        """Keep it. Raises SignatureError where another run displaced that one already."""
        known = self._known(run)
        if birth in known[:-1]:
            raise SignatureError(
                f"run {run}: expected the run that was announced last by this name, got one that "
                "it displaced: an old word, or an old copy of the store; take another run.name"
            )
        if birth not in known:
            append_line(self._root / run / FILE, birth.encode())

    def voice(self, key: SigningKey | None, run: str | None) -> Voice | None:
        """What signs this site's words in a run; None where it signs nothing."""
        return None if key is None else Voice(key, self.of(run))

    def _known(self, run: str) -> list[str]:
        return [line.decode(errors="replace") for line in whole_lines(self._root / run / FILE)]
