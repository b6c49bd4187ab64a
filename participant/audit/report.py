"""What an audit leaves at the site: the numbers that may leave, and the text that may not."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

from pydantic import Strict, ValidationError

from shared.config import canonical_json
from shared.protocol.manifest import AuditFigures, Schema

if TYPE_CHECKING:
    from pathlib import Path

AUDIT_FILE = "audit.json"


class Finding(Schema):
    """A reproduced record. ``index``: its place in the training text, from 0.

    ``personal``: kinds of personal data in it; ``text``: what was reproduced.
    """

    index: int
    personal: Annotated[tuple[str, ...], Strict(False)] = ()
    text: str


class AuditReport(Schema):
    """One audit. Only ``figures`` leave."""

    figures: AuditFigures
    findings: Annotated[tuple[Finding, ...], Strict(False)] = ()


def write_report(folder: Path, report: AuditReport) -> None:
    """Into ``folder``, for this user's eyes only: it holds text of the site."""
    path = folder / AUDIT_FILE
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(canonical_json(report.model_dump(mode="json")))


def read_report(folder: Path) -> AuditReport | None:
    """What was written there; None if there is none, or it is torn."""
    try:
        return AuditReport.model_validate_json((folder / AUDIT_FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def is_held(report: AuditReport | None) -> bool:
    """Whether the delta stays at the site until a person decides."""
    return report is not None and report.figures.gate and report.figures.verdict == "blocked"
