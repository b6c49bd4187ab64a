"""The findings as the paper's tables: paper | ours, mean and standard deviation over seeds."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cli.reproduction import paper
from cli.reproduction.arms import ARMS
from cli.reproduction.figures import PHASES, ArmFigures, mean_and_sd, mean_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from cli.reproduction.experiment import Findings

DASH = "-"


@dataclass(frozen=True)
class ResultTable:
    """A table of text cells. ``note``: what differs from the paper, or what it means."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        """A heading, the table, its note."""
        lines = [f"### {self.title}", "", "| " + " | ".join(self.columns) + " |"]
        lines.append("|" + "|".join([" --- ", *(" ---: " for _ in self.columns[1:])]) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, "", self.note, ""] if self.note else [*lines, ""])


def make_tables(findings: Findings, model_bytes: int) -> list[ResultTable]:
    """Every table. ``model_bytes``: of the full base model in fp16."""
    groups = _groups(findings.figures)
    return [
        _rates(findings),
        _losses(groups),
        _texts(groups),
        _copies(groups),
        _seconds(groups),
        _traffic(groups, model_bytes),
        _differences(findings, groups),
    ]


def as_csv(tables: Iterable[ResultTable]) -> str:
    """All tables as rows of table, row, column, value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("table", "arm", "column", "value"))
    for table in tables:
        for row in table.rows:
            for column, value in zip(table.columns[1:], row[1:], strict=True):
                writer.writerow((table.title, row[0], column, value))
    return text.getvalue()


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


def _per(groups: Groups, row: Callable[[int, str, list[ArmFigures]], tuple[str, ...]]) -> Any:
    return [(ARMS[arm], str(size), *row(size, arm, mine)) for (size, arm), mine in groups.items()]


def _rates(findings: Findings) -> ResultTable:
    rows: list[tuple[str, ...]] = []
    for key, chosen in findings.rates.items():
        size, arm = key.split(" ")
        tried = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in chosen.tried.items()) or DASH
        edge = "at the edge of the grid" if chosen.at_edge else ""
        rows.append((ARMS[arm], size.removeprefix("b"), f"{chosen.rate:g}", tried, edge))
    return ResultTable(
        "Learning rates, chosen on dev with seed 1",
        ("arm", "batch", "chosen", "tried: loss on dev", ""),
        rows,
        "The grid is climbed from its middle for as long as the loss on dev falls.",
    )


def _losses(groups: Groups) -> ResultTable:
    def row(size: int, arm: str, mine: list[ArmFigures]) -> tuple[str, ...]:
        known = paper.TRAINING_LOSS.get(arm, {}).get(size)
        trained = [one for one in mine if one.rounds]
        return (
            f"{known[0]} → {known[1]}" if known else DASH,
            spread(one.rounds[0].client_nll for one in trained),
            spread(one.rounds[-1].client_nll for one in trained),
            *(spread(one.losses[name]["nll"] for one in mine) for name in ("train", "dev", "test")),
        )

    columns: tuple[str, ...] = ("arm", "batch", "paper: first → last round", "client, first round")
    columns += ("client, last round", "all training text", "dev", "held-out")
    return ResultTable("Table II: loss", columns, _per(groups, row), paper.DIFFERS["II"])


def _texts(groups: Groups) -> ResultTable:
    def row(size: int, arm: str, mine: list[ArmFigures]) -> tuple[str, ...]:
        del size
        test = [one.losses["test"] for one in mine]
        replies = [one.replies["test"] for one in mine]
        return (
            str(paper.PERPLEXITY.get(arm, DASH)),
            spread(one["perplexity"] for one in test),
            spread((one["nll_per_byte"] for one in test), 4),
            str(paper.BLEU.get(arm, DASH)),
            spread((one["bleu"] for one in replies), 2),
            spread((one["bleu"] / 100 for one in replies), 4),
            spread((one["chrf"] for one in replies), 2),
            spread((one.replies["train"]["bleu"] for one in mine), 2),
        )

    columns: tuple[str, ...] = ("arm", "batch", "paper: perplexity", "perplexity", "nats per byte")
    columns += ("paper: BLEU", "BLEU", "BLEU, 0 to 1", "chrF", "BLEU on training prompts")
    signature = next(iter(groups.values()))[0].replies["test"].get("bleu_signature", "")
    note = f"{paper.DIFFERS['III']} BLEU's signature: `{signature}`."
    return ResultTable("Table III: text, held out", columns, _per(groups, row), note)


def _copies(groups: Groups) -> ResultTable:
    names = ("copied_mean_characters", "copied_max_characters", "copied_copied")

    def row(size: int, arm: str, mine: list[ArmFigures]) -> tuple[str, ...]:
        del size, arm
        sides = (one for name in ("test", "train") for one in [[m.replies[name] for m in mine]])
        return tuple(spread((r[n] for r in side), 2) for side in sides for n in names)

    columns = (
        "arm",
        "batch",
        *(
            f"{text}: {what}"
            for text in ("held-out", "training")
            for what in ("mean", "longest", "share ≥ 50")
        ),
    )
    return ResultTable(
        "Longest substring of a reply that stands in a training answer, in characters",
        columns,
        _per(groups, row),
        "A figure for memorisation: how much of what it says a model has copied.",
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

    columns: tuple[str, ...] = (
        "arm",
        "batch",
        "paper: time per round",
        "side by side",
        "in turn",
        *PHASES,
    )
    columns += ("peak MB",)
    return ResultTable(
        "Table IV: seconds per round", columns, _per(trained, row), paper.DIFFERS["IV"]
    )


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

    columns = ("arm", "batch", "MB up", "MB down", "full model in fp16, MB", "times below it")
    return ResultTable(
        "Bytes of one participant in one round, objects and messages",
        columns,
        _per(moving, row),
        "Counted where a site fetches, uploads, sends and receives.",
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
        note += f" Largest difference of an element over all rounds and seeds: {largest:.3g}."
    return ResultTable(
        "Held-out loss against GradualDiff-Fed, paired by seed",
        ("arm", "batch", "nats", "%"),
        rows,
        note,
    )
