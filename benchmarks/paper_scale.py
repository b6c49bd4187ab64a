"""What a round costs at the paper's size: Llama-2-7B in NF4, r = 64, five participants, one GPU.

    python benchmarks/paper_scale.py [--rounds 2] [--arms federated,central-steps] [--dir FOLDER]

The base has Llama-2-7B's shape and random weights, so that nothing need be fetched: seconds, memory
and bytes do not depend on a weight's value, and no loss here means anything. Settings are those of
``gradualdiff reproduce --preset paper`` but for the rounds, one learning rate and a handful of
WordNet's glosses, which a byte tokenizer makes longer than words would be. Prints the progress and
the tables of the reproduction. ``--shape tiny`` tries the script out. The base's 13.5 GB are drawn
on the GPU and kept on disk; each delta is 640 MB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the tiny model is the tests'

SHAPES = {
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 4096,
    },
    "tiny": {},
}


def make_model(folder: Path, shape: str) -> None:
    """A Llama of that shape with random bfloat16 weights, saved as any model is."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.tiny_model import make_tiny_model

    make_tiny_model(folder)
    (folder / "model.safetensors").unlink()
    config = LlamaConfig.from_pretrained(folder, **SHAPES[shape])
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    network.save_pretrained(folder)
    print(f"{sum(p.numel() for p in network.parameters()) / 1e9:.2f} billion weights")


def write_preset(path: Path, model: Path, rounds: int) -> None:
    """The preset paper over that base, made short."""
    from gradualdiff.demo.files import write_tables
    from gradualdiff.reproduction.presets import changed, load_preset

    short = changed(
        load_preset("paper"),
        str(model),
        rounds=rounds,
        batch_sizes=[4],
        learning_rates=[1e-4],
        examples=100,
        fields=["noun.animal", "noun.artifact"],
        prompts=1,
        reply_tokens=8,
    )
    tables = short.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    del tables["recommended"]  # costs what the paper's rule costs
    write_tables(path, tables)


def main() -> None:
    """Make the base, run the arms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--arms", default="federated,central-steps")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--dir", type=Path, help="keep base and reproduction here")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = (options.dir or Path(name)).resolve()
        model, preset = folder / "model", folder / "short.toml"
        began = time.monotonic()
        if not (model / "config.json").exists():
            # In a process of its own: what it holds of the GPU goes with it.
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                pool.submit(make_model, model, options.shape).result()
        print(f"the base was made in {time.monotonic() - began:.0f} s", flush=True)
        write_preset(preset, model, options.rounds)
        command = [
            sys.executable,
            "-m",
            "gradualdiff.cli.main",
            "reproduce",
            "--preset",
            str(preset),
        ]
        command += ["--arms", options.arms, "--dir", str(folder / "runs")]
        subprocess.run(command, cwd=ROOT, check=True)
        print(f"everything took {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
