"""How much of LoRA's held-out gain a core adapter keeps, on the demo's model and text; one seed.

    python benchmarks/core_against_lora.py /tmp/arms
    python benchmarks/core_against_lora.py /tmp/arms --arm "core r=32" lora.kind=core lora.rank=32

Share of the gain = (base - arm) / (base - LoRA). An arm that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROUNDS, STEPS = 5, 4
LORA = "LoRA r=64"
EXACT = ["codec.name=fp32", "codec.down=whole"]  # no rounding beside what is compared
ARMS = {
    LORA: ["training.learning_rate=3e-3", *EXACT],
    "core r=64, bases of the weights": [
        "lora.kind=core",
        "lora.dropout=0",
        "training.learning_rate=1e-2",
        *EXACT,
    ],
}


def losses(folder: Path, sets: list[str]) -> list[float]:
    """Held-out nats per token after each round, from the base on. Makes the run, or goes on."""
    done = folder / "rounds.json"
    if not done.is_file():
        began, sets = time.monotonic(), [word for one in sets for word in ("--set", one)]
        known = (folder / "federation.toml").exists()
        options = [] if known else ["--rounds", str(ROUNDS), "--local-steps", str(STEPS), *sets]
        _call("demo", "--dir", str(folder), "--json", *options)
        rows = _call("rounds", "list", "demo-1", "--store", str(folder / "store"), "--json")
        done.write_text(rows, encoding="utf-8")
        print(f"{folder.name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return [row["held_out_nll"] for row in json.loads(done.read_text(encoding="utf-8"))]


def _call(*words: str) -> str:
    command = [sys.executable, "-m", "gradualdiff.cli.main", *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    """Print a line for each arm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arm", nargs="+", action="append", default=[], metavar="NAME SETTING ...")
    options = parser.parse_args()
    arms = ARMS | {name: sets for name, *sets in options.arm}
    found = {
        name: losses(options.folder / f"arm-{'-'.join(sets).replace('/', '-')}", sets)
        for name, sets in arms.items()
    }
    base, best = found[LORA][0], found[LORA][-1]
    print(f"base {base:.4f} nats, {ROUNDS} rounds of {STEPS} steps, one seed")
    for name, (_, *rest) in found.items():
        share = (base - rest[-1]) / (base - best)
        print(f"{name:40} {rest[-1]:.4f} nats, {share:6.1%} of LoRA's gain")


if __name__ == "__main__":
    main()
