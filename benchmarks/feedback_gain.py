"""What error feedback is for: how much of a run's gain each codec misses, without and with it.

    python benchmarks/feedback_gain.py [--rounds 25 100] [--sites 3] [--way 0.125]

A toy, in seconds: each site goes a part (``--way``) of the way to a goal of its own in every round,
and the coordinator adds the mean of the deltas as they travelled. The gain is that of the squared
distance from the mean goal; fp32, the baseline, misses only what the rounds leave. The sites' goals
differ, so that their deltas do not vanish. Prints a Markdown table. It shows the mechanism; how
much of a language model's gain a codec keeps is another question.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from shared import modes
from shared.protocol.manifest import TensorSpec
from shared.seeds import derive_seed
from shared.tensors.codecs import get_codec

if TYPE_CHECKING:
    from numpy.typing import NDArray

VALUES = 8192


def missed(codec_name: str, sites: int, rounds: int, way: float, *, feedback: bool) -> float:
    """1 - gain of the run by the best one there is."""
    codec = get_codec(codec_name)
    spec = TensorSpec(name="x", shape=(VALUES,), init="zeros")
    draw = np.random.Generator(np.random.Philox(5))
    common = draw.standard_normal(VALUES, dtype=np.float32)
    goals = [common + draw.standard_normal(VALUES, dtype=np.float32) for _ in range(sites)]
    residuals: list[NDArray[Any]] = [np.zeros(VALUES, np.float32) for _ in range(sites)]
    weights = np.zeros(VALUES, np.float32)
    for number in range(rounds):
        sent = []
        for site, goal in enumerate(goals):
            wanted = (goal - weights) * np.float32(way) + residuals[site]
            parts = codec.encode(spec, wanted, derive_seed(number, site))
            sent.append(np.array(codec.decode(spec, parts)))
            if feedback:
                residuals[site] = wanted - sent[-1]
        weights = weights + np.mean(sent, axis=0, dtype=np.float32)
    best = np.mean(goals, axis=0)
    return float(np.sum((weights - best) ** 2) / np.sum(best**2))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, nargs="+", default=[25, 100])
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--way", type=float, default=1 / 8)
    given = parser.parse_args()
    heads = [f"{n} rounds, {how}" for n in given.rounds for how in ("without", "with")]
    print("| codec | " + " | ".join(heads) + " |")
    print("|---|" + "---:|" * len(heads))
    for name in sorted(modes.names("codecs"), key=lambda name: (not get_codec(name).exact, name)):
        found = [
            missed(name, given.sites, rounds, given.way, feedback=on)
            for rounds in given.rounds
            for on in (False, True)
        ]
        print(f"| {name} | " + " | ".join(f"{share:.2%}" for share in found) + " |")


if __name__ == "__main__":
    main()
