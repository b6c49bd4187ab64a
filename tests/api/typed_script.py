"""A user's script that mypy reads; it is not run."""

from __future__ import annotations

import gradualdiff as gd


def worst_site(path: str, name: str) -> str | None:
    """The site with the highest loss in the last round, if any told."""
    run = gd.open_store(path).run(name)
    last: gd.RoundSummary = run.rounds[-1]
    rows: gd.Rows[gd.SiteRow] = run.round(last.round).sites
    told = [(row.held_out_nll, row.site) for row in rows if row.held_out_nll is not None]
    return max(told)[1] if told else None


def unfinished(path: str) -> list[str]:
    """Runs that did not end."""
    try:
        return [run.run for run in gd.open_store(path).runs if run.state != "finished"]
    except gd.errors.StoreMissingError:
        return []
