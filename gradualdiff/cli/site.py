"""``gradualdiff site``: what a site's own people do at the site: its key, and which runs begin."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradualdiff.cli import site_audit
from gradualdiff.cli.output import (
    DEFAULT_SITE,
    JsonOption,
    SiteOption,
    agree,
    console,
    print_json,
    print_table,
    say,
)
from shared.errors import ConfigError, RunNotFoundError

if TYPE_CHECKING:
    from participant.approvals import ApprovalLine, Approvals

app = typer.Typer(
    help="At a site: its key, its audits, which runs wait for approval, what was confirmed to it.",
    no_args_is_help=True,
)
app.add_typer(site_audit.app, name="audit")
RunArgument = Annotated[str, typer.Argument(help="The run's name.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@app.command()
def init(site: SiteOption = DEFAULT_SITE, as_json: JsonOption = False) -> None:
    """Make this site's signing key, once, and say its public half; repeated, say it again.

    The private half stays in a file that only you can read. Send the public half to whoever runs
    the coordinator, and read the fingerprint out over the phone.
    """
    from shared.trust.keys import IDENTITY_FILE, SigningKey

    trust = _trust_table(site)
    path = site.resolve().parent / str(trust.get("key_file", IDENTITY_FILE))
    public = SigningKey.kept(path, "trust.key_file").public
    lines = "" if "key_file" in trust else f'[trust]\nkey_file = "{IDENTITY_FILE}"\n'
    if lines and site.exists() and not trust:
        _append(site, lines)
        lines = ""
    if as_json:
        told = {"key": public.text, "fingerprint": public.fingerprint, "file": str(path)}
        print_json(told)
        return
    out = console()
    out.print(f"private key  {path}; keep it here, and keep it to yourself", soft_wrap=True)
    out.print(f"public key   {public.text}", soft_wrap=True)
    out.print(f"fingerprint  {public.fingerprint}")
    if lines:
        out.print(f"add to {site}:\n{lines.rstrip()}", markup=False, soft_wrap=True)
    out.print(
        "next: send the public key to whoever runs the coordinator, and read the fingerprint out "
        "over the phone",
        soft_wrap=True,
    )


@app.command()
def heads(site: SiteOption = DEFAULT_SITE, as_json: JsonOption = False) -> None:
    """The newest link of each run's records that the coordinator confirmed to this site.

    Whoever has the records can be asked for: gradualdiff runs verify RUN --against N:SHA256
    """
    from participant.heads import newest_heads
    from shared.config import load_site

    root = site.resolve().parent / load_site(site).site.workspace
    rows = [(kept.run, kept.round, str(kept.head), kept.at) for kept in newest_heads(root)]
    if as_json:
        names = ("run", "round", "head", "at")
        print_json([dict(zip(names, row, strict=True)) for row in rows])
        return
    from coordinator.liveness import moment

    told = [(run, number, head, moment(at)) for run, number, head, at in rows]
    print_table("Confirmed to this site", ("run", "round", "head", "at"), told)


@app.command()
def status(site: SiteOption = DEFAULT_SITE, as_json: JsonOption = False) -> None:
    """Each run that was ever held for approval: what it asks for, and what a person said."""
    approvals = _approvals(site)
    rows = [_shown(approvals, asked) for asked in approvals.asked().values()]
    if as_json:
        print_json(rows)
        return
    if not rows:
        say("no run was held for approval here")
    for row in rows:
        title = f"Run {row['run']}: {row['state']}"
        print_table(title, ("what", "value"), list(row["terms"].items()))
        if row["state"].startswith("waits"):
            say(f"gradualdiff site approve {row['run']}, or: decline {row['run']} --reason ...")


@app.command()
def approve(
    run: RunArgument,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="The last round that is approved (default: as announced)."),
    ] = None,
    yes: YesOption = False,
    site: SiteOption = DEFAULT_SITE,
    as_json: JsonOption = False,
) -> None:
    """Let this site take part in a run, on the terms that it was announced with and no others.

    A participant that runs sees it within seconds. Give it again with --rounds when a run was
    extended.
    """
    approvals, asked = _asked(site, run)
    if not as_json:
        print_table(f"Run {run}", ("what", "value"), list(_terms(asked).items()))
    agree(f"Let this site take part in run {run} on these terms?", yes=yes)
    line = approvals.say("approved", asked, time.time(), _operator(), rounds=rounds)
    _tell(line, as_json=as_json)


@app.command()
def decline(
    run: RunArgument,
    reason: Annotated[
        str, typer.Option("--reason", help="The reason, which the coordinator is told.")
    ],
    site: SiteOption = DEFAULT_SITE,
    as_json: JsonOption = False,
) -> None:
    """Keep this site out of a run, or take an approval back from its next round on."""
    approvals, asked = _asked(site, run)
    line = approvals.say("declined", asked, time.time(), _operator(), reason=reason)
    _tell(line, as_json=as_json)


# What the commands work with ---------------------------------------------------------------------


def _approvals(site: Path) -> Approvals:
    from participant.approvals import FILE, Approvals
    from shared.config import load_site

    config = load_site(site)
    return Approvals(site.resolve().parent / config.site.workspace / FILE)


def _asked(site: Path, run: str) -> tuple[Approvals, ApprovalLine]:
    approvals = _approvals(site)
    asked = approvals.asked()
    if run not in asked:
        known = ", ".join(asked) or "none"
        raise RunNotFoundError(
            f"run {run}: expected one that was held for approval at this site ({known}); it has to "
            "be announced first, with accept.approval = true in site.toml"
        )
    return approvals, asked[run]


def _operator() -> str:
    from coordinator.runs.operating import operator

    return operator()


def _shown(approvals: Approvals, asked: ApprovalLine) -> dict[str, Any]:
    from coordinator.liveness import moment

    answer = approvals.answer(asked.run, asked.terms)
    if answer is None:
        state = f"waits for approval since {moment(asked.time)}"
    else:
        why = f": {answer.reason}" if answer.reason else ""
        state = f"{answer.word} by {answer.by} on {moment(answer.time)}{why}"
    return {
        "run": asked.run,
        "state": state,
        "rounds": answer.rounds if answer and answer.word == "approved" else None,
        "digest": asked.terms,
        "terms": _terms(asked),
    }


def _terms(asked: ApprovalLine) -> dict[str, str]:
    """What a run asks for, in plain words. Raises ConfigError where the file holds other fields."""
    from participant.approvals import told_terms

    try:
        return told_terms(asked)
    except (KeyError, TypeError):
        raise ConfigError(
            f"run {asked.run}: expected the terms as this release writes them, got others; start "
            "the participant again, which asks anew"
        ) from None


def _tell(line: ApprovalLine, *, as_json: bool) -> None:
    if as_json:
        print_json(line)
        return
    upto = f", up to round {line.rounds}" if line.word == "approved" else ""
    console().print(
        f"run {line.run} is {line.word}{upto}; terms sha256 {line.terms}", soft_wrap=True
    )


def _trust_table(site: Path) -> dict[str, Any]:
    """``[trust]`` of a site.toml that need not be filled in yet; nothing where there is no file."""
    import tomllib

    try:
        found = tomllib.loads(site.read_text(encoding="utf-8")).get("trust", {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{site}: expected a site.toml, but: {error}; fix the file") from None
    return found if isinstance(found, dict) else {}


def _append(site: Path, lines: str) -> None:
    with site.open("a", encoding="utf-8") as file:
        file.write(f"\n{lines}")
