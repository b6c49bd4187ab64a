"""The sweep that the demo's learning rate was chosen from: the whole demo at several rates.

    python benchmarks/learning_rate_sweep.py --dir sweep --rates 0.001 0.003 0.006

Each rate is a run of ``gradualdiff demo`` in a folder of its own, about four minutes on two cores;
a folder that holds a finished run is read and not run again. The baseline is round 0: the base
model under the untrained adapter. Prints a Markdown table of held-out loss by round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

# What a rate does, and no rounding beside it.
EXACT = ["--set", "codec.name=fp32", "--set", "codec.down=whole"]


def rounds_of(folder: Path) -> list[dict[str, float]]:
    """Each round of the folder's first run; empty when there is no finished one."""
    command = [sys.executable, "-m", "gradualdiff.cli.main"]
    store = ["--store", str(folder / "store"), "--json"]
    listed = subprocess.run(
        [*command, "runs", "list", *store], capture_output=True, text=True, check=False
    )
    runs = json.loads(listed.stdout) if listed.returncode == 0 else []
    if not runs or runs[0]["state"] != "finished":
        return []
    shown = subprocess.run(
        [*command, "rounds", "list", runs[0]["run"], *store],
        capture_output=True,
        text=True,
        check=True,
    )
    rounds: list[dict[str, float]] = json.loads(shown.stdout)
    return rounds


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("sweep"))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.001, 0.003, 0.006])
    options = parser.parse_args()
    lines = []
    for rate in options.rates:
        folder = options.dir / f"rate-{rate:g}"
        if not rounds_of(folder):
            command = [sys.executable, "-m", "gradualdiff.cli.main", "demo", "--dir", str(folder)]
            command += ["--learning-rate", str(rate), *EXACT]
            subprocess.run(command, check=True)
        losses = [r["held_out_nll"] for r in rounds_of(folder)]
        lines.append((rate, losses))
    count = len(lines[0][1])
    print("| learning rate | base | " + " | ".join(f"round {n}" for n in range(1, count)) + " |")
    print("|---:|" + "---:|" * count)
    for rate, losses in lines:
        print(f"| {rate:g} | " + " | ".join(f"{loss:.4f}" for loss in losses) + " |")


if __name__ == "__main__":
    main()
