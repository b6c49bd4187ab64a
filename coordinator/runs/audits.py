"""What sites say of their own deltas' audits, in words: for a round's table and for the card."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coordinator.history import History
    from shared.protocol.manifest import AuditFigures


def in_words(audit: AuditFigures) -> str:
    """One line, without what was not measured."""
    return f"audit {audit.verdict}" + "".join(f"; {part}" for part in _parts(audit))


def _parts(audit: AuditFigures) -> Iterator[str]:
    if audit.released:
        yield "released by the site's operator"
    if audit.crossed:
        yield f"crossed {', '.join(audit.crossed)}"
    if audit.hits is not None and audit.records is not None:
        bound = "" if audit.hits_upper is None else f" (at most {audit.hits_upper:.1%})"
        yield f"reproduced {audit.hits} of {audit.records} records{bound}"
    if audit.personal:
        yield f"with personal data {audit.personal}"
    if audit.auc is not None:
        yield f"membership AUC {audit.auc:.2f}"
    if audit.tpr is not None:
        yield f"{audit.tpr:.1%} found at 1 % false alarms"
    if audit.auc_min_k is not None:
        yield f"by Min-K%++ AUC {audit.auc_min_k:.2f}"
    if audit.epsilon_lower is not None:
        yield f"epsilon at least {audit.epsilon_lower:.2f}"


def card_section(history: History, number: int) -> list[str]:
    """Lines on the audits of all deltas counted up to round ``number``; none without an audit."""
    counted = [
        (there, site, accepted.audit)
        for (site, there), (counted_in, _) in sorted(history.counted.items())
        if counted_in <= number
        and (accepted := history.round(there).accepted.get(site)) is not None
    ]
    audited = [(there, site, audit) for there, site, audit in counted if audit is not None]
    if not audited:
        return []
    audits = [audit for _, _, audit in audited]
    worst = max((audit.auc for audit in audits if audit.auc is not None), default=None)
    return [
        "## Memorisation",
        "",
        (
            f"Sites audited {len(audited)} of {len(counted)} counted deltas before they sent them, "
            "each by its own word: whether base, adapter and delta reproduce training records, "
            "and whether these can be told from held-out ones by their loss."
        ),
        "",
        *(
            f"- {word}: {count}"
            for word in ("passed", "warned", "blocked")
            if (count := sum(audit.verdict == word for audit in audits))
        ),
        (
            f"- Records reproduced: {sum(audit.hits or 0 for audit in audits)} of "
            f"{sum(audit.records or 0 for audit in audits)} tried; with personal data: "
            f"{sum(audit.personal or 0 for audit in audits)}"
        ),
        *([] if worst is None else [f"- Largest AUC of membership: {worst:.2f} (chance: 0.5)"]),
        *(
            f"- Round {there}, {site}: {in_words(audit)}"
            for there, site, audit in audited
            if audit.verdict == "blocked"
        ),
        "",
    ]
