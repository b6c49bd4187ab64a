"""The tally as Markdown, and its place in the documentation."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from tests.chaos.kinds import KINDS

if TYPE_CHECKING:
    from tests.chaos.storm import Tally

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "failure-model.md"


def markdown(tally: Tally) -> str:
    """Two tables: what fell, and what came of it."""
    lines = [f"`python -m tests.chaos --seed {tally.seed} --faults {tally.faults}`:", ""]
    lines += ["| fault | fired | known by |", "|---|---:|---|"]
    lines += [f"| {k.name} | {tally.fired[k.name]} | {k.evidence} |" for k in KINDS]
    lines += [f"| **all** | **{tally.fired.total()}** | |", ""]
    rows = (
        ("runs completed", tally.runs),
        ("final adapters equal to the undisturbed run's", tally.digests_equal),
        ("runs where a lost workspace took a residual with it, as a record says",
         tally.residuals_lost),
        ("runs that carry late deltas: both coordinators agree, verify recomputes every round",
         tally.carrying),
        ("late deltas that counted in a later round, once", tally.carried),
        ("rounds closed", tally.rounds),
        ("trainings counted, each once", tally.trainings),
        ("finished rounds trained again", tally.finished_again),
        ("trainings cut short by a kill and begun anew", tally.unfinished),
        ("trainings killed between the last byte of the delta and its commit", tally.again),
        ("finished trainings done again, since the workspace was lost", tally.relearned),
        ("frozen coordinators that the standby took over from", tally.replaced),
        ("processes that ended by themselves (their account was deleted) and were restarted",
         tally.exits),
        ("seconds per run, median and longest",
         f"{median(tally.seconds):.0f}, {max(tally.seconds):.0f}"),
        ("minutes in all", f"{tally.whole_seconds / 60:.0f}"),
    )  # fmt: skip
    lines += ["| outcome | |", "|---|---:|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(lines) + "\n"


def write_block(name: str, text: str, page: Path = PAGE) -> None:
    """Put text between the markers ``name``; the rest of the page stays as it is."""
    first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, begin, rest = page.read_text().partition(first)
    _, end, tail = rest.partition(last)
    assert (begin, end) == (first, last), f"{page}: expected {first} and {last}"
    page.write_text(f"{head}{first}\n{text}{last}{tail}")
