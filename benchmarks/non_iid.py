"""Text that differs between participants, on a tiny model: quick enough for several seeds.

    python benchmarks/non_iid.py [--seeds 3] [--dir FOLDER]

A tiny Llama with random weights learns WordNet's glosses by ``gradualdiff reproduce --non-iid``,
with the preset below. Prints the losses of all arms and the table over alpha. The real model's:
``gradualdiff reproduce --preset cpu --non-iid``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the tiny model is the tests'

PRESET = """
[reproduce]
participants = 5
rounds = 6
local_steps = 12
batch_sizes = [4]
learning_rates = [3e-4, 1e-3, 3e-3, 1e-2]
examples = 600
fields = ["noun.animal", "noun.artifact", "noun.body", "noun.food", "noun.plant"]
alphas = [0.1, 1.0, 100.0]
prompts = 4
reply_tokens = 4
[base]
model = {model}
quantisation = "none"
[lora]
rank = 16
dropout = 0.0
[training]
max_grad_norm = 1.0
max_prompt_tokens = 64
max_answer_tokens = 48
cpu_threads = 2
[recommended.lora]
scaling = "rslora"
"""


def main() -> None:
    """Run it, print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="keep the reproduction here")
    options = parser.parse_args()
    from gradualdiff.reproduction.tables import ResultTable
    from tests.tiny_model import make_tiny_model

    with tempfile.TemporaryDirectory() as name:
        folder = options.dir or Path(name) / "reproduction"
        model = make_tiny_model(Path(name) / "model")
        preset = Path(name) / "tiny.toml"
        preset.write_text(PRESET.format(model=json.dumps(str(model))))
        command = [
            sys.executable,
            "-m",
            "gradualdiff.cli.main",
            "reproduce",
            "--preset",
            str(preset),
        ]
        command += ["--non-iid", "--seeds", str(options.seeds), "--dir", str(folder), "--json"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        for table in json.loads(done.stdout)["tables"]:
            if table["title"].startswith(("Table II:", "Held-out", "Learning")):
                print(ResultTable(**table).markdown())


if __name__ == "__main__":
    main()
