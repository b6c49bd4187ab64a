"""The arms of ``gradualdiff tune-codec`` over the tests' tiny model, three seeds, for breadth.

    python benchmarks/thin_wire_tiny.py [--rounds 20] [--json FILE]

A Llama of two layers with random weights, over NF4, learns to count at two sites. Each arm's rate
is the best of three with seed 1, by the loss that is reported: there is no other held-out text.
Random weights have no directions of their own that a core's bases could hold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

from gradualdiff.tuning.arms import ARMS, Arm
from gradualdiff.tuning.comparing import Compared, compare_arms
from gradualdiff.tuning.outcomes import share_of_gain
from tests.tiny_model import make_tiny_model, write_federation

if TYPE_CHECKING:
    from collections.abc import Callable

SEEDS, STEPS, CORE_RANK = (1, 2, 3), (0.5, 1.0, 2.0), 16


def main() -> None:
    """Choose the rates, run the seeds, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        file = write_federation(Path(scratch), make_tiny_model(Path(scratch) / "model"))

        def run(arms: list[Arm], seed: int) -> Compared:
            return compare_arms(file, arms, given.rounds, [f"run.seed={seed}"])

        chosen = [tuned(arm, run) for arm in ARMS.values()]
        found = {seed: run(chosen, seed) for seed in SEEDS}
    lines: list[dict[str, Any]] = []
    for at, arm in enumerate(chosen):
        shares = [
            share_of_gain(one.base, one.arms[0].loss, one.arms[at].loss) for one in found.values()
        ]
        first = found[SEEDS[0]].arms[at]
        lines.append({"arm": arm.name, "rate": first.rate, "up": first.up, "down": first.down})
        lines[-1]["shares"] = shares
    print(
        "| arm | rate | up, B | down, B | share of gain | by seed |\n|---|---:|---:|---:|---:|---|"
    )
    for line in lines:
        told = ", ".join(f"{share:.1%}" for share in line["shares"])
        print(
            f"| {line['arm']} | {line['rate']:g} | {line['up']:,.0f} | {line['down']:,.0f} "
            f"| **{mean(line['shares']):.1%}** | {told} |"
        )
    if given.json:
        given.json.write_text(json.dumps(lines, indent=1) + "\n")


def tuned(arm: Arm, run: Callable[[list[Arm], int], Compared]) -> Arm:
    """The arm at the best of its rates with the first seed."""
    if arm.name == "core":
        arm = replace(arm, sets=(*arm.sets, f"lora.rank={CORE_RANK}"))
    arms = [replace(arm, rate=arm.rate * step) for step in STEPS]
    outcomes = run(arms, SEEDS[0]).arms
    best = min(outcomes, key=lambda one: float("inf") if one.loss is None else one.loss)
    return arms[outcomes.index(best)]


if __name__ == "__main__":
    main()
