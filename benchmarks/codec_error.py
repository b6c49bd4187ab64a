"""What each codec costs in bytes and in error, on real deltas; fp32 is the baseline.

    python benchmarks/codec_error.py [--model FOLDER] [--sites 5] [--steps 30]

Without ``--model``: the tests' tiny Llama, in seconds. Each site trains from one adapter on text of
its own, with the product's loop and codecs. Prints a Markdown table: bytes per value and in all;
the rms of (decoded - delta) by that of the delta, for one site and for the mean over sites; the
same for normally distributed values, one site; seconds to encode. At 100 % nothing would have been
lost by sending nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from participant.data import TokenisedExample
from participant.learner.training import Beginning, RoundPlace, train_round
from participant.model import LocalModel, settle_threads
from shared import modes
from shared.config import BaseSection, LoraSection, TrainingSection
from shared.protocol.manifest import TensorSpec
from shared.seeds import derive_seed
from shared.tensors.codecs import get_codec

Delta = dict[str, np.ndarray]


def train_sites(folder: Path, sites: int, steps: int) -> tuple[LocalModel, list[Delta]]:
    """The model, and each site's delta after ``steps`` steps from one adapter."""
    settle_threads(2)
    base = BaseSection(model=str(folder), quantisation="none", compute_dtype="float32")
    model = LocalModel(base, LoraSection(rank=8), torch.device("cpu"))
    specs = {spec.name: spec for spec in model.manifest().tensors}
    drawn = np.random.Generator(np.random.Philox(1))
    source = {
        name: np.zeros(spec.shape, np.float32)
        if spec.init == "zeros"
        else drawn.uniform(-1, 1, spec.shape).astype(np.float32) / np.float32(spec.shape[1] ** 0.5)
        for name, spec in specs.items()
    }
    settings = TrainingSection(local_steps=steps, batch_size=4, learning_rate=1e-3)
    deltas = []
    for site in range(sites):
        model.load_adapter(source.__getitem__)
        place = RoundPlace(f"site-{site}", 1, 1, 0.0, 0.1)
        train_round(
            model,
            texts(model, site),
            settings,
            place,
            begin=Beginning(),
            should_stop=lambda: False,
            report=lambda _: None,
        )
        deltas.append({name: model.read(name) - source[name] for name in specs})
    return model, deltas


def texts(model: LocalModel, site: int) -> list[TokenisedExample]:
    """Counting in words, from another number at each site."""
    lines = [f"After {n} comes {n + site + 1}, and then {n + 2 * site + 2}." for n in range(40)]
    rows = [model.tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    return [TokenisedExample(tuple(row), 4) for row in rows]


def measure(name: str, model: LocalModel, deltas: list[Delta]) -> tuple[float, ...]:
    """Bytes of one delta, its relative rms error, that of the mean, seconds to encode one."""
    codec, specs = get_codec(name), model.manifest().tensors
    size = square = error = mean_square = mean_error = seconds = 0.0
    for spec in specs:
        total, decoded_total = np.zeros(spec.shape), np.zeros(spec.shape)
        for site, delta in enumerate(deltas):
            began = time.perf_counter()
            parts = codec.encode(spec, delta[spec.name], derive_seed(1, site, spec.name))
            seconds += time.perf_counter() - began
            decoded = codec.decode(spec, parts).astype(np.float64)
            size += sum(part.nbytes for part in parts)
            square += float((delta[spec.name].astype(np.float64) ** 2).sum())
            error += float(((decoded - delta[spec.name]) ** 2).sum())
            total += delta[spec.name]
            decoded_total += decoded
        mean_square += float((total**2).sum())
        mean_error += float(((decoded_total - total) ** 2).sum())
    each = len(deltas)
    return (
        size / each,
        (error / square) ** 0.5,
        (mean_error / mean_square) ** 0.5,
        seconds / each,
    )


def on_normal_values(name: str) -> float:
    """The relative rms error on a million values of one normal distribution."""
    values = np.random.Generator(np.random.Philox(2)).standard_normal(2**20).astype(np.float32)
    codec, spec = get_codec(name), TensorSpec(name="w", shape=values.shape, init="zeros")
    decoded = codec.decode(spec, codec.encode(spec, values, 1)).astype(np.float64)
    return float(
        np.sqrt(((decoded - values) ** 2).mean() / (values.astype(np.float64) ** 2).mean())
    )


def main() -> None:
    """Train, encode with every codec there is, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--sites", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model
        if folder is None:
            from tests.tiny_model import make_tiny_model

            folder = make_tiny_model(Path(scratch) / "tiny")
        model, deltas = train_sites(folder, options.sites, options.steps)
    values = sum(spec.elements for spec in model.manifest().tensors)
    print(f"{values:,} values, {options.sites} sites, {options.steps} steps\n")
    print(
        "| codec | bytes a value | KB | x below fp32 | rms error, one site | of the mean "
        "| normal values | s |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    rows = {name: measure(name, model, deltas) for name in modes.names("codecs")}
    for name, (size, one, mean, seconds) in sorted(rows.items(), key=lambda row: -row[1][0]):
        print(
            f"| {name} | {size / values:.3f} | {size / 1000:.1f} | {rows['fp32'][0] / size:.1f} "
            f"| {one:.2%} | {mean:.2%} | {on_normal_values(name):.2%} "
            f"| {seconds:.3f} |"
        )


if __name__ == "__main__":
    main()
