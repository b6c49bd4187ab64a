"""What a delta of SmolLM2-135M and one of LLaMA-2-7B cost with thin_wire.py's arms, really encoded.

    python benchmarks/thin_wire_sizes.py --dir thin --json benchmarks/results/thin_wire_sizes.json

SmolLM2's deltas are those of a site's third round, without a residual: LoRA at r = 64, core at
r = 15, (IA)3. LLaMA-2-7B's shapes are those of all seven linear projections of 32 layers: LoRA at
r = 64, core at r = 96, (IA)3. No 7B model is trained: a tensor's values are blocks of 256 drawn
from what SmolLM2's tensor of the same kind of layer and factor sends (--dir: thin_wire.py's), each
block in an order of its own, so that an entropy coder sees the distribution of real deltas and no
repetition. ``file``: of all tensors, header included, packed, as ``write_delta`` would write it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from codec_speed import INNER, MODULES, specs
from thin_wire import SITES, Folder
from thin_wire_arms import ARMS, Case

from gradualdiff.tuning.wire import Channel
from shared.protocol.manifest import Manifest, TensorSpec
from shared.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Iterator

    Values = dict[str, np.ndarray]

LAYERS, CORE_RANK, BLOCK, ROUNDS = 32, 96, 256, 3
SMALL, LARGE = "SmolLM2-135M", "LLaMA-2-7B"
FP16_MODEL = {SMALL: 269_030_016, LARGE: 13_476_839_424}  # bytes of the weights


def shapes(kind: str) -> list[TensorSpec]:
    """LLaMA-2-7B's tensors of this kind of adapter."""
    lora = specs(LAYERS)
    if kind == "lora":
        return list(lora)
    layers = [one.name.removesuffix(".lora_A.weight") for one in lora if "lora_A" in one.name]
    if kind == "core":
        square = (CORE_RANK, CORE_RANK)
        return [TensorSpec(name=f"{n}.lora_R.weight", shape=square, init="zeros") for n in layers]
    found = []
    for name in layers:
        inward, outward = MODULES[name.rsplit(".", 1)[1]]
        shape = (1, inward) if inward == INNER else (outward, 1)
        found.append(TensorSpec(name=f"{name}.ia3_l", shape=shape, init="ones"))
    return found


def real_deltas(folder: Folder, case: Case) -> Values:
    """What one site of SmolLM2-135M sends in the last of a few rounds, residual not included."""
    from gradualdiff.embedded.sites import make_pool
    from gradualdiff.tuning.trial import Trial, read_texts

    bases, named = folder.bases(1) if case.gradient else (None, "lora.bases=weights")
    config = case.arm.settings(folder.settings, case.rate, [*folder.sets(1), named])
    home = folder.settings.parent
    kept: Values = {}
    with make_pool("cpu", home).borrow(config.base, config.lora, 1, bases) as model:
        texts = read_texts(config, home, model)[:1]
        with Trial(config, case.arm, texts, model.manifest()) as trial:
            (channel,) = trial.ways.values()
            send = channel.send

            def keep(values: Values, seed: int) -> Values:
                kept.update(values)
                return send(values, seed)

            channel.send = keep  # type: ignore[method-assign] - to look at what goes in
            for _ in range(ROUNDS):
                trial.round(model, lambda: False)
    return kept


def drawn(spec: TensorSpec, sources: dict[str, np.ndarray]) -> np.ndarray:
    """Blocks of the real tensor of that kind, shuffled, as many as are needed."""
    rows = sources[kind_of(spec.name)]
    stream = np.random.Generator(np.random.SFC64(derive_seed(1, spec.name)))
    count = -(-spec.elements // BLOCK)
    found = rows[stream.integers(len(rows), size=count)]
    found = stream.permuted(found, axis=1)
    return found.reshape(-1)[: spec.elements].reshape(spec.shape).astype(np.float32)


def kind_of(name: str) -> str:
    """The layer's module and the factor: what is alike in any Llama."""
    parts = [part for part in name.split(".") if part != "weight"]
    return ".".join(parts[-2:])


def by_kind(deltas: Values) -> dict[str, np.ndarray]:
    """Blocks of 256 values of all tensors of one kind."""
    gathered: dict[str, list[np.ndarray]] = {}
    for name, values in deltas.items():
        gathered.setdefault(kind_of(name), []).append(values.reshape(-1))
    joined = {kind: np.concatenate(found) for kind, found in gathered.items()}
    return {
        kind: values[: values.size - values.size % BLOCK].reshape(-1, BLOCK)
        for kind, values in joined.items()
    }


def sizes(folder: Folder) -> Iterator[dict[str, Any]]:
    """A line for each model, kind of adapter and codec."""
    for arm, kind, codecs in (
        ("fp32", "lora", ("fp32", "int8", "int4", "sign", "topk")),
        ("core-15-gradient", "core", ("int8", "int4")),
        ("ia3-int8", "ia3", ("int8", "int4")),
    ):
        real = real_deltas(folder, ARMS[arm])
        small = [TensorSpec(name=n, shape=v.shape, init="zeros") for n, v in real.items()]
        sources = by_kind(real)
        for model, tensors in ((SMALL, small), (LARGE, shapes(kind))):
            manifest = Manifest(
                tensors=tuple(sorted(tensors, key=lambda spec: spec.name)),
                target_modules=tuple(MODULES),
            )
            values = real
            if model == LARGE:
                values = {spec.name: drawn(spec, sources) for spec in manifest.tensors}
            for codec in codecs:
                yield {"model": model, "kind": kind, **encoded(manifest, codec, values)}


def encoded(manifest: Manifest, codec: str, values: Values) -> dict[str, Any]:
    """Values, and bytes of a packed file and of its header."""
    channel = Channel(manifest, codec)
    channel.send(values, 1)
    (size,) = channel.sizes
    count = sum(spec.elements for spec in manifest.tensors)
    return {"codec": codec, "values": count, "file": size, "header": channel.header}


def main() -> None:
    """Print a line for each, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("thin"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    folder = Folder(given.dir.resolve())
    folder.prepare()
    print(f"{LARGE}: deltas like those of one of {SITES} sites of {SMALL}\n")
    print("| model | adapter | codec | values | file, kB | of it header | fp16 model / file |")
    print("|---|---|---|---:|---:|---:|---:|")
    lines = []
    for one in sizes(folder):
        times = round(FP16_MODEL[one["model"]] / one["file"], 1)
        lines.append({**one, "times": times})
        print(
            f"| {one['model']} | {one['kind']} | {one['codec']} | {one['values']:,} "
            f"| {one['file'] / 1e3:,.1f} | {one['header'] / 1e3:,.1f} | {times:,.0f} |",
            flush=True,
        )
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
