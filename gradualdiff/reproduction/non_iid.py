"""The paper's future work as a table: federated against local and central training over alpha."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from gradualdiff.reproduction.arms import ARMS, number_word
from gradualdiff.reproduction.experiment import Experiment
from gradualdiff.reproduction.tables import ResultTable, spread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradualdiff.reproduction.data import Source
    from gradualdiff.reproduction.experiment import Findings
    from gradualdiff.reproduction.running import Laboratory

PARTITIONED = ("local", "federated", "recommended")  # the others see all text in any case


def compare_partitions(
    laboratory: Laboratory, source: Source, seeds: Sequence[int], whole: Experiment
) -> tuple[ResultTable, dict[float, Findings]]:
    """Dirichlet partitions of the preset's alphas, each with the rates found by ``whole``.

    The table, and all that was found by alpha.
    """
    sizes = laboratory.preset.reproduce
    size = sizes.batch_sizes[0]
    arms = [arm for arm in PARTITIONED if f"b{size} {arm}" in whole.findings.rates]
    central = [arm for arm in ("central-steps", "central-batch") if _has(whole, arm)]

    def row(word: str, alpha: float | None, part: Experiment) -> tuple[str, ...]:
        cells = [spread(source.distance(seed, alpha) for seed in seeds)]
        cells += [_held_out(part, arm, size) for arm in arms]
        cells += [_held_out(whole, arm, size) for arm in central]
        return (word, *cells)

    rows = [row(sizes.partition, None, whole)]
    found: dict[float, Findings] = {}
    for alpha in sorted(sizes.alphas, reverse=True):
        name = f"-a{number_word(alpha)}"
        part = Experiment(laboratory, partial(source.folder, alpha=alpha), name)
        part.run(arms, seeds, size, whole.findings.rates)
        found[alpha] = part.findings
        rows.append(row(f"{alpha:g}", alpha, part))
    columns = ("alpha", "distance of texts", *(ARMS[arm] for arm in (*arms, *central)))
    table = ResultTable(
        f"Held-out loss where participants' text differs, batch {size}",
        columns,
        rows,
        "The preset's own partition, and Dirichlet ones over the labels: the smaller alpha, the "
        "more each participant's text is of its own kind. The distance is the Jensen-Shannon "
        "distance of the participants' word distributions, 0 (equal) to 1. Learning rates are "
        "those chosen on the preset's own partition. Central training sees all text, whatever "
        "the partition.",
    )
    return table, found


def _has(experiment: Experiment, arm: str) -> bool:
    return any(one.arm == arm for one in experiment.findings.figures)


def _held_out(experiment: Experiment, arm: str, size: int) -> str:
    figures = experiment.findings.figures
    mine = [one for one in figures if (one.arm, one.batch_size) == (arm, size)]
    return spread(one.losses["test"]["nll"] for one in mine)
