"""What svd costs at LLaMA-2-7B's size: seconds and memory, beside plain averaging.

The shape is that of ``closing_memory.py``: r=64 on 7 linear layers of each of 32 blocks, 448
tensors, 159,907,840 values. Each mode closes the same round in a process of its own, with one layer
in memory for each thread and one being written; ``growth`` is of anonymous memory. ``processor`` is
what all threads computed, which other work on the machine hardly changes; ``whole`` is the wall's.

    python benchmarks/factor_fit_seconds.py [--dir FOLDER] [--participants 5] [--threads 2]

Needs Linux and some 5 GB of disk. Aim of svd: below 600 MB. Aim of the gap: closing a round with it
takes at most twice as long as without.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from closing_memory import close_round, generate

from coordinator.aggregation import closing
from coordinator.aggregation.closing import Method
from shared.config import AggregationSection

NO_GAP = "fedavg, no gap"
MODES = {
    NO_GAP: Method(AggregationSection()),
    "fedavg": Method(AggregationSection()),
    "svd": Method(AggregationSection(averaging="svd")),
}


def main() -> None:
    """Generate the files, close the round in each mode, print the table."""
    parser = argparse.ArgumentParser(description="Seconds and memory of svd.")
    parser.add_argument("--dir", type=Path, default=None, help="where the files go for a while")
    parser.add_argument("--participants", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=list(MODES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only is not None:
        method = MODES[given.only]
        if given.only == NO_GAP:
            closing.squared_gap = lambda *_: 0.0  # the rest of the closing is left
        print(json.dumps(close_round(given.dir, given.participants, given.threads, method)))
        return
    if given.dir is not None:
        given.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.dir, prefix="fit-") as name:
        generate(Path(name), given.participants)
        print(f"{'mode':<16}{'processor s':>12}{'whole s':>9}{'growth MB':>11}", flush=True)
        for mode in MODES:
            found = closed(Path(name), mode, given.participants, given.threads)
            print(
                f"{mode:<16}{found['processor']:>12.1f}{found['whole']:>9.1f}"
                f"{found['growth_mb']:>11.0f}",
                flush=True,
            )


def closed(folder: Path, mode: str, participants: int, threads: int) -> dict[str, float]:
    """The round closed in a fresh process: seconds by phase, growth of memory in MB."""
    command = [
        sys.executable, __file__, "--dir", str(folder), "--only", mode,
        "--participants", str(participants), "--threads", str(threads),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    values: dict[str, float] = json.loads(done.stdout)
    return values


if __name__ == "__main__":
    main()
