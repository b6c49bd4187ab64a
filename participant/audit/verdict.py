"""From what the tests found to a word: passed, warned or blocked, and by which limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from shared.config import SitePrivacySection
    from shared.protocol.manifest import AuditFigures

CONTROL_RATE = 2.0  # of the rate on held-out records: what they share is no single record's


def blocking(found: AuditFigures, limits: SitePrivacySection) -> tuple[str, ...]:
    """The limits whose crossing blocks."""
    crossed = {
        "hits_block": _more_than_controls(found, limits),
        "personal_block": (found.personal or 0) >= limits.personal_block,
        "auc_block": found.auc is not None and found.auc > limits.auc_block,
        "epsilon_block": (
            limits.epsilon_block is not None
            and found.epsilon_lower is not None
            and found.epsilon_lower > limits.epsilon_block
        ),
    }
    return tuple(name for name, is_crossed in crossed.items() if is_crossed)


def warning(found: AuditFigures, limits: SitePrivacySection) -> tuple[str, ...]:
    """The limits whose crossing warns."""
    crossed = {
        "hits_warn": (found.hits or 0) >= limits.hits_warn,
        "auc_warn": found.auc is not None and found.auc > limits.auc_warn,
        "tpr_warn": found.tpr is not None and found.tpr > limits.tpr_warn,
    }
    return tuple(name for name, is_crossed in crossed.items() if is_crossed)


def judge(found: AuditFigures, limits: SitePrivacySection) -> AuditFigures:
    """``found`` with its verdict, the limits that were crossed, and those in force."""
    blocked, warned = blocking(found, limits), warning(found, limits)
    word: Literal["passed", "warned", "blocked"] = "warned" if warned else "passed"
    names = ("hits_warn", "hits_block", "personal_block", "auc_warn", "auc_block", "tpr_warn")
    in_force = {name: float(getattr(limits, name)) for name in names}
    if limits.epsilon_block is not None:
        in_force["epsilon_block"] = limits.epsilon_block
    return found.model_copy(
        update={
            "verdict": "blocked" if blocked else word,
            "gate": limits.audit == "gate",
            "crossed": (*blocked, *warned),
            "limits": in_force,
        }
    )


def _more_than_controls(found: AuditFigures, limits: SitePrivacySection) -> bool:
    """Enough hits, and at more than twice the rate at which held-out records are reproduced.

    A form that each record has is learnt from all, and reproduced of records never seen.
    """
    if (found.hits or 0) < limits.hits_block or not found.records:
        return False
    if not found.controls or found.control_hits is None:
        return True
    return (found.hits or 0) / found.records > CONTROL_RATE * found.control_hits / found.controls
