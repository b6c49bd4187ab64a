"""What ``gradualdiff demo`` prints at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradualdiff.cli.output import console, print_table, wire_facts
from gradualdiff.units import fixed, megabytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gradualdiff.run import Run


def show(run: Run, folder: Path, home: Path, replies: Sequence[tuple[str, str, str]]) -> None:
    """Print the rounds, the sites, the replies, and what to try next; write the plot."""
    from gradualdiff.demo.start import texts
    from gradualdiff.figures.held_out import write_held_out
    from shared.config import load_federation

    _show_rounds(run)
    files = texts(load_federation(home / "federation.toml"), home)
    _show_sites(run, {name: len(path.read_bytes().splitlines()) for name, path in files.items()})
    print_table(
        "Replies to prompts that nobody trained on", ("prompt", "base", "after the run"), replies
    )
    if run.wire is not None:
        print_table("On the wire", ("what", "bytes"), wire_facts(run.wire))
    plot = folder / f"{run.name}.png"
    write_held_out(run.history, plot)
    store = f"--store {folder / 'store'}"
    for line in (
        f"plot      {plot}",
        f"ledger    {folder / 'store' / 'runs' / run.name}",
        f"settings  {home / 'federation.toml'} and {home / 'sites'}",
        f"log       {folder / 'demo.log'}",
        "",
        "What to try next:",
        f"  gradualdiff runs verify {run.name} {store}",
        f"  gradualdiff rounds show {run.name} 1 {store}",
        f"  gradualdiff runs export {run.name} --to my-adapter {store}",
        f"  kill it in the middle and start it again: gradualdiff demo --dir {folder}",
        "  gradualdiff demo --data FILE --model PATH_OR_HUB_ID   (your own text and model)",
    ):
        console().print(line, soft_wrap=True, markup=False, highlight=False)


def _show_rounds(run: Run) -> None:
    history = run.history
    names = sorted(history.members)
    rows, by_site = [], []
    for s in run.rounds:
        losses = history.held_out(s.round)
        at_sites = [losses[name].nll if name in losses else None for name in names]
        by_site.append((s.round, *at_sites))
        seconds = None if s.seconds is None else round(s.seconds)
        size = megabytes(s.bytes)
        rows.append((s.round, s.held_out_nll, fixed(s.perplexity, 2), s.tokens, seconds, size))
    print_table(
        f"{run.name}: held-out loss of the global adapter by round (0 is the base model)",
        ("round", "loss", "perplexity", "tokens", "seconds", "MB up"),
        rows,
    )
    print_table("The same at each site", ("round", *names), by_site)
    first, last = rows[0][1], rows[-1][1]
    if isinstance(first, float) and isinstance(last, float):
        console().print(
            f"held-out loss {first:.4f} -> {last:.4f} (fell by {first - last:.4f} nats), "
            "on conversations no participant trained on"
        )


def _show_sites(run: Run, pairs: dict[str, int]) -> None:
    history = run.history
    numbers = range(1, history.last_closed + 1)
    rows = []
    for name in sorted(history.members):
        turns = [row for n in numbers for row in run.round(n).sites if row.site == name]
        before, after = history.held_out(0).get(name), history.held_out(numbers[-1]).get(name)
        rows.append(
            (
                name,
                pairs.get(name),
                before.nll if before else None,
                after.nll if after else None,
                sum(row.tokens or 0 for row in turns),
                round(sum(row.seconds or 0.0 for row in turns)),
                megabytes(sum(row.bytes or 0 for row in turns)),
            )
        )
    columns = ("site", "pairs", "loss before", "loss after", "tokens", "seconds", "MB up")
    print_table("By site, over the whole run", columns, rows)
