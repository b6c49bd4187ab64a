"""``gradualdiff site audit``: what the site's deltas give away, and what becomes of a kept one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradualdiff.cli.deeds import ReasonOption  # noqa: TC001 - typer reads it
from gradualdiff.cli.output import (
    DEFAULT_SITE,
    JsonOption,
    SiteOption,
    print_json,
    print_table,
    say,
)
from gradualdiff.units import fixed
from shared.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from participant.held import AuditedDelta, AuditedDeltas

app = typer.Typer(
    help="Audited deltas of this site: list, show, release, drop.", no_args_is_help=True
)
DeltaArgument = Annotated[
    str, typer.Argument(metavar="DELTA", help="The beginning of its sha256, as list shows it.")
]


@app.command("list")
def list_(site: SiteOption = DEFAULT_SITE, as_json: JsonOption = False) -> None:
    """Every audited delta that is still here, one line each."""
    found = _deltas(site).all()
    if as_json:
        print_json([_row(one) for one in found])
        return
    columns = ("run", "round", "delta", "state", "verdict", "hits", "personal", "AUC", "crossed")
    print_table(
        "Audited deltas of this site",
        columns,
        [
            (
                one.submission.run,
                one.submission.round,
                one.submission.sha[:12],
                one.state,
                (figures := one.report.figures).verdict,
                f"{figures.hits}/{figures.records}",
                figures.personal,
                fixed(figures.auc, 2),
                ", ".join(figures.crossed) or "-",
            )
            for one in found
        ],
    )


@app.command()
def show(
    delta: DeltaArgument,
    text: Annotated[
        bool,
        typer.Option("--text", help="Print what was reproduced, too: it is this site's text."),
    ] = False,
    site: SiteOption = DEFAULT_SITE,
    as_json: JsonOption = False,
) -> None:
    """What the audit of one delta found: numbers, limits, and which training records."""
    from participant.held import LOG_FILE

    deltas = _deltas(site)
    one = deltas.find(delta)
    findings: list[dict[str, Any]] = [
        {"record": found.index, "personal": list(found.personal)}
        | ({"text": found.text} if text else {})
        for found in one.report.findings
    ]
    decided = [line for line in deltas.decisions() if line.get("sha") == one.submission.sha]
    if as_json:
        print_json({**_row(one), "findings": findings, "decisions": decided})
        return
    say(f"delta {one.submission.sha} of run {one.submission.run}, round {one.submission.round}")
    figures = one.report.figures
    say(f"{one.state}; {figures.verdict}" + "".join(f", {name}" for name in figures.crossed))
    for name, value in figures.model_dump(exclude_none=True).items():
        if name not in {"verdict", "gate", "released", "crossed", "limits"}:
            say(f"  {name}: {value:g}")
    say("limits: " + ", ".join(f"{name} {value:g}" for name, value in figures.limits.items()))
    for found in findings:
        kinds = f" ({', '.join(found['personal'])})" if found["personal"] else ""
        say(f"training record {found['record']}{kinds}" + (f": {found['text']}" if text else ""))
    if findings and not text:
        say("what was reproduced: add --text")
    for line in decided:
        say(f"{LOG_FILE}: {line['action']} by {line['by']}: {line['reason']}")
    way = "gradualdiff site audit {} " + one.submission.sha[:12] + " --reason WHY"
    if one.state == "held":
        say(f"it stays here until: {way.format('drop')}, or {way.format('release')}")
    if one.state == "over":
        say(f"its round is over, so that nobody would count it: {way.format('drop')}")


@app.command()
def release(
    delta: DeltaArgument,
    reason: ReasonOption,
    site: SiteOption = DEFAULT_SITE,
) -> None:
    """Send a kept delta after all. The participant offers it at once, or at its next start.

    Where the round is over and late deltas do not count, it is refused.
    """
    from coordinator.runs.operating import operator

    done = _deltas(site).release(delta, operator(), _given(reason)).submission
    say(f"Released {done.sha[:12]} (run {done.run}, round {done.round}); the participant sends it")


@app.command()
def drop(
    delta: DeltaArgument,
    reason: ReasonOption,
    site: SiteOption = DEFAULT_SITE,
) -> None:
    """Remove a kept delta for good. The site takes no part in that round."""
    from coordinator.runs.operating import operator

    done = _deltas(site).drop(delta, operator(), _given(reason)).submission
    say(f"Dropped {done.sha[:12]} (run {done.run}, round {done.round})")


def _deltas(site: Path) -> AuditedDeltas:
    from participant.held import AuditedDeltas
    from shared.config import load_site

    config = load_site(site)
    return AuditedDeltas(site.resolve().parent / config.site.workspace, time.time)


def _row(one: AuditedDelta) -> dict[str, Any]:
    submission = one.submission
    return {
        "run": submission.run,
        "round": submission.round,
        "sha": submission.sha,
        "state": one.state,
        "figures": one.report.figures.model_dump(mode="json"),
    }


def _given(reason: str) -> str:
    if reason.strip():
        return reason.strip()
    raise ConfigError("--reason: expected why, got nothing; say it in a few words")
