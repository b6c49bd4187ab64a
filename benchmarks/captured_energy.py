"""How much of a real model's mean gradient the bases of a `core` adapter hold, by rank and origin.

    python benchmarks/captured_energy.py --dir energy [--examples 64] [--json FILE]

The demo's model (SmolLM2-135M over NF4) and the demo's five sites of real dialogues. Bases come
from whole federations with ``averaging = "range-finder"`` (rank 72, by codec and by pairs of
rounds). Beside them stand what no federation has: the exact SVD of the summed gradient of the whole
weights, the base weights' own SVD, and random directions. The figure is ||B^T G A^T||^2 / ||G||^2,
over all layers together and over single layers, for two gradients G of the mean loss: that of the
examples that the bases were made from, and that of as many others. ``estimate`` is what
``gradualdiff runs show`` says of the same bases without knowing G.

The gradients of whole weights take a while. The bases' runs stay in --dir and are not made again.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitsandbytes
import numpy as np

from coordinator.runs.captured import captured
from gradualdiff.simulation import load_config, simulate
from gradualdiff.store import open_store
from participant.data import load_site_data
from participant.learner.gradient import sample_place
from participant.learner.model_pool import ModelPool
from participant.learner.training import RoundPlace, step_batches
from participant.model.batches import scored_tokens
from shared import topology
from shared.adapters.lora import KIND
from shared.config import load_site
from shared.tensors.tensor_file import TensorFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from numpy.typing import NDArray

    from gradualdiff.run import Run
    from participant.model import LocalModel
    from shared.config import FederationConfig

    Matrix = NDArray[np.float32]
    Bases = Callable[[str], tuple[Matrix, Matrix]]  # (outputs, rank), (rank, inputs)

RANK = 72
RANKS = (16, 32, 64)
RUNS = {
    "fp32": [],
    "int8": ["codec.name=int8"],
    "uniform16": ["codec.name=uniform16"],
    "fp32-twice": ["run.rounds=4"],
}


@dataclass
class Line:
    """Parts of the squared norm; ``estimate``: None where no run made the bases."""

    bases: str
    rank: int
    whole: float
    least: float
    median: float
    most: float
    others: float
    estimate: float | None = None


def main() -> None:
    """Make what is missing, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("energy"))
    parser.add_argument("--examples", type=int, default=64, help="of each site")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = options.dir / "federation.toml"
    if not settings.is_file():
        command = [sys.executable, "-m", "gradualdiff.cli.main", "demo", "--prepare"]
        subprocess.run([*command, "--dir", str(options.dir)], check=True)
    runs = {name: made(settings, name, more, options.examples) for name, more in RUNS.items()}
    config = runs["fp32"].config
    # Which files the sites have is on no record.
    sites = load_config(settings).simulation.sites
    gradients, weights = whole_gradients(config, options.dir, sites)
    lines = list(measured(runs, gradients, weights))
    print_table(lines, options.examples)
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")


def made(settings: Path, name: str, more: list[str], examples: int) -> Run:
    """The finished run of these bases."""
    run = f"bases-{name}-{examples}"
    overrides = [
        f"run.name={run}",
        "run.rounds=2",
        "aggregation.averaging=range-finder",
        f"lora.rank={RANK}",
        "lora.dropout=0",
        f"training.local_steps={examples // 4}",
    ]
    rounds = [line.split("=")[0] for line in more]
    overrides = [line for line in overrides if line.split("=")[0] not in rounds] + more
    config = load_config(settings, overrides)
    store = open_store(settings.parent / config.store.directory)
    known = {one.run: one.state for one in store.runs}
    if known.get(run) != "finished":
        print(f"making {run}", file=sys.stderr, flush=True)
        return simulate(config, settings.parent)
    return store.run(run)


def whole_gradients(
    config: FederationConfig, folder: Path, sites: Sequence[str]
) -> tuple[tuple[dict[str, Matrix], dict[str, Matrix]], dict[str, Matrix]]:
    """G of the examples that the run drew and of others, mean of all sites; and the base's weights.

    By each layer's name; (outputs, inputs).
    """
    pool = ModelPool("cpu", folder)
    sums: tuple[dict[str, Matrix], dict[str, Matrix]] = ({}, {})
    with pool.borrow(config.base, config.lora, config.training.cpu_threads) as model:
        for name in sites:
            site = load_site(folder / name)
            limits = config.training.max_prompt_tokens, config.training.max_answer_tokens
            data = load_site_data(site.data, (folder / name).parent, model.tokenizer, *limits)
            place = RoundPlace(site.site.name, 1, 0, 0.0, 1.0)
            drawn = sample_place(place, config.digest)
            batches = list(step_batches(len(data.train), config.training, drawn))
            seen = {at for batch in batches for at in batch}
            spare = [at for at in range(len(data.train)) if at not in seen][: len(seen)]
            others = [spare[at : at + 4] for at in range(0, len(spare), 4)]
            for sums_of, chosen in zip(sums, (batches, others), strict=True):
                examples = [[data.train[at] for at in batch] for batch in chosen]
                add_gradient(model, examples, sums_of, 1 / len(sites))
            print(f"gradient of {site.site.name}", file=sys.stderr, flush=True)
        weights = {layer.name: weight_of(model, layer.name) for layer in layers_of(model)}
    del pool
    gc.collect()
    return sums, weights


def layers_of(model: LocalModel) -> Any:
    """Every layer with an adapter."""
    return KIND.layers(model.manifest())


def module_of(model: LocalModel, layer: str) -> Any:
    """PEFT's layer of that name."""
    return model._network.get_submodule(layer)  # noqa: SLF001 - to look beside the adapter


def weight_of(model: LocalModel, layer: str) -> Matrix:
    """The weight that its four bits stand for."""
    weight = module_of(model, layer).base_layer.weight
    unpacked = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    values: Matrix = unpacked.float().numpy()
    return values


def add_gradient(
    model: LocalModel, batches: list[list[Any]], sums: dict[str, Matrix], share: float
) -> None:
    """Add ``share`` x the gradient of the mean loss over all answer tokens: sum of g x^T."""
    tokens = sum(scored_tokens(example) for batch in batches for example in batch)
    model.load_adapter(lambda name: np.zeros(model.parameters[name].shape, np.float32))
    lefts = [layer.left.name for layer in layers_of(model)]
    inputs: dict[str, torch.Tensor] = {}

    def forward(name: str) -> Callable[..., None]:
        def keep(_module: Any, given: tuple[torch.Tensor, ...]) -> None:
            inputs[name] = given[0].detach().flatten(0, -2).float()

        return keep

    def backward(name: str) -> Callable[..., None]:
        def add(_module: Any, _given: Any, found: tuple[torch.Tensor, ...]) -> None:
            product = found[0].flatten(0, -2).float().T @ inputs.pop(name)
            sums.setdefault(name, np.zeros(tuple(product.shape), np.float32))
            sums[name] += product.numpy() * np.float32(share)

        return add

    with ExitStack() as stack:
        for layer in layers_of(model):
            module = module_of(model, layer.name)
            stack.callback(module.register_forward_pre_hook(forward(layer.name)).remove)
            stack.callback(module.register_full_backward_hook(backward(layer.name)).remove)
        stack.enter_context(model.training(gradient_checkpointing=False, only=lefts))
        for batch in batches:
            (model.answer_nll(batch) / tokens).backward()


def measured(
    runs: dict[str, Run],
    gradients: tuple[dict[str, Matrix], dict[str, Matrix]],
    weights: dict[str, Matrix],
) -> Iterator[Line]:
    """A line for each origin and rank."""
    exact = {
        name: np.linalg.svd(values, full_matrices=False) for name, values in gradients[0].items()
    }
    yield from lines_of("exact SVD of G", lambda name: (exact[name][0], exact[name][2]), gradients)
    for label, run in runs.items():
        found = captured(run.history)
        assert found is not None  # a run that makes bases
        estimates = {held.rank: held.whole for held in found.ranks}
        sha = run.summary.adapter_sha
        assert sha is not None  # it is finished
        path = run.path / topology.adapter_key(run.name, sha)
        with TensorFile(path) as file:

            def bases(name: str, file: TensorFile = file) -> tuple[Matrix, Matrix]:
                return file.read(f"{name}.lora_B.weight"), file.read(f"{name}.lora_A.weight")

            for line in lines_of(f"range finder, {label}", bases, gradients):
                yield replace(line, estimate=estimates[line.rank])
    own = {name: np.linalg.svd(values, full_matrices=False) for name, values in weights.items()}
    yield from lines_of("SVD of W", lambda name: (own[name][0], own[name][2]), gradients)

    def random(name: str) -> tuple[Matrix, Matrix]:
        stream = np.random.Generator(np.random.Philox(len(name)))
        rows, columns = gradients[0][name].shape
        left = np.linalg.qr(stream.standard_normal((rows, RANK)))[0]
        right = np.linalg.qr(stream.standard_normal((columns, RANK)))[0]
        return left.astype(np.float32), right.T.astype(np.float32)

    yield from lines_of("random", random, gradients)


def lines_of(
    label: str, bases: Bases, gradients: tuple[dict[str, Matrix], dict[str, Matrix]]
) -> Iterator[Line]:
    """How much the first directions hold of both gradients."""
    held: dict[int, list[list[float]]] = {rank: [[], []] for rank in RANKS}
    totals = [[float(np.sum(np.square(g))) for g in one.values()] for one in gradients]
    for name in gradients[0]:
        b, a = bases(name)
        for at, one in enumerate(gradients):
            core = np.square(b[:, :RANK].T @ one[name] @ a[:RANK].T)
            for rank in RANKS:
                held[rank][at].append(float(core[:rank, :rank].sum()))
    for rank, (own, others) in held.items():
        parts = [part / total for part, total in zip(own, totals[0], strict=True)]
        yield Line(
            bases=label,
            rank=rank,
            whole=sum(own) / sum(totals[0]),
            least=min(parts),
            median=statistics.median(parts),
            most=max(parts),
            others=sum(others) / sum(totals[1]),
        )


def print_table(lines: list[Line], examples: int) -> None:
    """As Markdown."""
    print(f"{examples} examples a site; parts of the squared norm of the mean gradient, in %.\n")
    print("| bases | r | all layers | least | median | most | other examples | estimate |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for one in lines:
        parts = (one.whole, one.least, one.median, one.most, one.others)
        told = " | ".join(f"{100 * part:.2f}" for part in parts)
        estimate = "" if one.estimate is None else f"{100 * one.estimate:.2f}"
        print(f"| {one.bases} | {one.rank} | {told} | {estimate} |")


if __name__ == "__main__":
    main()
