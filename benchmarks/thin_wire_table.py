"""The table and the picture of what ``thin_wire.py`` has found so far, and what is missing.

    python benchmarks/thin_wire_table.py [RESULTS.json] [--picture FILE] [--into PAGE]

Share of the gain = (base - arm) / (base - fp32), of test losses after the last round, of one seed;
means over the seeds that both have. Bytes are those of one site in one round on SmolLM2-135M, file
headers included; for LLaMA-2-7B see ``thin_wire_sizes.py``. ``other``: how much the loss on text of
another kind rose (+) or fell.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from thin_wire import ROUNDS, TUNED_AFTER
from thin_wire_arms import ARMS

from gradualdiff.tuning.outcomes import Outcome, frontier, share_of_gain

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).parent / "results"
SEEDS = (1, 2, 3)
MARK = "<!-- table -->"
Result = dict[str, Any]


def finished(whole: Result) -> dict[str, dict[int, Result]]:
    """By arm and seed, at the arm's own rate, those that went to the end."""
    found: dict[str, dict[int, Result]] = {}
    for one in whole["results"]:
        if one["rounds"] == ROUNDS and one["rate"] == whole["rates"].get(one["arm"]):
            found.setdefault(one["arm"], {})[one["seed"]] = one
    return found


def outcomes(whole: Result, base: Result) -> Iterator[tuple[Outcome, list[float | None], Result]]:
    """Each arm's means, its shares by seed, and one of its results."""
    found = finished(whole)
    reference = found.get("fp32", {})
    for name, case in ARMS.items():
        seeds = {seed: one for seed, one in found.get(name, {}).items() if "test" in one}
        both = [seed for seed in SEEDS if seed in seeds and seed in reference]
        if not both:
            continue
        shares = [
            share_of_gain(base["test"], reference[seed]["test"], seeds[seed]["test"])
            for seed in both
        ]
        known = [share for share in shares if share is not None]
        yield (
            Outcome(
                name,
                case.arm.says,
                whole["rates"][name],
                seeds[both[0]]["values"],
                mean(seeds[seed]["up"] for seed in both),
                mean(seeds[seed]["down"] for seed in both),
                mean(seeds[seed]["test"] for seed in both),
                mean(known) if known else None,
            ),
            shares,
            {"other": mean(seeds[seed]["other"] - base["other"] for seed in both)},
        )


def thousands(count: float) -> str:
    """Bytes as kB."""
    return f"{count / 1000:,.1f}"


def paired(arms: list[Outcome], base: float) -> list[Outcome]:
    """With the losses that their shares would be of fp32's mean: seeds differ, and not all ran."""
    (reference,) = (one.loss for one in arms if one.arm == "fp32")
    assert reference is not None  # it went to the end
    return [
        replace(one, loss=base - one.share * (base - reference)) if one.share is not None else one
        for one in arms
    ]


def lines(whole: Result, base: Result) -> Iterator[str]:
    """The tables, as Markdown."""
    rows = list(outcomes(whole, base))
    best = {one.arm for one in frontier(paired([arm for arm, _, _ in rows], base["test"]))}
    yield (
        f"Base model: {base['test']:.4f} nats a token on test, {base['other']:.4f} on other text. "
        f"{ROUNDS} rounds, {whole['sites']} sites.\n"
    )
    yield (
        "| arm | rate | numbers | up, kB | down, kB | test loss | share of gain | seeds 1, 2, 3 "
        "| other | best for its bytes |\n|---|---:|---:|---:|---:|---:|---:|---|---:|---|"
    )
    for arm, shares, more in rows:
        told = ", ".join("-" if share is None else f"{share:.1%}" for share in shares)
        share = "-" if arm.share is None else f"**{arm.share:.1%}**"
        yield (
            f"| {arm.says} | {arm.rate:g} | {arm.values:,} | {thousands(arm.up)} "
            f"| {thousands(arm.down)} | {arm.loss:.4f} | {share} | {told} | {more['other']:+.3f} "
            f"| {'yes' if arm.arm in best else ''} |"
        )
    yield f"\nRates that were tried with seed 1, and the loss on dev after {TUNED_AFTER} rounds:\n"
    yield "| arm | rates |\n|---|---|"
    for name, case in ARMS.items():
        tried = sorted(
            (one["rate"], one["dev"].get(str(TUNED_AFTER)))
            for one in whole["results"]
            if one["arm"] == name and one["seed"] == 1
        )
        told = ", ".join(f"{r:g}: {'diverged' if d is None else f'{d:.3f}'}" for r, d in tried)
        if tried:
            yield f"| {case.arm.says} | {told} |"
    found = finished(whole)
    missing = {n: [str(s) for s in SEEDS if s not in found.get(n, {})] for n in ARMS}
    told = "; ".join(f"{name} {', '.join(seeds)}" for name, seeds in missing.items() if seeds)
    if told:
        yield f"\nSeeds that were not run yet: {told}."


def main() -> None:
    """Print, write into a page, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS / "thin_wire.json")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--into", type=Path, help="a page with the marks <!-- table --> in it")
    given = parser.parse_args()
    whole = json.loads(given.results.read_text())
    (base,) = (one for one in whole["results"] if one["arm"] == "base")
    text = "\n".join(lines(whole, base))
    print(text)
    if given.into:
        before, _, after = given.into.read_text().split(MARK)
        given.into.write_text(f"{before}{MARK}\n{text}\n{MARK}{after}")
    if given.picture:
        from gradualdiff.figures.frontier import write_frontier

        arms = paired([arm for arm, _, _ in outcomes(whole, base)], base["test"])
        write_frontier(arms, frontier(arms), base["test"], given.picture)


if __name__ == "__main__":
    main()
