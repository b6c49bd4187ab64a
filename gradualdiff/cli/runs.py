"""``gradualdiff runs``: list, show, verify, export and compare runs."""

from __future__ import annotations

import typer

from gradualdiff.cli import attesting, comparing, deleting, exporting, pruning, steering
from gradualdiff.cli.attesting import (
    AgainstOption,
    KeyOption,
    announce,
    refuse_findings,
)
from gradualdiff.cli.bases import print_bases, print_captured
from gradualdiff.cli.output import (
    DEFAULT_STORE,
    JsonOption,
    RunArgument,
    StoreOption,
    console,
    print_json,
    print_table,
    wire_facts,
)
from gradualdiff.verified import in_one, lines

app = typer.Typer(
    help="Runs in a store: list, show, verify, export, compare, steer, branch, prune, delete.",
    no_args_is_help=True,
)

for command in (
    steering.pause,
    steering.resume,
    steering.stop,
    steering.extend,
    steering.exclude,
    steering.branch,
    pruning.prune,
    pruning.erase,
    deleting.delete,
    comparing.compare,
    exporting.export,
    attesting.attest,
):
    app.command()(command)


@app.command("list")
def list_(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Every run in the store, one line each."""
    from gradualdiff.store import open_store

    summaries = open_store(store).runs
    if as_json:
        print_json(summaries)
        return
    rows = [
        (s.run, s.state, f"{s.rounds_closed}/{s.rounds}", s.participants, s.held_out_nll)
        for s in summaries
    ]
    print_table("Runs", ("run", "state", "rounds", "participants", "held-out loss"), rows)


@app.command()
def show(run: RunArgument, store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """One run: its state, dates, members, and the settings that differ from the defaults."""
    from coordinator.liveness import moment
    from coordinator.runs.captured import captured
    from coordinator.runs.differing import changed_settings, told
    from gradualdiff.store import open_store

    opened = open_store(store).run(run)
    history, summary = opened.history, opened.summary
    members = [
        {
            "site": site,
            "examples": member.examples,
            "fingerprint": member.fingerprint,
            "numerics": member.numerics,
            "bases": member.bases,
        }
        for site, member in sorted(history.members.items())
    ]
    held = captured(history)
    if as_json:
        config = history.config.recorded()
        shown = {"summary": summary, "members": members, "config": config, "captured": held}
        print_json({**shown, "wire": opened.wire, "privacy": opened.privacy})
        return
    facts = [
        ("state", summary.state),
        ("reason", summary.reason or None),
        ("rounds closed", f"{summary.rounds_closed} of {summary.rounds}"),
        ("paused", summary.paused),
        ("branch of", summary.origin),
        *((f"waits for {site}", why) for site, why in summary.waits_for.items()),
        *((f"without {site}", why) for site, why in summary.excluded.items()),
        ("held-out loss", summary.held_out_nll),
        *wire_facts(opened.wire),
        *((f"privacy of {site}", spent.words()) for site, spent in opened.privacy.items()),
        ("adapter", summary.adapter_sha),
        ("config digest", history.federation.digest),
        ("base model", history.config.base.model),
        ("began", moment(summary.began)),
        ("finished", moment(history.finished.time if history.finished else None)),
    ]
    print_table(f"Run {run}", ("fact", "value"), facts)
    changed = changed_settings(history.config)
    if changed:
        print_table(
            "Settings that differ from the defaults",
            ("setting", "value", "default"),
            [(name, told(value), told(default)) for name, (value, default) in changed.items()],
        )
    rows = [
        (site, m.examples, m.fingerprint[:12], m.numerics.device, m.numerics.compute_dtype)
        for site, m in sorted(history.members.items())
    ]
    print_table("Members", ("site", "examples", "base", "device", "computes in"), rows)
    print_bases(history.members)
    if held is not None:
        print_captured(held)


@app.command()
def verify(
    run: RunArgument,
    store: StoreOption = DEFAULT_STORE,
    key: KeyOption = None,
    against: AgainstOption = None,
    as_json: JsonOption = False,
) -> None:
    """Recompute every round from its stored deltas and compare. Exit code 21 on a finding."""
    from gradualdiff.store import open_store

    report = (lambda _: None) if as_json else announce
    found = open_store(store).run(run).verify(report, key=key, against=against)
    if as_json:
        print_json(found)
    elif not found.findings:
        console().print(f"[green]run {run} verified[/green]: {in_one(found)}")
    if not as_json:
        for line in lines(found, against):
            console().print(line, markup=False, soft_wrap=True)
    refuse_findings(found)
