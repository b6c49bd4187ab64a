"""The findings as the paper's tables: paper | ours, mean and standard deviation over seeds."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gradualdiff.reproduction import paper
from gradualdiff.reproduction.arms import ARMS
from gradualdiff.reproduction.figures import PHASES, ArmFigures, mean_and_sd, mean_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from gradualdiff.reproduction.experiment import Findings

DASH = "-"
BY_ARM: tuple[str, ...] = ("arm", "batch")
EQUAL_BATCHES = (
    "All arms train on as many examples; answer tokens differ a little, as the examples do that "
    "an arm's order puts into them."
)
OF_LOCAL = (
    "Of participants alone every figure is the mean over them: of their perplexities, not exp of "
    "their mean loss."
)


@dataclass(frozen=True)
class ResultTable:
    """A table of text cells. ``note``: what differs from the paper, or what it means.

    ``keys``: so many columns, the first ones, say which row it is.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""
    keys: int = 1

    def markdown(self) -> str:
        """A heading, the table, its note."""
        lines = [f"### {self.title}", "", "| " + " | ".join(self.columns) + " |"]
        lines.append("|" + "|".join([" --- ", *(" ---: " for _ in self.columns[1:])]) + "|")
        lines += ["| " + " | ".join(map(_in_markdown, row)) + " |" for row in self.rows]
        return "\n".join([*lines, "", self.note, ""] if self.note else [*lines, ""])


def make_tables(findings: Findings, model_bytes: int) -> list[ResultTable]:
    """Every table that has a row. ``model_bytes``: of the full base model in fp16."""
    groups = _groups(findings.figures)
    tables = [
        _rates(findings),
        _losses(groups),
        _texts(groups),
        _copies(groups),
        _seconds(groups),
        _traffic(groups, model_bytes),
        _differences(findings, groups),
    ]
    return [table for table in tables if table.rows]


def as_csv(tables: Iterable[ResultTable]) -> str:
    """All tables, a cell in a line. A row is named by its keys: ``arm=local only, batch=4``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("table", "row", "column", "value"))
    for table in tables:
        for row in table.rows:
            named = [*zip(table.columns, row, strict=True)]
            key = ", ".join(f"{column}={cell}" for column, cell in named[: table.keys])
            for column, value in named[table.keys :]:
                writer.writerow((table.title, key, column, value))
    return text.getvalue()


def _in_markdown(cell: str) -> str:
    """A label is the user's text: it may hold what would end the cell or the line."""
    return " ".join(cell.replace("|", "\\|").split())


Groups = dict[tuple[int, str], list[ArmFigures]]


def _groups(figures: Sequence[ArmFigures]) -> Groups:
    """By batch size and arm, in the order of ARMS; every list in the order of seeds."""
    found: Groups = {}
    for size in sorted({one.batch_size for one in figures}):
        for arm in ARMS:
            mine = [one for one in figures if (one.batch_size, one.arm) == (size, arm)]
            if mine:
                found[size, arm] = sorted(mine, key=lambda one: one.seed)
    return found


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """Mean and standard deviation of what is known, as a cell."""
    known = [value for value in values if value is not None]
    if not known:
        return DASH
    mean, deviation = mean_and_sd(known)
    text = f"{mean:.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def _by_arm(
    title: str,
    columns: tuple[str, ...],
    groups: Groups,
    row: Callable[[int, str, list[ArmFigures]], tuple[str, ...]],
    note: str,
) -> ResultTable:
    rows = [(ARMS[arm], str(size), *row(size, arm, mine)) for (size, arm), mine in groups.items()]
    return ResultTable(title, columns, rows, note, keys=len(BY_ARM))


def _rates(findings: Findings) -> ResultTable:
    rows: list[tuple[str, ...]] = []
    for key, chosen in findings.rates.items():
        size, arm = key.split(" ")
        tried = ", ".join(
            f"{rate:g}: {'diverged' if loss is None else format(loss, '.3f')}"
            for rate, loss in chosen.tried.items()
        )
        edge = "at the edge of the grid" if chosen.at_edge else ""
        rows.append((ARMS[arm], size.removeprefix("b"), f"{chosen.rate:g}", tried or DASH, edge))
    note = (
        "The grid is climbed from its middle for as long as the loss on dev falls. Of participants "
        "alone the first one's loss decides."
    )
    if findings.diverged:
        note += f" Diverged, and in no figure: {'; '.join(findings.diverged)}."
    return ResultTable(
        "Learning rates, chosen on dev with seed 1",
        (*BY_ARM, "chosen", "tried: loss on dev", "remark"),
        rows,
        note,
        keys=len(BY_ARM),
    )


def _losses(groups: Groups) -> ResultTable:
    def row(size: int, arm: str, mine: list[ArmFigures]) -> tuple[str, ...]:
        known = paper.TRAINING_LOSS.get(arm, {}).get(size)
        trained = [one for one in mine if one.rounds]
        return (
            f"{known[0]} → {known[1]}" if known else DASH,
            spread(one.rounds[0].client_nll for one in trained),
            spread(one.rounds[-1].client_nll for one in trained),
            spread((one.tokens for one in trained), 0),
            *(spread(one.losses[name]["nll"] for one in mine) for name in ("train", "dev", "test")),
        )

    columns = (*BY_ARM, "paper: first → last round", "client, first round", "client, last round")
    columns += ("tokens trained on", "all training text", "dev", "held-out")
    return _by_arm("Table II: loss", columns, groups, row, f"{paper.DIFFERS['II']} {EQUAL_BATCHES}")


def _texts(groups: Groups) -> ResultTable:
    def row(size: int, arm: str, mine: list[ArmFigures]) -> tuple[str, ...]:
        del size
        test = [one.losses["test"] for one in mine]
        replies = [one.replies["test"] for one in mine]
        return (
            str(paper.PERPLEXITY.get(arm, DASH)),
            spread(one.get("perplexity") for one in test),
            spread((one["nll_per_byte"] for one in test), 4),
            str(paper.BLEU.get(arm, DASH)),
            spread((one["bleu"] for one in replies), 2),
            spread((one["bleu"] / 100 for one in replies), 4),
            spread((one["chrf"] for one in replies), 2),
            spread((one.replies["train"]["bleu"] for one in mine), 2),
        )

    columns = (*BY_ARM, "paper: perplexity", "perplexity", "nats per byte")
    columns += ("paper: BLEU", "BLEU", "BLEU, 0 to 1", "chrF", "BLEU on training prompts")
    signature = next(iter(groups.values()))[0].replies["test"].get("bleu_signature", "")
    note = f"{paper.DIFFERS['III']} {OF_LOCAL} BLEU's signature: `{signature}`."
    return _by_arm("Table III: text, held out", columns, groups, row, note)


def _copies(groups: Groups) -> ResultTable:
    names = {"copied_mean_characters": 2, "copied_max_characters": 0, "copied_copied": 2}

    def row(size: int, arm: str, mine: list[ArmFigures]) -> tuple[str, ...]:
        del size, arm
        sides = (one for name in ("test", "train") for one in [[m.replies[name] for m in mine]])
        return tuple(
            spread((r[name] for r in side), digits)
            for side in sides
            for name, digits in names.items()
        )

    columns = (
        *BY_ARM,
        *(
            f"{text}: {what}"
            for text in ("held-out", "training")
            for what in ("mean", "longest", "share ≥ 50")
        ),
    )
    return _by_arm(
        "Longest substring of a reply that stands in a training answer, in characters",
        columns,
        groups,
        row,
        "A figure for memorisation: how much of what it says a model has copied. The longest of "
        "participants alone is that of any of them.",
    )


def _seconds(groups: Groups) -> ResultTable:
    trained = {key: mine for key, mine in groups.items() if mine[0].rounds}

    def row(size: int, arm: str, mine: list[ArmFigures]) -> tuple[str, ...]:
        del size
        parallel = [mean_of([one.parallel for one in m.rounds]) for m in mine]
        in_turn = [mean_of([one.in_turn for one in m.rounds]) for m in mine]
        return (
            str(paper.SECONDS.get(arm, DASH)),
            spread((math.fsum(one.values()) for one in parallel), 2),
            spread((math.fsum(one.values()) for one in in_turn), 2),
            *(spread((one[name] for one in parallel), 2) for name in PHASES),
            spread((one.peak_bytes.get("resident", 0) / 1e6 for one in mine), 0),
        )

    columns = (*BY_ARM, "paper: time per round", "side by side", "in turn", *PHASES, "peak MB")
    return _by_arm("Table IV: seconds per round", columns, trained, row, paper.DIFFERS["IV"])


def _traffic(groups: Groups, model_bytes: int) -> ResultTable:
    moving = {key: mine for key, mine in groups.items() if mine[0].bytes_up is not None}

    def row(size: int, arm: str, mine: list[ArmFigures]) -> tuple[str, ...]:
        del size, arm
        up = [one.bytes_up or 0.0 for one in mine]
        down = [one.bytes_down or 0.0 for one in mine]
        return (
            spread((one / 1e6 for one in up), 3),
            spread((one / 1e6 for one in down), 3),
            f"{model_bytes / 1e6:.1f}",
            spread((model_bytes / one for one in up), 1),
        )

    columns = (*BY_ARM, "MB up", "MB down", "full model in fp16, MB", "times below it (up)")
    return _by_arm(
        "Bytes of one participant in one round, objects and messages",
        columns,
        moving,
        row,
        "Counted where a site fetches, uploads, sends and receives: all of a run, the last "
        "adapter's fetch after the last round and what an interruption made it move twice "
        "included, by rounds and participants.",
    )


def _differences(findings: Findings, groups: Groups) -> ResultTable:
    rows: list[tuple[str, ...]] = []
    for (size, arm), mine in groups.items():
        other = groups.get((size, "federated"))
        if other is None or arm == "federated":
            continue
        by_seed = {one.seed: one.losses["test"]["nll"] for one in other}
        gaps = [m.losses["test"]["nll"] - by_seed[m.seed] for m in mine if m.seed in by_seed]
        parts = [m.losses["test"]["nll"] / by_seed[m.seed] - 1 for m in mine if m.seed in by_seed]
        rows.append((ARMS[arm], str(size), spread(gaps, 4), spread((100 * p for p in parts), 2)))
    largest = max(findings.differences.values(), default=None)
    note = paper.CLAIMS
    if largest is not None:
        note += (
            " Both are computed here from the same trainings. Largest difference of an element "
            f"over all rounds and seeds: {largest:.3g}."
        )
    return ResultTable(
        "Held-out loss against GradualDiff-Fed, paired by seed",
        (*BY_ARM, "nats", "%"),
        rows,
        note,
        keys=len(BY_ARM),
    )
